"""Which pages of a tier are leaves, and in what order leaves would go: the mechanism under every policy here.

Pages that share a *group* differ only in when they were last used, so inside a group the oldest goes first whatever the clock says. A
policy's score is a function of (group, last touch), never falling as the last touch grows; victims are found by comparing group heads
only. Each group is a heap that is put in order lazily: a touch writes a column and leaves the page's heap entry behind as a lower bound,
corrected when it reaches the top. (The idea of re-queueing on demand is old: CLOCK's second chance is the same bargain.)

Columns are indexed by page id. Owned by one policy, called under the policy owner's lock.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from heapq import heapify, heappop, heappush

import numpy as np

from kvtier.errors import IntegrityError
from kvtier.policy.base import ROOT, Mask, Pages, Protection

Value = Callable[[int, float], float]
"""(group, last touch in seconds) -> score. For equal groups a later touch never scores lower."""

Entry = tuple[float, int, int, int]
"""(last touch, -depth, page, ticket): at equal recency the deeper page sorts first, so a suffix leaves before its prefix."""

NO_TICKET = 0
SPARE_ENTRIES = 64


class Leaves:
    """Residency, child counts and the leaving order of one tier's pages.

    Children are counted by the parent's id whether or not the parent is here, so pages may arrive and leave in any order. Heap entries are
    at most twice the pages plus a constant after any `remove` or `lower_group`.
    """

    def __init__(self) -> None:
        self.latest = -math.inf
        """The latest time seen; times are seconds and never run backwards for a page."""
        self._resident = bytearray()
        self._parent = array("q")
        self._depth = array("q")
        self._children = array("q")
        self._group = array("q")
        self._last = array("d")
        self._ticket = array("q")
        self._count = 0
        self._heaps: dict[int, list[Entry]] = {}
        self._entries = 0
        self._issued = NO_TICKET

    def __len__(self) -> int:
        return self._count

    def __contains__(self, page: object) -> bool:
        return isinstance(page, int) and 0 <= page < len(self._resident) and self._resident[page] == 1

    def note(self, now: float) -> None:
        """The clock shows `now`. An earlier time than the latest, or NaN, changes nothing."""
        if now > self.latest:
            self.latest = now

    def group(self, page: int) -> int:
        """The group of `page`. KeyError if it is not here."""
        self._require(page)
        return self._group[page]

    def last_touch(self, page: int) -> float:
        """When `page` was last used, in seconds. KeyError if it is not here."""
        self._require(page)
        return self._last[page]

    def here(self, pages: Pages) -> Mask:
        """Which of `pages` are in this tier."""
        return np.array([page in self for page in pages.tolist()], np.bool_)

    def require(self, pages: Pages) -> list[int]:
        """`pages` as plain numbers. KeyError naming the first that is not here."""
        numbers: list[int] = pages.tolist()
        for page in numbers:
            self._require(page)
        return numbers

    def require_new(self, page: int, parent: int) -> None:
        """ValueError if `page` is here already or could not be, or is its own parent."""
        if page in self:
            raise ValueError(f"page {page} is already in this tier")
        if page < 0 or parent < ROOT or page == parent:
            raise ValueError(f"page {page} with parent {parent}: ids are 0 or more, the parent another page or ROOT ({ROOT})")

    def insert(self, page: int, parent: int, depth: int, now: float, group: int) -> None:
        """`page` arrives in `group`, last touched `now`. ValueError if it is here already or is its own parent. O(log n)."""
        self.require_new(page, parent)
        self._grow(max(page, parent) + 1)
        self._parent[page] = parent
        self._depth[page] = depth
        self._group[page] = group
        self.note(now)
        self._last[page] = self.latest
        self._link(page)

    def touch(self, page: int, now: float) -> None:
        """`page` was used. KeyError if it is not here. O(1): its heap entry is corrected when it comes up."""
        self._require(page)
        self.note(now)
        self._last[page] = self.latest

    def remove(self, page: int) -> None:
        """`page` leaves; its children, if any, stay. KeyError if it is not here."""
        self._require(page)
        freed = self._unlink(page)
        if freed != ROOT:
            self._push(freed)
        self._sweep_if_wasteful()

    def raise_group(self, page: int, group: int) -> None:
        """`page` moves to a group that scores no lower at any time. O(1)."""
        self._require(page)
        self._group[page] = group

    def lower_group(self, page: int, group: int) -> None:
        """`page` moves to a group that may score lower. O(log n): an entry left in the old group would come up too late."""
        self._require(page)
        self._group[page] = group
        self._ticket[page] = NO_TICKET
        if self._children[page] == 0:
            self._push(page)
        self._sweep_if_wasteful()

    def take(self, count: int, protected: Protection, value: Value) -> list[int] | None:
        """Removes and returns the `count` leaves of lowest value, a parent following its last child; None and nothing done if too few.

        Also nothing done if `protected` or `value` raises. O((count + stale + protected met + groups) log n), where every stale entry met
        was left by one earlier insert, touch or regrouping. ValueError for a negative count.
        """
        if not self._possible(count):
            return None
        victims: list[int] = []
        complete = False
        try:
            self._choose(victims, count, protected, value, math.inf)
            complete = len(victims) == count
        finally:
            if not complete:
                self._put_back(victims)
        return victims if complete else None

    def first(self, count: int, protected: Protection, value: Value, below: float = math.inf) -> list[int]:
        """Up to `count` pages `take` would remove, in that order, up to the first whose value is not under `below`. They stay."""
        self._possible(count)
        chosen: list[int] = []
        try:
            self._choose(chosen, count, protected, value, below)
        finally:
            self._put_back(chosen)
        return chosen

    def check_integrity(self, value: Value) -> None:
        """IntegrityError if counts, columns and heaps disagree or an entry would come up too late. Looks at everything."""
        here = [page for page, flag in enumerate(self._resident) if flag]
        if len(here) != self._count:
            raise IntegrityError(f"{len(here)} pages are here, {self._count} were counted")
        children = array("q", bytes(8 * len(self._children)))
        for page in here:
            if self._parent[page] != ROOT:
                children[self._parent[page]] += 1
        if children != self._children:
            raise IntegrityError("child counts differ from the pages that are here")
        if sum(map(len, self._heaps.values())) != self._entries or not all(self._heaps.values()):
            raise IntegrityError("the number of heap entries is wrong or an empty heap was kept")
        queued: set[int] = set()
        for group, heap in self._heaps.items():
            for position, (last, _, page, ticket) in enumerate(heap):
                if heap[(position - 1) // 2 if position else 0] > heap[position]:
                    raise IntegrityError(f"the heap of group {group} is out of order")
                if self._ticket[page] != ticket:
                    continue
                if page in queued or not self._resident[page]:
                    raise IntegrityError(f"page {page} is queued twice or not here")
                if value(group, last) > value(self._group[page], self._last[page]):
                    raise IntegrityError(f"page {page} is queued too high")
                queued.add(page)
        for page, ticket in enumerate(self._ticket):
            is_leaf = self._resident[page] == 1 and self._children[page] == 0
            if (is_leaf or ticket != NO_TICKET) and page not in queued:
                raise IntegrityError(f"page {page} is not queued")

    def _choose(self, chosen: list[int], count: int, protected: Protection, value: Value, below: float) -> None:
        """Moves up to `count` pages out of the tier into `chosen`. On an exception `chosen` holds exactly the pages that are out."""
        heaps = self._heaps
        frontier = [(value(group, heap[0][0]), heap[0], group) for group, heap in heaps.items()]
        heapify(frontier)
        passed_over: list[tuple[int, Entry]] = []

        def offer(group: int) -> None:
            # Every group's current head is on the frontier; heads that were overtaken are recognised there and dropped.
            heap = heaps.get(group)
            if heap:
                heappush(frontier, (value(group, heap[0][0]), heap[0], group))

        try:
            while frontier and len(chosen) < count:
                score, entry, group = heappop(frontier)
                if group not in heaps or heaps[group][0] is not entry:
                    continue
                last, _, page, ticket = entry
                if ticket != self._ticket[page]:
                    self._pop(group)
                elif self._children[page] > 0:
                    self._pop(group)
                    self._ticket[page] = NO_TICKET
                elif group != self._group[page] or last != self._last[page]:
                    self._pop(group)
                    self._push(page)
                    offer(self._group[page])
                elif score >= below:
                    break
                elif protected(np.array([page]))[0]:
                    self._pop(group)
                    passed_over.append((group, entry))
                else:
                    self._pop(group)
                    chosen.append(page)
                    freed = self._unlink(page)
                    if freed != ROOT:
                        self._push(freed)
                        offer(self._group[freed])
                offer(group)
        finally:
            for group, entry in passed_over:
                self._push_entry(group, entry)

    def _put_back(self, chosen: list[int]) -> None:
        for page in chosen:
            self._link(page)

    def _possible(self, count: int) -> bool:
        if count < 0:
            raise ValueError(f"count is {count}; it must be 0 or more")
        return count <= self._count

    def _require(self, page: int) -> None:
        if page not in self:
            raise KeyError(page)

    def _link(self, page: int) -> None:
        self._resident[page] = 1
        self._count += 1
        parent = self._parent[page]
        if parent != ROOT:
            self._children[parent] += 1
        if self._children[page] == 0:
            self._push(page)

    def _unlink(self, page: int) -> int:
        """The parent if that made it a leaf without a heap entry, else ROOT."""
        self._resident[page] = 0
        self._count -= 1
        self._ticket[page] = NO_TICKET
        parent = self._parent[page]
        if parent == ROOT:
            return ROOT
        self._children[parent] -= 1
        unqueued = self._resident[parent] == 1 and self._ticket[parent] == NO_TICKET
        return parent if unqueued and self._children[parent] == 0 else ROOT

    def _push(self, page: int) -> None:
        self._issued += 1
        self._ticket[page] = self._issued
        self._push_entry(self._group[page], (self._last[page], -self._depth[page], page, self._issued))

    def _push_entry(self, group: int, entry: Entry) -> None:
        heappush(self._heaps.setdefault(group, []), entry)
        self._entries += 1

    def _pop(self, group: int) -> None:
        heap = self._heaps[group]
        heappop(heap)
        self._entries -= 1
        if not heap:
            del self._heaps[group]

    def _sweep_if_wasteful(self) -> None:
        """Drops dead entries once they outnumber the pages; paid for by the calls that left them."""
        if self._entries <= 2 * self._count + SPARE_ENTRIES:
            return
        for group, heap in list(self._heaps.items()):
            alive = [entry for entry in heap if self._ticket[entry[2]] == entry[3]]
            heapify(alive)
            if alive:
                self._heaps[group] = alive
            else:
                del self._heaps[group]
        self._entries = sum(map(len, self._heaps.values()))

    def _grow(self, size: int) -> None:
        if size <= len(self._resident):
            return
        more = max(size, 2 * len(self._resident)) - len(self._resident)
        self._resident.extend(bytes(more))
        for column in (self._parent, self._depth, self._children, self._group, self._last, self._ticket):
            column.frombytes(bytes(column.itemsize * more))
