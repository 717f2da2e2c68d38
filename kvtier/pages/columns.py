"""The columns of the page table: which there are, how they grow, and what must hold between them.

One row a page; a row number is the page id that policies and transfers use, stable while the row exists and reused after. Columns are
replaced by larger ones when rows run out, so nobody keeps one across calls that add pages.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Container

import numpy as np
from numpy.typing import NDArray

from kvtier import columns as compiled
from kvtier.errors import IntegrityError

ABSENT, WRITING, READY = 0, 1, 2
NO_ROW = -1
NO_TIER = -1
DEVICE = 0
"""The warmest tier: where engines read and write pages."""
MOST_TIERS = 8

Rows = NDArray[np.int64]

_COUNTS = SIZE, UNUSED, HOLLOW = range(3)
"""Cells of `counts`: rows that there have been; rows on the free list; 1 once a row without copies had to stay: until then, with one tier
only, all children of a page are in that tier."""

COLUMNS = (
    *("key", "parent_key", "parent", "children", "depth", "leases", "uses", "pin_tier", "pin_until", "attention", "leaving"),
    *("prefetched_from", "slot", "readers", "_used", "_open", "_copies"),
)
"""Those with a row for each page."""


class PageColumns:
    """Columns for pages over `tiers` tiers (0 is the device, larger is colder). IntegrityError for more than MOST_TIERS tiers."""

    def __init__(self, tiers: int, page_tokens: int) -> None:
        if tiers > MOST_TIERS:
            raise IntegrityError(f"a page table for {tiers} tiers; there are at most {MOST_TIERS}")
        self.tiers = tiers
        self.page_tokens = page_tokens
        self.counts = array("q", bytes(8 * len(_COUNTS)))
        """A column that Python reads as fast as an attribute: compiled loops write it, too."""
        # Every column has one row more than there is room for: NO_ROW indexes it, it holds no copy, and nobody looks at what it counts.
        self.key: NDArray[np.object_] = np.empty(1, np.object_)
        """`PageKey` of a page, None for an open page and for rows not in use."""
        self.parent_key: NDArray[np.object_] = np.empty(1, np.object_)
        self.parent: Rows = np.full(1, NO_ROW)
        self.children: Rows = np.zeros(1, np.int64)
        self.depth: Rows = np.zeros(1, np.int64)
        self.leases: Rows = np.zeros(1, np.int64)
        self.uses: Rows = np.zeros(1, np.int64)
        self.pin_tier: Rows = np.zeros(1, np.int64)
        self.pin_until: NDArray[np.float64] = np.zeros(1)
        self.attention: NDArray[np.float64] = np.zeros(1)
        """The last attention mass an engine reported for the page, NaN if none did."""
        self.leaving: Rows = np.zeros(1, np.int64)
        """Children that leave in the eviction that is being decided now; 0 at any other time."""
        self.prefetched_from: Rows = np.zeros(1, np.int64)
        self.slot: Rows = np.zeros((tiers, 1), np.int64)
        self.readers: Rows = np.zeros((tiers, 1), np.int64)
        self._used: NDArray[np.bool_] = np.zeros(1, np.bool_)
        self._open: NDArray[np.bool_] = np.zeros(1, np.bool_)
        self._copies: NDArray[np.uint64] = np.zeros(1, np.uint64)
        """The states of a row's copies, one byte a tier: all of them can be looked at in one step."""
        self.state: NDArray[np.uint8] = np.empty((tiers, 0), np.uint8)
        """`[tiers, rows]`, a view of the same bytes."""
        self._free: Rows = np.empty(0, np.int64)
        self.pinned_until = -math.inf
        """No pin lasts longer."""
        self._alone = [np.array(cell) for cell in (np.eye(MOST_TIERS, dtype=np.uint8) * READY).view(np.uint64)[:, 0]]
        self.loops: compiled.TableLoops | None = None
        """The compiled loops over the columns, until these grow; None where there are none."""
        self._grow(1024)
        self._row_of = self._index()

    def __len__(self) -> int:
        """Rows in use, hollow and open ones included."""
        return self.counts[SIZE] - self.counts[UNUSED]

    @property
    def rows(self) -> int:
        """Row numbers are below this."""
        return self.counts[SIZE]

    def _grow(self, rows: int) -> None:
        held = len(self.parent) - 1
        for name in COLUMNS:
            column = getattr(self, name)
            larger = np.zeros((*column.shape[:-1], rows + 1), column.dtype)
            larger[..., :held] = column[..., :held]
            setattr(self, name, larger)
        self.key[held:] = None
        self.parent[held:] = NO_ROW
        self.state = self._copies.view(np.uint8).reshape(rows + 1, MOST_TIERS).T[: self.tiers]
        free, unused = np.empty(rows, np.int64), self.counts[UNUSED]
        free[:unused] = self._free[:unused]
        self._free = free
        self.loops = self.attach()

    def attach(self) -> compiled.TableLoops | None:
        """The compiled loops over the columns as they are now; None where there are none."""
        loops = compiled.loops()
        if loops is None:
            return None
        links = (self.parent, self.slot, self.readers, self.children, self.depth, self.leases, self.uses)
        marks = (self.pin_tier, self.leaving, self.prefetched_from)
        others = (self.pin_until, self.attention, self._copies, self._used, self._open, self.key, self.parent_key)
        return loops.Table(*links, *marks, *others, self._free, self.counts)

    def _index(self) -> compiled.RowIndex:
        """An empty index of rows by key: one that the compiled loops take where they are, else a dict."""
        loops = compiled.loops()
        return {} if self.loops is None or loops is None else loops.Index()

    def check_integrity(self) -> None:
        """IntegrityError if the columns contradict each other. Slow; for tests."""
        size, unused = self.counts[SIZE], self.counts[UNUSED]
        free = set(self._free[:unused].tolist())
        used = [row for row in range(size) if row not in free]
        if len(free) != unused or free != set(np.flatnonzero(~self._used[:size]).tolist()):
            raise IntegrityError("the free list names a row twice, or is not the list of rows that are not in use")
        children = np.zeros(size, np.int64)
        for row in used:
            parent = int(self.parent[row])
            if parent != NO_ROW:
                if parent in free:
                    raise IntegrityError(f"row {row}: its parent {parent} is gone")
                if self.depth[parent] != self.depth[row] - 1:
                    raise IntegrityError(f"row {row} at depth {self.depth[row]} has a parent at depth {self.depth[parent]}")
                if self.key[row] is not None and self.parent_key[row] != self.key[parent]:
                    raise IntegrityError(f"row {row}: its parent key is not the key of its parent {parent}")
                children[parent] += 1
            key = self.key[row]
            if key is not None and self._row_of.get(key) != row:
                raise IntegrityError(f"row {row}: its key leads to row {self._row_of.get(key)}")
            if (key is None) != self._open[row]:
                raise IntegrityError(f"row {row} is an open page with a key, or has none and is not open")
            if key is None and (self.state[0, row] != READY or self.state[1:, row].any() or self.leases[row] < 1):
                raise IntegrityError(f"row {row} is an open page that is not held, or not on the device alone")
            if not self.state[:, row].any() and not self.children[row] and not self.leases[row]:
                raise IntegrityError(f"row {row} is empty and should be gone")
            if self.leaving[row]:
                raise IntegrityError(f"row {row}: an eviction was never decided to its end")
            if self.leases[row] < 0 or (self.readers[:, row] < 0).any():
                raise IntegrityError(f"row {row} was released more often than held")
            if (self.readers[:, row] > 0).any() and (self.state[self.readers[:, row] > 0, row] != READY).any():
                raise IntegrityError(f"row {row}: a copy that is not READY is being read")
        if not np.array_equal(children, self.children[:size] * np.isin(np.arange(size), used)):
            raise IntegrityError("child counts are wrong")
        if len(self._row_of) != sum(self.key[row] is not None for row in used):
            raise IntegrityError("the key index has entries without a row")
        for tier in range(self.tiers):
            rows = [row for row in used if self.state[tier, row] != ABSENT]
            slots = self.slot[tier, rows]
            if len(np.unique(slots)) != len(slots):
                raise IntegrityError(f"two pages share a slot in tier {tier}")

    def check_tier(self, tier: int, candidates: Container[int]) -> None:
        """IntegrityError unless exactly the READY, keyed copies of `tier` are candidates of its policy, and nothing is half-way.

        For tests.
        """
        for row in range(self.rows):
            here = bool(self.state[tier, row] == READY and self.key[row] is not None)
            if here != (row in candidates):
                raise IntegrityError(f"row {row}: copy in tier {tier} is {'not ' * (not here)}there, but the policy thinks otherwise")
            if self.state[tier, row] == WRITING or self.readers[tier, row]:
                raise IntegrityError(f"row {row}: a transfer of tier {tier} never ended")
