"""The page table: which page is where, who holds it, what stands before it.

Content-addressed pages have a key; an open page (the partly filled tail of a sequence) has none, lives on the device only and is never
evicted. A page may have a copy per tier, each ABSENT, WRITING (reserved, invisible) or READY (committed). A row without any copy but with
children is *hollow*: lookups end there, and it disappears with its last child.

No tensors, no I/O, no lock of its own: `kvtier.residency` calls it under its lock. Methods take arrays of rows, no row twice in a call,
because a request touches hundreds at once. Where the compiled loops of `kvtier.columns` are, they do the usual case of a method, to the
same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvtier.columns import WHOLE, Exit, NewChain
from kvtier.errors import IntegrityError
from kvtier.keys import PageKey
from kvtier.pages.columns import ABSENT, MOST_TIERS, NO_ROW, NO_TIER, READY, SIZE, WRITING, Rows
from kvtier.pages.rows import PageRows
from kvtier.tiers.base import PageId

Links = tuple[Rows, Rows, NDArray[np.bool_] | None]
"""What comes before some rows: see `PageTable.links`."""

# Arrays without dimensions: with a Python number, NumPy spends longer on finding the type than on a whole request's rows.
_ONE, _NOBODY, _NO_TIER = np.array(1), np.array(0), np.array(NO_TIER)
_ABSENT, _WRITING, _READY = (np.array(state, np.uint8) for state in (ABSENT, WRITING, READY))
_READY_ANYWHERE = np.full(MOST_TIERS, READY, np.uint8).view(np.uint64)[0]


def names_of(keys: Sequence[PageKey]) -> Rows:
    """What the pages of these keys are called whatever row they are in: the first 8 bytes of each, `[n]`."""
    return np.frombuffer(b"".join([key[:8] for key in keys]), np.int64)


class PageTable(PageRows):
    """Rows for pages over `tiers` tiers. Grows as needed; the tiers' slots bound it."""

    # -- finding ---------------------------------------------------------------------------------------------------------------

    def row(self, key: PageKey) -> int:
        """The row of a page, visible or not; NO_ROW if there is none."""
        return self._row_of.get(key, NO_ROW)

    def rows_of(self, keys: Sequence[PageKey]) -> Rows:
        """The rows of these pages, visible or not; NO_ROW where there is none."""
        get = self._row_of.get
        return np.array([get(key, NO_ROW) for key in keys], np.int64)

    def find(self, keys: Sequence[PageKey]) -> Rows:
        """Rows of the longest prefix of `keys` of which every page has a READY copy somewhere."""
        if self.loops is not None:
            rows = np.empty(len(keys), WHOLE)
            return rows[: self.loops.find(self._row_of, keys, rows)]
        known = iter(map(self._row_of.get, keys).__next__, None)  # up to the first key without a row, or the last
        rows = np.fromiter(known, np.int64)
        visible = self._copies[rows] & _READY_ANYWHERE
        return rows if np.count_nonzero(visible) == len(rows) else rows[: int((visible != 0).argmin())]

    def claim(self, keys: Sequence[PageKey]) -> Rows:
        """`find`, `lease` and `use` at once."""
        if self.loops is not None:
            rows = np.empty(len(keys), WHOLE)
            found = self.loops.claim(self._row_of, keys, rows)
            return rows if found == len(keys) else rows[:found]
        rows = self.find(keys)
        self.lease(rows)
        self.use(rows)
        return rows

    def ready(self, tier: int) -> Rows:
        """Rows of all pages with a key that have a READY copy in `tier`, prefixes before what follows them. Looks at every row."""
        used = slice(0, self.counts[SIZE])
        rows = np.flatnonzero((self.state[tier, used] == _READY) & ~self._open[used])
        return rows[np.argsort(self.depth[rows], kind="stable")]

    def warmest(self, rows: Rows) -> Rows:
        """For each row the warmest tier with a READY copy, NO_TIER if there is none."""
        if self.loops is not None and self.loops.warmest(rows, found := np.empty(len(rows), WHOLE)):
            return found
        warmest = np.full(len(rows), _NO_TIER)
        for tier in range(self.tiers - 1, -1, -1):
            warmest[self.state[tier][rows] == _READY] = tier
        return warmest

    def has_copy_below(self, rows: Rows, tier: int, coldest: int | None = None) -> NDArray[np.bool_]:
        """Which of these have a READY copy in a colder tier than `tier`; with `coldest`, in one that is not colder than that."""
        below = np.zeros(len(rows), np.bool_)
        for colder in range(tier + 1, self.tiers if coldest is None else coldest + 1):
            below |= self.state[colder][rows] == _READY
        return below

    def has_copy_above(self, rows: Rows, tier: int) -> NDArray[np.bool_]:
        """Which of these have a copy, READY or on its way, in a warmer tier than `tier`."""
        above = np.zeros(len(rows), np.bool_)
        for warmer in range(tier):
            above |= self.state[warmer][rows] != _ABSENT
        return above

    def links(self, rows: Rows) -> Links:
        """The rows before these (NO_ROW where there is none), their depths, and for which attention was reported (None: for none)."""
        if self.loops is not None:
            parents, depths = np.empty(len(rows), WHOLE), np.empty(len(rows), WHOLE)
            if self.loops.links(rows, parents, depths) == 0:
                return parents, depths, None
        mass = self.attention[rows]
        attended = mass == mass  # not NaN
        return self.parent[rows], self.depth[rows], attended if 1 in attended.tobytes() else None

    def is_alone(self, rows: Rows, tier: int) -> NDArray[np.bool_]:
        """Which of these have a READY copy in `tier`, and none anywhere else, not even on its way."""
        alone: NDArray[np.bool_] = self._copies[rows] == self._alone[tier]
        return alone

    def page_id(self, row: int) -> PageId:
        """What a copy of `row` says about itself. IntegrityError for an open page, which never leaves the device."""
        key = self.key[row]
        if key is None:
            raise IntegrityError(f"row {row} is an open page and has no key")
        return PageId(key, self.parent_key[row], int(self.depth[row]))

    def page_ids(self, rows: Rows) -> list[PageId]:
        """`page_id` of each."""
        keys = self.key[rows].tolist()
        if None in keys:
            self.page_id(int(rows[keys.index(None)]))
        return [*map(PageId, keys, self.parent_key[rows].tolist(), self.depth[rows].tolist())]

    def names(self, rows: Rows) -> Rows:
        """`names_of` the pages of these rows, which have keys."""
        if self.loops is not None and self.loops.names(rows, names := np.empty(len(rows), WHOLE)):
            return names
        return names_of(self.key[rows].tolist())

    def pinned(self, row: int, now: float) -> int:
        """The coldest tier this page may live in while its pin lasts, or NO_TIER."""
        return int(self.pin_tier[row]) if self.pin_until[row] > now else NO_TIER

    def any_pinned(self, rows: Rows, now: float) -> NDArray[np.bool_] | None:
        """Which of these are pinned; None if none is."""
        if self.pinned_until <= now:
            return None
        pinned: NDArray[np.bool_] = self.pin_until[rows] > now
        return pinned if np.count_nonzero(pinned) else None

    # -- copies ----------------------------------------------------------------------------------------------------------------

    def begin(self, rows: Rows | Sequence[int], tier: int, slots: Sequence[int]) -> None:
        """Reserve a copy per row: invisible until `commit`. IntegrityError, and nothing begun, if one already has or awaits one there."""
        rows = np.asarray(rows, WHOLE)
        if self.loops is not None and self.loops.begin(rows, tier, slots):
            return
        state = self.state[tier]
        if np.count_nonzero(state[rows]):
            raise IntegrityError(f"row {rows[state[rows] != _ABSENT][0]} already has a copy in tier {tier}")
        self.slot[tier][rows] = slots
        state[rows] = _WRITING

    def settle(self, rows: Rows, tier: int, slots: Sequence[int]) -> None:
        """`begin`, `commit`, `lease` and `use` at once: copies that are already written. IntegrityError, and nothing done, as `begin`."""
        if self.loops is None or not self.loops.settle(rows, tier, slots):
            self.begin(rows, tier, slots)
            self.commit(rows, tier)
            self.lease(rows)
            self.use(rows)

    def settle_chain(
        self, keys: Sequence[PageKey], before: PageKey, depth: int, parent: int, tier: int, slots: Sequence[int]
    ) -> tuple[Rows, Links]:
        """`add_chain`, and `settle` and `links` of the rows, which come first. Raises as `settle`: then there are rows, but no copies."""
        if (chain := self.new_chain(keys, before, depth, parent, tier, slots)) is not None:
            count = len(keys)
            rows, parents, depths = np.empty(count, WHOLE), np.empty(count, WHOLE), np.empty(count, WHOLE)
            if chain[0].settle_chain(*chain[1:], rows, parents, depths):
                return rows, (parents, depths, None)
        rows = self.add_chain(keys, before, depth, parent)
        self.settle(rows, tier, slots)
        return rows, self.links(rows)

    def new_chain(
        self, keys: Sequence[PageKey], before: PageKey, depth: int, parent: int, tier: int, slots: Sequence[int]
    ) -> NewChain | None:
        """What compiled loops of others must know to `settle_chain` by themselves; None without loops."""
        if (loops := self.loops) is None:
            return None
        return loops, self._row_of, keys, before, depth, parent, tier, slots

    def commit(self, rows: Rows | Sequence[int], tier: int) -> None:
        """Make WRITING copies visible. IntegrityError, and nothing done, if one of them is not WRITING."""
        rows = np.asarray(rows, WHOLE)
        if self.loops is not None and self.loops.commit(rows, tier):
            return
        state = self.state[tier]
        if 1 in (wrong := state[rows] != _WRITING).tobytes():
            raise IntegrityError(f"row {rows[wrong][0]} has nothing to commit in tier {tier}")
        state[rows] = _READY

    def drop(self, rows: Rows | Sequence[int], tier: int) -> list[int]:
        """Forget copies, WRITING or READY; returns their slots. A row goes when nothing is left of it.

        IntegrityError, and nothing dropped, if one has no copy or is being read.
        """
        rows = np.asarray(rows, WHOLE)
        if self.loops is not None and (slots := self.loops.drop(rows, tier, self._row_of)) is not None:
            return slots
        state = self.state[tier]
        if 0 in state[rows].tobytes():
            raise IntegrityError(f"row {rows[state[rows] == _ABSENT][0]} has no copy in tier {tier}")
        if np.count_nonzero(readers := self.readers[tier][rows]):
            raise IntegrityError(f"row {rows[readers != 0][0]} is being read in tier {tier}")
        state[rows] = _ABSENT
        freed: list[int] = self.slot[tier][rows].tolist()
        self._reap(rows)
        return freed

    def exit(self, tier: int, now: float, told: list[PageKey] | None = None, hinted: bool = False) -> Exit | None:
        """What compiled loops of others must know to choose copies that leave a tier, and to `drop` them; None without loops.

        They choose none that is held or read, that a pin keeps there at `now`, or that is the last one of a page others build on; with
        `hinted`, none that a hint brought up and nobody used yet. Where there is a tier below, only copies of pages leave that have a READY
        one there or still further down, no colder than a pin allows. The keys of the pages, whose rows may be gone then, go into `told`.
        """
        if (loops := self.loops) is None:
            return None
        return loops, self._row_of, tier, now, told, hinted

    def hold(self, rows: Rows | Sequence[int], tier: int) -> None:
        """A transfer reads these copies: they may not be dropped until `unhold`."""
        self.readers[tier][np.asarray(rows, WHOLE)] += 1

    def unhold(self, rows: Rows | Sequence[int], tier: int) -> None:
        """The transfer is over."""
        self.readers[tier][np.asarray(rows, WHOLE)] -= 1

    # -- holders ---------------------------------------------------------------------------------------------------------------

    def lease(self, rows: Rows) -> None:
        """Count one more holder of each row."""
        if self.loops is None or not self.loops.lease(rows):
            self.leases[rows] += _ONE

    def use(self, rows: Rows) -> None:
        """Count one more use of each row."""
        if self.loops is None or not self.loops.use(rows):
            self.uses[rows] += _ONE

    def release(self, rows: Rows | Sequence[int]) -> list[int]:
        """One holder less; returns device slots of open pages that nobody holds any more, for the caller to free.

        IntegrityError, and nothing released, if one of them is not leased.
        """
        held = np.asarray(rows, WHOLE)
        if self.loops is not None and self.loops.release(held, self._row_of):
            return []
        left = self.leases[held] - _ONE
        if len(left) and left[left.argmin()] < 0:
            raise IntegrityError(f"row {held[left.argmin()]} is not leased")
        self.leases[held] = left
        if np.count_nonzero(left):
            held = held[left == _NOBODY]
        freed = []
        if 1 in (ended := self._open[held]).tobytes():
            freed = self.drop(held[ended], 0)
            held = held[~ended]
        self._reap(held)
        return freed

    def held(self, rows: Rows, tier: int) -> NDArray[np.bool_]:
        """Which of these are leased or being read in `tier`. A lease holds the device copy, or what it will be made from."""
        if self.loops is not None and self.loops.protect(rows, tier, held := np.empty(len(rows), np.bool_)):
            return held
        leased: NDArray[np.bool_] = self.leases[rows] != _NOBODY
        if tier != 0:
            leased &= self.state[0][rows] != _READY
        if np.count_nonzero(readers := self.readers[tier][rows]):
            leased |= readers != _NOBODY
        return leased

    def pin(self, rows: Rows, tier: int, until: float) -> None:
        """Keep these pages in `tier` or warmer until the clock reads `until` (math.inf for ever)."""
        self.pin_tier[rows] = tier
        self.pin_until[rows] = until
        self.pinned_until = max(self.pinned_until, until)

    def unpin(self, rows: Rows) -> None:
        """Forget the pins of these pages."""
        self.pin_until[rows] = -math.inf
