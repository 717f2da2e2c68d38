"""What policies share that keep their leaves in queues: who is here, who is a leaf, whose turn it is, and how a choice is taken back.

A queue is a heap of leaves in the order of (worth, time, deepest first) and is put in order lazily: what a page's use changes is written
to columns only, its entry stays behind as a lower bound and is corrected when it comes to the top (CLOCK's second chance is the same
bargain). A page that must come up earlier, or from another queue, gets a new entry at once; an old entry is known by not being the
page's own any more. Inner pages have no entries that count: a page is queued when its last child leaves.

Columns are lists by page id. Owned by one policy, called under the policy owner's lock.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from heapq import heapify, heappop, heappush, heapreplace
from typing import Any

import numpy as np

from kvtier.errors import IntegrityError
from kvtier.policy.base import ROOT, EvictionPolicy, Mask, Pages, Protection

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


class QueuedPolicy(EvictionPolicy):
    """An eviction policy that says where pages queue (`entered`, `used`) and whose turn it is (`candidate`); the rest is here.

    Subclasses read the columns `worth`, `time`, `queue`, `depth` and `called` (the page's name), and write the first two for pages that
    are here. Lowering either, so that a page must come up earlier, takes `move`; so does changing queues. Entries are at most about
    twice the pages.
    """

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

    # -- what a policy says ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def entered(self, pages: list[int]) -> None:
        """`pages` came at `self.latest`, which is their `time`; their `worth` is 0 and their `queue` 0 unless this says otherwise."""

    @abstractmethod
    def used(self, pages: list[int]) -> None:
        """`pages`, which are here, were used at `self.latest`. Writes worths and times that do not fall, or calls `move`."""

    def left(self, pages: list[int], evicted: bool) -> None:
        """`pages` are leaving; their columns still say what they were, and `len(self)` and `sizes` still count them unless `evicted`."""
        return

    def candidate(self) -> int:
        """The leaf whose turn it is, found by `head`; NOBODY if there is none.

        May change its mind about pages on the way, by `move` and `change` only: they are undone if nobody leaves in the end.
        """
        return self.head(0)

    def asked(self, now: float) -> None:
        """A choice begins, at time `now`, or begins again: what `candidate` changed was undone."""
        return

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

    # -- the contract ----------------------------------------------------------------------------------------------------------

    def insert(self, pages: Pages, parents: Pages, depths: Pages, now: float) -> None:
        coming, before, deep = pages.tolist(), parents.tolist(), depths.tolist()
        self._require_new(coming, before, deep)
        names = self.names(pages).tolist()
        self._note(now)
        latest, queue, children = self.latest, self.queue, self._children
        for page, parent, depth, name in zip(coming, before, deep, names, strict=True):
            queue[page] = 0
            self._parent[page] = parent
            self.depth[page] = depth
            self.called[page] = name
            self.worth[page] = 0.0
            self.time[page] = latest
            if parent != ROOT:
                children[parent] += 1
        self._count += len(coming)
        self.sizes[0] += len(coming)
        self.entered(coming)
        for page in coming:
            if not children[page] and self._entry[page] is None:
                self._push(page)

    def touch(self, pages: Pages, now: float) -> None:
        touched = self._require(pages)
        self._note(now)
        self.used(touched)
        self._sweep_if_wasteful()

    def remove(self, pages: Pages) -> None:
        leaving = self._require(pages)
        self.left(leaving, evicted=False)
        for page in leaving:
            self.sizes[self.queue[page]] -= 1
            self._take_out(page)
        self._forget(leaving)

    def evict(self, count: int, protected: Protection, now: float, pressure: float) -> Pages | None:
        if count > self._count:
            return None
        choice = self._choose(count, protected, now)
        if len(choice.out) < count:
            self._put_back(choice)
            return None
        self._note(now)
        self.full = self._count
        for page in choice.passed:
            self._push(page)
        self.left(choice.out, evicted=True)
        self._forget(choice.out)
        return np.array(choice.out, np.int64)

    def peek(self, count: int, protected: Protection, now: float, pressure: float) -> Pages:
        choice = self._choose(count, protected, now)
        self._put_back(choice)
        return np.array(choice.out, np.int64)

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

    # -- choosing --------------------------------------------------------------------------------------------------------------

    def _choose(self, count: int, protected: Protection, now: float) -> _Choice:
        """Up to `count` pages in leaving order; until they are forgotten or put back they only look as if they had left."""
        if count < 0:
            raise ValueError(f"count is {count}; it must be 0 or more")
        choice = _Choice(list(self.sizes))
        count = min(count, self._count)
        now = max(now, self.latest)
        self._log = choice.log
        try:
            self._attempt(choice, count, now)
            if choice.out and (stays := protected(np.array(choice.out))).any():
                # Rare: what was recently used, and so is protected, seldom leads a queue. Again, with these answers, one by one.
                choice.answers = dict(zip(choice.out, stays.tolist(), strict=True))
                self._put_back(choice)
                choice.out, choice.protected, self._log = [], protected, choice.log
                self._attempt(choice, count, now)
        except BaseException:
            self._put_back(choice)
            raise
        finally:
            self._log = None
        return choice

    def _attempt(self, choice: _Choice, count: int, now: float) -> None:
        self.asked(now)
        while len(choice.out) < count and (page := self.candidate()) != NOBODY:
            queue = self.queue[page]
            if self._heaps[queue][0] is self._entry[page]:
                heappop(self._heaps[queue])
            if choice.stays(page):
                self._entry[page] = None
                choice.passed.append(page)
                continue
            choice.out.append(page)
            self.sizes[queue] -= 1
            self._take_out(page)

    def _put_back(self, choice: _Choice) -> None:
        """Undo a choice; entries of pages that became leaves by it stay behind, and are dropped when they come up."""
        self._log = None
        for column, index, value in reversed(choice.log):
            column[index] = value
        self.sizes[:] = choice.sizes
        moved = [index for column, index, _ in choice.log if column is self.queue or column is self.time]
        for page in choice.out:
            if (parent := self._parent[page]) != ROOT:
                self._children[parent] += 1
        for page in {*choice.out, *choice.passed, *moved}:
            self._entry[page] = None
            if not self._children[page]:
                self._push(page)
        choice.log.clear()
        choice.passed.clear()
        self._sweep_if_wasteful()

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


class _Choice:
    """Pages on their way out, in leaving order, and all it takes to bring them back."""

    __slots__ = ("answers", "log", "out", "passed", "protected", "sizes")

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes
        """Of the queues, before."""
        self.out: list[int] = []
        self.passed: list[int] = []
        """Protected pages whose turn it was."""
        self.log: list[tuple[list[Any], int, Any]] = []
        """Columns, places and what was written there before."""
        self.answers: dict[int, bool] = {}
        """What was said about pages that were asked about: nobody is asked twice."""
        self.protected: Protection | None = None
        """Whom to ask about each page as its turn comes; None: all of them are asked about at the end."""

    def stays(self, page: int) -> bool:
        if self.protected is None:
            return False
        if page not in self.answers:
            self.answers[page] = bool(self.protected(np.array([page]))[0])
        return self.answers[page]
