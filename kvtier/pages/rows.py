"""Rows of the page table: how they are made for pages that follow each other, linked, and gone when nothing is left of them.

A row is an open page's, or has the key of its page. A row without any copy but with children is *hollow*: it is kept for the link alone and
disappears with its last child. State: the columns of `PageColumns`; called as `PageTable` is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from kvtier.columns import WHOLE
from kvtier.errors import IntegrityError
from kvtier.keys import PageKey
from kvtier.pages.columns import ABSENT, HOLLOW, NO_ROW, NO_TIER, READY, SIZE, UNUSED, WRITING, PageColumns, Rows
from kvtier.tiers.base import PageId

# Arrays without dimensions, as in `table`.
_ONE, _NOBODY = np.array(1), np.array(0)
_NO_COPIES = np.array(0, np.uint64)
_NO_ROW, _NO_TIER = np.array(NO_ROW), np.array(NO_TIER)
_NO_KEY = np.array(None)
_FALSE, _TRUE = np.array(False), np.array(True)
_NOT_PINNED, _NO_ATTENTION = np.array(-math.inf), np.array(math.nan)


class PageRows(PageColumns):
    """Columns whose rows come and go: pages, one by one or many that follow each other, and open pages until they are full."""

    def add(self, page: PageId, parent: int = NO_ROW) -> int:
        """The row of `page`, made if it is new. `parent` is the row of the page before it, if that is known.

        A page whose parent was unknown (an orphan found on disk) is linked when its parent appears: hollow parents are made for it.
        """
        row = self._row_of.get(page.key)
        if row is None:
            if page.depth > 0 and parent == NO_ROW:
                parent = self._hollow(page.parent, page.depth - 1)
            return int(self._new_chain([page.key], page.parent, page.depth, parent)[0])
        if self.parent[row] == NO_ROW:
            self.parent_key[row] = page.parent
            if page.depth > 0:
                self._link(row, self._hollow(page.parent, page.depth - 1) if parent == NO_ROW else parent)
        return row

    def add_chain(self, keys: Sequence[PageKey], before: PageKey, depth: int, parent: int = NO_ROW) -> Rows:
        """As `add` for pages that follow each other: rows of all `keys`, the first at `depth` after the page `before` (row `parent`)."""
        if self.loops is not None and (added := self._add_chain(keys, before, depth, parent)) is not None:
            return added
        known = np.fromiter(iter(map(self._row_of.get, keys).__next__, None), np.int64)
        if count := len(known):
            for index in np.flatnonzero(self.parent[known] == _NO_ROW).tolist():
                page = PageId(keys[index], keys[index - 1] if index else before, depth + index)
                self.add(page, int(known[index - 1]) if index else parent)
            if count == len(keys):
                return known
            before, depth, parent, keys = keys[count - 1], depth + count, int(known[-1]), keys[count:]
        elif depth > 0 and parent == NO_ROW:
            parent = self._hollow(before, depth - 1)
        if not any(map(self._row_of.__contains__, keys)):
            fresh = self._new_chain(keys, before, depth, parent)
            return np.concatenate((known, fresh)) if count else fresh
        rows = known.tolist()
        for key in keys:
            parent = self.add(PageId(key, before, depth), parent)
            before, depth = key, depth + 1
            rows.append(parent)
        return np.array(rows, np.int64)

    def open(self, parent: int, slot: int, depth: int) -> int:
        """A new open page on device slot `slot`, with no tokens yet and one lease."""
        row = int(self._take_rows(1)[0])
        self._open[row] = True
        self.depth[row] = depth
        self.state[0, row] = READY
        self.slot[0, row] = slot
        self.leases[row] = 1
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
        self._reap_up(row)
        return sealed, slot

    # -- inside ----------------------------------------------------------------------------------------------------------------

    def _take_rows(self, count: int) -> Rows:
        """Rows nobody uses, as new. What a row must have lost before it was given up (copies, holders, children) is not set again."""
        counts, held = self.counts, self.counts[UNUSED]
        left = counts[UNUSED] = max(0, held - count)
        rows = self._free[left:held][::-1].copy()
        if fresh := count - len(rows):
            size = counts[SIZE]
            if size + fresh >= len(self.parent):
                self._grow(max(size + fresh, 2 * size))
            rows = np.concatenate((rows, np.arange(size, size + fresh)))
            counts[SIZE] += fresh
        self._used[rows] = _TRUE
        self.uses[rows] = _NOBODY
        self.pin_until[rows] = _NOT_PINNED
        self.attention[rows] = _NO_ATTENTION
        self.prefetched_from[rows] = _NO_TIER
        return rows

    def _add_chain(self, keys: Sequence[PageKey], before: PageKey, depth: int, parent: int) -> Rows | None:
        """As `add_chain` where no known key follows an unknown one, there is room and no link has to be made; else None."""
        loops, rows = self.loops, np.empty(len(keys), WHOLE)
        if loops is None:
            return None
        return None if loops.add_chain(self._row_of, keys, before, depth, parent, rows) < 0 else rows

    def _new_chain(self, keys: Sequence[PageKey], before: PageKey, depth: int, parent: int) -> Rows:
        rows = self._take_rows(len(keys))
        names = np.empty(len(keys), np.object_)
        names[:] = keys
        for key, row in zip(keys, rows.tolist(), strict=True):
            self._row_of[key] = row
        self.key[rows] = names
        self.depth[rows] = np.arange(depth, depth + len(keys))
        first, others = rows[0], rows[1:]
        self.parent_key[first], self.parent_key[others] = before, names[:-1]
        self.parent[first], self.parent[others] = parent, rows[:-1]
        self.children[rows[:-1]] = _ONE
        self.children[parent] += 1
        return rows

    def _hollow(self, key: PageKey, depth: int) -> int:
        row = self._row_of.get(key)
        if row is None:
            row = int(self._new_chain([key], b"", depth, NO_ROW)[0])
            self.counts[HOLLOW] = True
        return row

    def _link(self, row: int, parent: int) -> None:
        self.parent[row] = parent
        self.children[parent] += 1

    def _reap(self, rows: Rows) -> None:
        """Remove those of `rows` of which nothing is left, and then the hollow ancestors that they alone kept."""
        copies = self._copies[rows]
        left = np.count_nonzero(copies)
        if left == len(rows):
            return
        empty = rows[copies == _NO_COPIES] if left else rows
        if np.count_nonzero(leases := self.leases[empty]):
            empty = empty[leases == _NOBODY]
            self.counts[HOLLOW] = True
        parents = self.parent[empty]
        np.subtract.at(self.children, parents, _ONE)
        if np.count_nonzero(self.children[empty]):  # some keep children: then row by row
            np.add.at(self.children, parents, _ONE)
            for row in empty.tolist():
                self._reap_up(row)
            self.counts[HOLLOW] = True
            return
        self._bury(empty)
        for parent in parents[self._used[parents]].tolist():
            self._reap_up(parent)

    def _reap_up(self, row: int) -> None:
        while self._used[row] and not self._copies[row] and not self.children[row] and not self.leases[row]:
            parent = int(self.parent[row])
            self.children[parent] -= 1
            self._bury(np.array([row]))
            row = parent

    def _bury(self, rows: Rows) -> None:
        for key in self.key[rows].tolist():
            if key is not None:
                del self._row_of[key]
        self.key[rows] = self.parent_key[rows] = _NO_KEY
        self.parent[rows] = _NO_ROW
        self._used[rows] = _FALSE
        self._open[rows] = _FALSE
        unused = self.counts[UNUSED]
        self._free[unused : unused + len(rows)] = rows
        self.counts[UNUSED] = unused + len(rows)
