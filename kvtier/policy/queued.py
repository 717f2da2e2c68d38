"""What policies share that keep their leaves in queues: whose turn it is, and how a choice is taken back.

A choice takes pages out one after the other, each by the policy's word, as if they had left; they are asked about together at the end, and
where one may not leave, all is put back and each is asked about in its turn. The queues are those of `kvtier.policy.queues`.

Called under the policy owner's lock.
"""

from __future__ import annotations

from abc import abstractmethod
from heapq import heappop
from typing import Any

import numpy as np

from kvtier.policy.base import ROOT, Pages, Protection
from kvtier.policy.queues import NOBODY, Queues


class QueuedPolicy(Queues):
    """An eviction policy that says where pages queue (`entered`, `used`) and whose turn it is (`candidate`); the rest is here.

    Subclasses read the columns `worth`, `time`, `queue`, `depth` and `called` (the page's name), and write the first two for pages that
    are here. Lowering either, so that a page must come up earlier, takes `move`; so does changing queues.
    """

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
