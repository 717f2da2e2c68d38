"""The page table: which page is where, who holds it, what stands before it.

Columns (NumPy), one row a page; a row number is the page id that policies and transfers use, stable while the row exists and reused
after. Content-addressed pages have a key; an open page (the partly filled tail of a sequence) has none, lives on the device only and is
never evicted. A page may have a copy per tier, each ABSENT, WRITING (reserved, invisible) or READY (committed). A row without any copy
but with children is *hollow*: lookups end there, and it disappears with its last child.

No tensors, no I/O, no lock of its own: `kvtier.residency` calls it under its lock. Methods take arrays of rows, because a request
touches hundreds at once.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from kvtier.errors import IntegrityError
from kvtier.keys import PageKey
from kvtier.tiers.base import PageId

ABSENT, WRITING, READY = 0, 1, 2
NO_ROW = -1
NO_TIER = -1

Rows = NDArray[np.int64]


class PageTable:
    """Rows for pages over `tiers` tiers (0 is the device, larger is colder). Grows as needed; the tiers' slots bound it."""

    def __init__(self, tiers: int, page_tokens: int) -> None:
        self.tiers = tiers
        self.page_tokens = page_tokens
        self._row_of: dict[PageKey, int] = {}
        self._free: list[int] = []
        self._size = 0
        self.key: list[PageKey | None] = []
        self.parent_key: list[PageKey] = []
        self.parent: Rows = np.empty(0, np.int64)
        self.children: Rows = np.empty(0, np.int64)
        self.depth: Rows = np.empty(0, np.int64)
        self.fill: Rows = np.empty(0, np.int64)
        self.leases: Rows = np.empty(0, np.int64)
        self.uses: Rows = np.empty(0, np.int64)
        self.pin_tier: Rows = np.empty(0, np.int64)
        self.pin_until: NDArray[np.float64] = np.empty(0)
        self.attention: NDArray[np.float64] = np.empty(0)
        """The last attention mass an engine reported for the page, NaN if none did."""
        self.prefetched_from: Rows = np.empty(0, np.int64)
        self.state: NDArray[np.uint8] = np.empty((tiers, 0), np.uint8)
        self.slot: Rows = np.empty((tiers, 0), np.int64)
        self.readers: Rows = np.empty((tiers, 0), np.int64)
        self._grow(1024)

    def __len__(self) -> int:
        """Rows in use, hollow and open ones included."""
        return self._size - len(self._free)

    @property
    def rows(self) -> int:
        """Row numbers are below this."""
        return self._size

    # -- finding ---------------------------------------------------------------------------------------------------------------

    def row(self, key: PageKey) -> int:
        """The row of a page, visible or not; NO_ROW if there is none."""
        return self._row_of.get(key, NO_ROW)

    def find(self, keys: Sequence[PageKey]) -> Rows:
        """Rows of the longest prefix of `keys` of which every page has a READY copy somewhere."""
        found: list[int] = []
        get = self._row_of.get
        for key in keys:
            row = get(key)
            if row is None:
                break
            found.append(row)
        rows = np.array(found, np.int64)
        if not len(rows):
            return rows
        visible = (self.state[:, rows] == READY).any(axis=0)
        return rows if visible.all() else rows[: int(visible.argmin())]

    def warmest(self, rows: Rows) -> Rows:
        """For each row the warmest tier with a READY copy, NO_TIER if there is none."""
        ready = self.state[:, rows] == READY
        return np.where(ready.any(axis=0), ready.argmax(axis=0), NO_TIER).astype(np.int64)

    def has_copy_below(self, row: int, tier: int, coldest: int | None = None) -> bool:
        """Whether a READY copy exists in a colder tier than `tier`, but none colder than `coldest`."""
        return bool((self.state[tier + 1 : None if coldest is None else coldest + 1, row] == READY).any())

    def page_id(self, row: int) -> PageId:
        """What a copy of `row` says about itself. IntegrityError for an open page, which never leaves the device."""
        key = self.key[row]
        if key is None:
            raise IntegrityError(f"row {row} is an open page and has no key")
        return PageId(key, self.parent_key[row], int(self.depth[row]))

    def pinned(self, row: int, now: float) -> int:
        """The coldest tier this page may live in while its pin lasts, or NO_TIER."""
        return int(self.pin_tier[row]) if self.pin_until[row] > now else NO_TIER

    # -- rows ------------------------------------------------------------------------------------------------------------------

    def add(self, page: PageId, parent: int = NO_ROW) -> int:
        """The row of `page`, made if it is new. `parent` is the row of the page before it, if that is known.

        A page whose parent was unknown (an orphan found on disk) is linked when its parent appears: hollow parents are made for it.
        """
        row = self._row_of.get(page.key)
        if row is None:
            row = self._new_row()
            self.key[row] = page.key
            self._row_of[page.key] = row
            self.parent_key[row] = page.parent
            self.depth[row] = page.depth
            self.fill[row] = self.page_tokens
        elif self.parent[row] != NO_ROW:
            return row
        else:
            self.parent_key[row] = page.parent
        if page.depth > 0:
            if parent == NO_ROW:
                parent = self._hollow(page.parent, page.depth - 1)
            self._link(row, parent)
        return row

    def open(self, parent: int, slot: int, depth: int) -> int:
        """A new open page on device slot `slot`, with no tokens yet and one lease."""
        row = self._new_row()
        self.depth[row] = depth
        self.state[0, row] = READY
        self.slot[0, row] = slot
        self.leases[row] = 1
        if parent != NO_ROW:
            self._link(row, parent)
        return row

    def seal(self, row: int, page: PageId) -> tuple[int, int]:
        """Turn the full open page `row` into the content-addressed `page`; returns (its row, a device slot to free or -1).

        If the page already has a device copy, that copy is used and the open page's slot is handed back. The lease moves along. The page's
        device copy must not be WRITING (IntegrityError): nobody knows yet whether it comes.
        """
        parent = int(self.parent[row])
        slot = int(self.slot[0, row])
        sealed = self.add(page, parent)
        if self.state[0, sealed] == WRITING:
            raise IntegrityError(f"row {sealed} is on its way up; wait for that before sealing row {row} as the same page")
        if self.state[0, sealed] == ABSENT:
            self.state[0, sealed] = READY
            self.slot[0, sealed] = slot
            slot = -1
        self.leases[sealed] += self.leases[row]
        self.leases[row] = 0
        self.state[0, row] = ABSENT
        self._reap(row)
        return sealed, slot

    # -- copies ----------------------------------------------------------------------------------------------------------------

    def begin(self, rows: Iterable[int], tier: int, slots: Iterable[int]) -> None:
        """Reserve a copy per row: invisible until `commit`. IntegrityError if a row already has or awaits one there."""
        for row, slot in zip(rows, slots, strict=True):
            if self.state[tier, row] != ABSENT:
                raise IntegrityError(f"row {row} already has a copy in tier {tier}")
            self.state[tier, row] = WRITING
            self.slot[tier, row] = slot

    def commit(self, row: int, tier: int) -> None:
        """Make a WRITING copy visible."""
        if self.state[tier, row] != WRITING:
            raise IntegrityError(f"row {row} has nothing to commit in tier {tier}")
        self.state[tier, row] = READY

    def drop(self, row: int, tier: int) -> int:
        """Forget a copy, WRITING or READY; returns its slot. The row goes when nothing is left of it."""
        if self.state[tier, row] == ABSENT:
            raise IntegrityError(f"row {row} has no copy in tier {tier}")
        if self.readers[tier, row]:
            raise IntegrityError(f"row {row} is being read in tier {tier}")
        self.state[tier, row] = ABSENT
        slot = int(self.slot[tier, row])
        self._reap(row)
        return slot

    def hold(self, rows: Rows | Sequence[int], tier: int) -> None:
        """A transfer reads these copies: they may not be dropped until `unhold`."""
        self.readers[tier, rows] += 1

    def unhold(self, rows: Rows | Sequence[int], tier: int) -> None:
        """The transfer is over."""
        self.readers[tier, rows] -= 1

    # -- holders ---------------------------------------------------------------------------------------------------------------

    def lease(self, rows: Rows) -> None:
        """Count one more holder of each row (rows must be distinct)."""
        self.leases[rows] += 1

    def release(self, rows: Sequence[int] | Rows) -> list[int]:
        """One holder less; returns device slots of open pages that nobody holds any more, for the caller to free."""
        freed: list[int] = []
        for row in rows:
            if self.leases[row] <= 0:
                raise IntegrityError(f"row {row} is not leased")
            self.leases[row] -= 1
            if self.leases[row] == 0:
                if self.key[row] is None:
                    freed.append(self.drop(row, 0))
                else:
                    self._reap(row)
        return freed

    def pin(self, rows: Rows, tier: int, until: float) -> None:
        """Keep these pages in `tier` or warmer until the clock reads `until` (math.inf for ever)."""
        self.pin_tier[rows] = tier
        self.pin_until[rows] = until

    def unpin(self, rows: Rows) -> None:
        """Forget the pins of these pages."""
        self.pin_until[rows] = -math.inf

    # -- inside ----------------------------------------------------------------------------------------------------------------

    def _new_row(self) -> int:
        if self._free:
            row = self._free.pop()
        else:
            if self._size == len(self.parent):
                self._grow(2 * self._size)
            row = self._size
            self._size += 1
            self.key.append(None)
            self.parent_key.append(b"")
        self.parent[row] = NO_ROW
        self.children[row] = self.depth[row] = self.fill[row] = self.leases[row] = self.uses[row] = 0
        self.pin_until[row] = -math.inf
        self.attention[row] = math.nan
        self.prefetched_from[row] = NO_TIER
        self.state[:, row] = ABSENT
        self.readers[:, row] = 0
        return row

    def _hollow(self, key: PageKey, depth: int) -> int:
        row = self._row_of.get(key)
        if row is None:
            row = self._new_row()
            self.key[row] = key
            self._row_of[key] = row
            self.depth[row] = depth
            self.fill[row] = self.page_tokens
        return row

    def _link(self, row: int, parent: int) -> None:
        self.parent[row] = parent
        self.children[parent] += 1

    def _reap(self, row: int) -> None:
        """Remove the row if nothing is left of it, and then its hollow ancestors that it alone kept."""
        while row != NO_ROW and not self.children[row] and not self.leases[row] and not self.state[:, row].any():
            key = self.key[row]
            if key is not None:
                del self._row_of[key]
                self.key[row] = None
            parent = int(self.parent[row])
            self.parent[row] = NO_ROW
            self._free.append(row)
            if parent != NO_ROW:
                self.children[parent] -= 1
            row = parent

    def _grow(self, rows: int) -> None:
        old = len(self.parent)
        for name in ("parent", "children", "depth", "fill", "leases", "uses", "pin_tier", "pin_until", "attention", "prefetched_from"):
            column = getattr(self, name)
            larger = np.zeros(rows, column.dtype)
            larger[:old] = column
            setattr(self, name, larger)
        for name in ("state", "slot", "readers"):
            column = getattr(self, name)
            larger = np.zeros((self.tiers, rows), column.dtype)
            larger[:, :old] = column
            setattr(self, name, larger)

    def check_integrity(self) -> None:
        """IntegrityError if the columns contradict each other. Slow; for tests."""
        free = set(self._free)
        used = [row for row in range(self._size) if row not in free]
        if len(free) != len(self._free):
            raise IntegrityError("the free list names a row twice")
        children = np.zeros(self._size, np.int64)
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
            if key is None and (self.state[0, row] != READY or self.state[1:, row].any() or self.leases[row] < 1):
                raise IntegrityError(f"row {row} is an open page that is not held, or not on the device alone")
            if not self.state[:, row].any() and not self.children[row] and not self.leases[row]:
                raise IntegrityError(f"row {row} is empty and should be gone")
            if self.leases[row] < 0 or (self.readers[:, row] < 0).any():
                raise IntegrityError(f"row {row} was released more often than held")
            if (self.readers[:, row] > 0).any() and (self.state[self.readers[:, row] > 0, row] != READY).any():
                raise IntegrityError(f"row {row}: a copy that is not READY is being read")
        if not np.array_equal(children, self.children[: self._size] * np.isin(np.arange(self._size), used)):
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
        for row in range(self._size):
            here = self.state[tier, row] == READY and self.key[row] is not None
            if here != (row in candidates):
                raise IntegrityError(f"row {row}: copy in tier {tier} is {'not ' * (not here)}there, but the policy thinks otherwise")
            if self.state[tier, row] == WRITING or self.readers[tier, row]:
                raise IntegrityError(f"row {row}: a transfer of tier {tier} never ended")
