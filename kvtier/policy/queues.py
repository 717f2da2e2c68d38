"""The queues of policies that keep their leaves in some: who is here, who is a leaf, whose place is where.

A queue is a heap of leaves in the order of (worth, time, deepest first) and is put in order lazily: what a page's use changes is written
to columns only, its entry stays behind as a lower bound and is corrected when it comes to the top (CLOCK's second chance is the same
bargain). A page that must come up earlier, or from another queue, gets a new entry at once; an old entry is known by not being the
page's own any more. Inner pages have no entries that count: a page is queued when its last child leaves.

Columns are lists by page id. Owned by one policy (`kvtier.policy.queued`), called under the policy owner's lock.
"""

from __future__ import annotations

import math
from heapq import heapify, heappop, heappush, heapreplace
from typing import Any

import numpy as np

from kvtier.errors import IntegrityError
from kvtier.policy.base import ROOT, EvictionPolicy, Mask, Pages

Entry = tuple[float, float, int]
"""(worth, time in seconds, rank): what leaves earlier sorts first."""

PAGE_BITS = 40
PAGE_MASK = (1 << PAGE_BITS) - 1
"""A rank is the page id less the depth above these bits: at equal worth and time the deepest page sorts first."""
NOBODY = -1
"""No page."""
ABSENT = -1
"""The queue of a page that is not here."""
SPARE_ENTRIES = 64


class Queues(EvictionPolicy):
    """Columns by page id, and heaps of entries: at most about twice as many as there are pages."""

    queues = 1
    """How many queues there are to begin with."""

    def __init__(self) -> None:
        super().__init__()
        self.latest = -math.inf
        """The latest time seen, in seconds."""
        self.full = math.inf
        """Pages that were here when room was last needed: as much as a policy can know of the tier's size. Infinite before that."""
        self.sizes = [0] * self.queues
        """Pages per queue, inner ones included. While a choice is made, without the pages that leave."""
        self._count = 0
        self._columns: list[tuple[list[Any], Any]] = []
        self.worth: list[float] = self.column(0.0)
        self.time: list[float] = self.column(0.0)
        self.queue: list[int] = self.column(ABSENT)
        self.depth: list[int] = self.column(0)
        self.called: list[int] = self.column(0)
        self._parent: list[int] = self.column(ROOT)
        self._children: list[int] = self.column(0)
        self._entry: list[Entry | None] = self.column(None)
        self._heaps: list[list[Entry]] = [[] for _ in range(self.queues)]
        self._log: list[tuple[list[Any], int, Any]] | None = None

    # -- what a policy can use -------------------------------------------------------------------------------------------------

    def column(self, empty: Any) -> list[Any]:
        """A new column with a cell for every page id; `empty` where nothing was written."""
        cells: list[Any] = []
        self._columns.append((cells, empty))
        return cells

    def add_queue(self) -> int:
        """One queue more; its number."""
        self.sizes.append(0)
        self._heaps.append([])
        return len(self.sizes) - 1

    def head(self, queue: int) -> int:
        """The leaf that comes first in `queue`; NOBODY if there is none."""
        heap, entries = self._heaps[queue], self._entry
        while heap:
            entry = heap[0]
            page = entry[2] & PAGE_MASK
            if entries[page] is not entry:
                heappop(heap)
            elif self._children[page]:
                heappop(heap)
                entries[page] = None
            elif entry[0] != self.worth[page] or entry[1] != self.time[page]:
                entries[page] = entry = (self.worth[page], self.time[page], entry[2])
                heapreplace(heap, entry)
            else:
                return page
        return NOBODY

    def move(self, page: int, queue: int, worth: float, time: float) -> None:
        """`page` goes to a place in `queue`, whatever its place was."""
        before = self.queue[page]
        if before != queue:
            self.sizes[before] -= 1
            self.sizes[queue] += 1
            self.change(self.queue, page, queue)
        self.change(self.worth, page, worth)
        self.change(self.time, page, time)
        self._entry[page] = None
        if not self._children[page]:
            self._push(page)

    def change(self, column: list[Any], index: int, value: Any) -> None:
        """Write a column so that it can be undone if a choice is being made."""
        if self._log is not None:
            self._log.append((column, index, column[index]))
        column[index] = value

    def score(self, page: int, now: float, pressure: float) -> float:
        if page not in self:
            raise KeyError(page)
        return self.worth[page]

    def here(self, pages: Pages) -> Mask:
        return np.array([page in self for page in pages.tolist()], np.bool_)

    def __contains__(self, page: object) -> bool:
        return isinstance(page, int) and 0 <= page < len(self.queue) and self.queue[page] != ABSENT

    def __len__(self) -> int:
        return self._count

    # -- columns ---------------------------------------------------------------------------------------------------------------

    def _note(self, now: float) -> None:
        if now > self.latest:
            self.latest = now

    def _require(self, pages: Pages) -> list[int]:
        numbers: list[int] = pages.tolist()
        queue, known = self.queue, len(self.queue)
        for page in numbers:
            if not 0 <= page < known or queue[page] == ABSENT:
                raise KeyError(page)
        return numbers

    def _require_new(self, pages: list[int], parents: list[int], depths: list[int]) -> None:
        highest = max(max(pages, default=0), max(parents, default=0))
        if highest >= len(self.queue):
            self._grow(highest + 1)
        queue = self.queue
        for page, parent, depth in zip(pages, parents, depths, strict=True):
            if page < 0 or parent < ROOT or depth < 0 or page == parent:
                told = f"page {page} with parent {parent} at depth {depth}"
                raise ValueError(f"{told}: ids and depths are 0 or more, a parent is another page or ROOT ({ROOT})")
            if queue[page] != ABSENT:
                raise ValueError(f"page {page} is already in this tier")

    def _grow(self, pages: int) -> None:
        more = max(pages, 2 * len(self.queue)) - len(self.queue)
        for cells, empty in self._columns:
            cells.extend([empty] * more)

    def _push(self, page: int) -> None:
        entry = (self.worth[page], self.time[page], page - (self.depth[page] << PAGE_BITS))
        self._entry[page] = entry
        heappush(self._heaps[self.queue[page]], entry)

    def _take_out(self, page: int) -> None:
        """Its parent may be a leaf now."""
        self._entry[page] = None
        parent = self._parent[page]
        if parent != ROOT:
            self._children[parent] -= 1
            if not self._children[parent] and self.queue[parent] != ABSENT and self._entry[parent] is None:
                self._push(parent)

    def _forget(self, pages: list[int]) -> None:
        for page in pages:
            self.queue[page] = ABSENT
            self._entry[page] = None
        self._count -= len(pages)
        self._sweep_if_wasteful()

    def _sweep_if_wasteful(self) -> None:
        """Drop dead entries once they outnumber the pages; paid for by the calls that left them."""
        if sum(map(len, self._heaps)) > 2 * self._count + SPARE_ENTRIES:
            for heap in self._heaps:
                heap[:] = [entry for entry in heap if self._entry[entry[2] & PAGE_MASK] is entry]
                heapify(heap)

    def check_integrity(self) -> None:
        here = [page for page, queue in enumerate(self.queue) if queue != ABSENT]
        sizes, children = [0] * len(self.sizes), [0] * len(self.queue)
        for page in here:
            sizes[self.queue[page]] += 1
            if self._parent[page] != ROOT:
                children[self._parent[page]] += 1
        if len(here) != self._count or sizes != self.sizes or children != self._children:
            raise IntegrityError("pages, sizes of queues or child counts differ from the pages that are here")
        if sum(map(len, self._heaps)) > 2 * self._count + SPARE_ENTRIES:
            raise IntegrityError("dead entries were kept")
        for queue, heap in enumerate(self._heaps):
            if any(heap[(position - 1) // 2] > entry for position, entry in enumerate(heap) if position):
                raise IntegrityError(f"queue {queue} is out of order")
        for page, entry in enumerate(self._entry):
            if entry is None:
                if self.queue[page] != ABSENT and not self._children[page]:
                    raise IntegrityError(f"page {page} is a leaf and is not queued")
            elif self.queue[page] == ABSENT or not any(other is entry for other in self._heaps[self.queue[page]]):
                raise IntegrityError(f"page {page} is not here or has its entry in another queue")
            elif (entry[0], entry[1]) > (self.worth[page], self.time[page]):
                raise IntegrityError(f"page {page} is queued too high")
