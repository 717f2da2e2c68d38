"""Least recently used, leaves first: what a radix tree's leaf LRU does (SGLang, vLLM's free list freed tail first).

A strong default for prefix caches: on the public Mooncake conversation trace nothing online beats it once a tier holds a fifth of the
distinct blocks. Not for small tiers in front of much one-shot traffic, where counts that outlive eviction help.

The order is that of `kvtier.policy.recency`; this is the choice: who leaves at a moment's turn, who waits for its children or is passed
over as protected, and how all of it is taken back. Where the compiled loops of `kvtier.columns` are, they do the usual cases, to the same
bits.
"""

from __future__ import annotations

import math
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from kvtier import columns
from kvtier.policy.base import ROOT, Mask, Pages, Protection
from kvtier.policy.recency import PAGE_MASK, Entry, Recency

LAST = (math.inf, 0)
"""An entry after all others."""

_NO_PAGES = np.empty(0, np.int64)
_ZERO, _ONE = np.array(0), np.array(1)


class _Choice:
    """Pages on their way out, in leaving order, and all it takes to bring them back."""

    __slots__ = ("answers", "front", "head", "left", "passed", "popped", "protected", "sorted", "wanted")

    def __init__(self, wanted: int, protected: Protection, head: int, sorted: int, front: float) -> None:
        self.wanted = wanted
        """Pages still to be found."""
        self.protected = protected
        self.head, self.sorted, self.front = head, sorted, front
        """The journal as it was."""
        self.left: list[tuple[Pages, Pages, float | NDArray[np.float64]]] = []
        """Keys of pages that are out, these pages, and when they were used last."""
        self.popped: list[Entry] = []
        """Entries taken from the heap, of pages that left or are protected."""
        self.passed: list[Entry] = []
        """Entries of protected pages, from wherever."""
        self.answers: dict[int, bool] = {}
        """What was said about pages that may come up again: nobody is asked twice."""

    @property
    def pages(self) -> Pages:
        if len(self.left) == 1:
            return self.left[0][1]
        return np.concatenate([_NO_PAGES, *(pages for _, pages, _ in self.left)])

    def add(self, keys: Pages, pages: Pages, time: float | NDArray[np.float64]) -> None:
        self.left.append((keys, pages, time))
        self.wanted -= len(keys)

    def ask(self, pages: Pages) -> Mask:
        if not self.answers or self.answers.keys().isdisjoint(pages.tolist()):
            return self.protected(pages)
        unknown = [page for page in pages.tolist() if page not in self.answers]
        if unknown:
            self.answers.update(zip(unknown, self.protected(np.array(unknown)).tolist(), strict=True))
        return np.array([self.answers[page] for page in pages.tolist()])


class LRU(Recency):
    """The score is the time of the last touch, in seconds; pressure plays no part. Ties: deeper first."""

    name = "lru"

    def evict(self, count: int, protected: Protection, now: float, pressure: float) -> Pages | None:
        if count > self._count:
            return None
        choice = self._choose(count, protected)
        if choice.wanted:
            self._put_back(choice)
            return None
        for entry in choice.passed:
            heappush(self._late, entry)
        self._skip_past()
        self._note(now)
        return choice.pages

    @property
    def gives_way(self) -> bool:
        return self._loops is not None

    def give_way(self, count: int, exit: columns.Exit, now: float) -> tuple[Pages, list[int]] | None:
        if self._loops is None or not 0 < count <= self._count:
            return None
        pages = np.empty(count, columns.WHOLE)
        given = self._loops.give_way(*exit, pages, self._head, self._sorted, self._tail, self._front, self._late)
        if given is None:
            return None
        self._head, self._sorted, self._front, slots = given
        self._count -= count
        self._sweep_if_wasteful()
        self._note(now)
        return pages, slots

    def peek(self, count: int, protected: Protection, now: float, pressure: float) -> Pages:
        choice = self._choose(count, protected)
        self._put_back(choice)
        return choice.pages

    def _skip_past(self) -> None:
        """The journal's next entry is alive, if the moment has one."""
        while self._head < self._sorted and self._last[self._keys[self._head] & PAGE_MASK] != self._front:
            self._head += 1

    def _choose(self, count: int, protected: Protection) -> _Choice:
        """Takes up to `count` pages out, in leaving order. If `protected` raises, none is out."""
        if count < 0:
            raise ValueError(f"count is {count}; it must be 0 or more")
        choice = _Choice(min(count, self._count), protected, self._head, self._sorted, self._front)
        try:
            while choice.wanted:
                more = self._head < self._sorted or self._next_moment()
                before = LAST
                if self._late and more:
                    before = (self._front, int(self._keys[self._head]))
                if self._late and self._late[0] <= before:
                    entry = heappop(self._late)
                    choice.popped.append(entry)
                    if not self._step(entry, min(self._late[0], before) if self._late else before, choice):
                        choice.popped.pop()
                elif more:
                    self._stride(choice)
                else:
                    break
        except BaseException:
            self._put_back(choice)
            raise
        return choice

    def _stride(self, choice: _Choice) -> None:
        """The next pages of the sorted moment: as many at once as leave one after the other, else a few one by one."""
        front, start = self._front, self._head
        if self._loops is not None:
            self._stride_in_loops(self._loops, choice)
            return
        keys = self._keys[start : min(start + choice.wanted, self._sorted)]
        if self._late and self._late[0][0] == front:
            keys = keys[: keys.searchsorted(self._late[0][1])]
        read, positions = len(keys), None
        pages = keys & PAGE_MASK
        last = self._last[pages]
        if last[last.argmin()] != front or last[last.argmax()] != front:
            positions = (last == front).nonzero()[0]
            keys, pages = keys[positions], pages[positions]
        parents = self._parent[pages]
        np.subtract.at(self._children, parents, _ONE)
        leave = 0
        try:
            leave = self._leading(choice, pages, parents)
        finally:
            if leave < len(keys):
                np.add.at(self._children, parents[leave:], _ONE)
        if leave == read:  # all of them: the usual case
            choice.add(keys, pages, front)
            self._head = start + read
            self._forget(pages, parents)
            return
        if leave:
            choice.add(keys[:leave], pages[:leave], front)
            self._forget(pages[:leave], parents[:leave])
        else:
            leave = self._pass(choice, keys)
        if leave < len(keys):
            self._head = start + (leave if positions is None else int(positions[leave]))
        else:
            self._head = start + read

    def _stride_in_loops(self, loops: columns.OrderLoops, choice: _Choice) -> None:
        front, start = self._front, self._head
        stop = min(start + choice.wanted, self._sorted)
        if self._late and self._late[0][0] == front:
            stop = start + int(self._keys[start:stop].searchsorted(self._late[0][1]))
        keys, pages = np.empty(stop - start, np.int64), np.empty(stop - start, np.int64)
        count, leave = loops.leaving(start, stop, front, keys, pages)
        if leave:
            leaving = pages if leave == len(pages) else pages[:leave]
            stays = choice.ask(leaving)
            if 1 in stays.tobytes():
                choice.answers.update(zip(leaving.tolist(), stays.tolist(), strict=True))
                leave = int(stays.argmax())
        if leave:
            if leave < len(keys):
                choice.add(keys[:leave], pages[:leave], front)
                self._leave(loops, pages[:leave])
            else:
                choice.add(keys, pages, front)
                self._leave(loops, pages)
        elif count:
            leave = self._pass(choice, keys[:count])
        # No entry of a sorted moment is there twice.
        self._head = stop if leave == count else start + int(self._keys[start:stop].searchsorted(keys[leave]))

    def _leave(self, loops: columns.OrderLoops, pages: Pages) -> None:
        """As `_take_out` for pages of which only the last may have a parent that waits for it."""
        waiting = loops.leave(pages)
        self._count -= len(pages)
        if waiting != ROOT:
            self._free(np.array([waiting]))

    def _leading(self, choice: _Choice, pages: Pages, parents: Pages) -> int:
        """How many of `pages` leave one after the other. Child counts are those after all of them left."""
        leave = len(pages)
        children = self._children[pages]
        if np.count_nonzero(children):
            leave = int((children != _ZERO).argmax())
        waiting = self._unqueued[parents]
        if 1 in waiting.tobytes():  # such a parent's turn is before that of the next page
            leave = min(leave, int(waiting.argmax()) + 1)
        if leave:
            stays = choice.ask(pages[:leave])
            if 1 in stays.tobytes():
                choice.answers.update(zip(pages[:leave].tolist(), stays.tolist(), strict=True))
                leave = int(stays.argmax())
        return leave

    def _pass(self, choice: _Choice, keys: Pages) -> int:
        """Steps over the first pages that cannot leave; how many they are."""
        if self._loops is not None and not choice.answers:
            return self._loops.step_over(keys)
        for passed, key in enumerate(keys.tolist()):
            page = key & int(PAGE_MASK)
            if self._children[page]:
                self._unqueued[page] = True
            elif choice.answers.get(page):
                choice.passed.append((self._front, key))
            else:
                return passed
        return len(keys)

    def _step(self, entry: Entry, before: Entry, choice: _Choice) -> bool:
        """A page of the heap and those before it that wait only for it, if its entry is alive and no child keeps it.

        They leave up to the first that is protected, or comes after the entry `before`. Whether the entry is to be kept for later.
        """
        time, key = entry
        page = key & int(PAGE_MASK)
        if self._last[page] != time or self._key[page] != key:
            return False
        if self._children[page]:
            self._unqueued[page] = True
            return False
        keys, times = self._chain(page, before, choice.wanted)
        pages = keys & PAGE_MASK
        leave, stays = len(pages), choice.ask(pages)
        if 1 in stays.tobytes():
            choice.answers.update(zip(pages.tolist(), stays.tolist(), strict=True))
            leave = int(stays.argmax())
        if not leave:
            choice.passed.append(entry)
            return True
        choice.add(keys[:leave], pages[:leave], times[:leave])
        choice.popped += zip(times[1:leave].tolist(), keys[1:leave].tolist(), strict=True)
        if self._loops is None:
            self._take_out(pages[:leave])
        else:
            self._leave(self._loops, pages[:leave])
        return True

    def _chain(self, page: int, before: Entry, most: int) -> tuple[Pages, NDArray[np.float64]]:
        """Keys and last touches of `page` and of pages that come to the top of the heap as the one before leaves; `most` in all."""
        if self._loops is not None:
            keys, times = np.empty(most, np.int64), np.empty(most)
            count = self._loops.chain(page, *before, keys, times)
            return keys[:count], times[:count]
        chain = [(float(self._last[page]), int(self._key[page]))]
        while len(chain) < most:
            page = int(self._parent[page])
            entry = (float(self._last[page]), int(self._key[page]))
            if not self._unqueued[page] or self._children[page] != 1 or entry >= before:
                break
            chain.append(entry)
        return np.array([key for _, key in chain]), np.array([time for time, _ in chain])

    def _put_back(self, choice: _Choice) -> None:
        """Undo a choice. The journal's head goes back to where the entries are that were read; entries of the heap return to it."""
        for keys, pages, time in choice.left:
            np.add.at(self._children, self._parent[pages], _ONE)
            self._count += len(pages)
            self._key[pages] = keys
            self._last[pages] = time
        self._head, self._sorted = choice.head, choice.sorted
        self._front = choice.front
        for entry in choice.popped:
            heappush(self._late, entry)
