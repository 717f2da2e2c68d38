"""Which pages of a tier are leaves, and which leaf has the lowest score: for policies whose scores are numbers that change.

A score is whatever the policy wrote into the column `score`; what leaves first is told by (score, last touch, deepest first, id) and by
nothing else, so it does not depend on history. The policy writes scores of some pages and says so (`rescored`), or of all (`rebuild`).
Victims are taken out at once and put back where a question is answered with no; what is protected is withdrawn until the choice is made.

Columns are indexed by page id. Owned by one policy, called under the policy owner's lock. The compiled loops of `kvtier.columns` keep the
leaves in a heap that is always in order, and beside it those that may not leave now; without them a heap of entries is put in order lazily,
with the same answers.
"""

from __future__ import annotations

import math
from array import array
from heapq import heapify, heappop, heappush

import numpy as np
from numpy.typing import NDArray

from kvtier import columns
from kvtier.errors import IntegrityError
from kvtier.policy.base import ROOT, Mask, Pages, Protection, exit_of
from kvtier.policy.memory import records

Entry = tuple[float, float, int, int]
"""(score, last touch in seconds, -depth, page): what leaves earlier sorts first."""

UNQUEUED = -1
SPARE_ENTRIES = 1024
_HERE, _PARENT, _CHILDREN, _DEPTH, _LAST, _SCORE, _PLACE = range(7)
_SEAT = 8
"""Numbers in the record of a page, one cache line: these. `_HERE` is the first byte of its number."""
_NUMBERS = _QUEUED, _PRESENT, _ASIDE = range(3)
"""Cells of `_numbers`: leaves in the compiled loops' queue, pages that are here, and leaves beside the queue, which may not leave now."""


def _vacant(rows: int) -> Pages:
    """Records of which no page is here."""
    seats = records(rows, _SEAT)
    seats[:, _PARENT], seats[:, _PLACE] = ROOT, UNQUEUED
    return seats


class Ranking:
    """Residency, child counts and the leaving order of one tier's pages."""

    def __init__(self) -> None:
        # One row a page, and one more at the end, which index ROOT reads and writes and nobody looks at.
        self._look_at(_vacant(1))
        self._heap: Pages = np.zeros(1, np.int64)
        self._numbers = array("q", [0] * len(_NUMBERS))
        self._withdrawn: set[int] = set()
        self._entries: list[Entry] = []
        """Without loops: entries whose page is a leaf of this score and time count, others are left over."""
        self._loops = self.attach()

    def _look_at(self, seats: Pages) -> None:
        self._seats = seats
        """`[pages, 8]`, what the following are views of: a question about a page is mostly one about all of it."""
        reals, flags = seats.view(np.float64), seats.view(np.bool_)
        self.here: Mask = flags[:, _HERE]
        self.parent: Pages = seats[:, _PARENT]
        self.children: Pages = seats[:, _CHILDREN]
        self.depth: Pages = seats[:, _DEPTH]
        self.last: NDArray[np.float64] = reals[:, _LAST]
        """When a page was used last, in seconds."""
        self.score: NDArray[np.float64] = reals[:, _SCORE]
        self._place: Pages = seats[:, _PLACE]

    def attach(self) -> columns.RankingLoops | None:
        """The compiled loops over the columns as they are now; None where there are none."""
        loops = columns.loops()
        return None if loops is None else loops.Ranking(self._seats, self._heap, self._numbers)

    @property
    def loops(self) -> columns.RankingLoops | None:
        """The compiled loops that are in use, until the columns grow."""
        return self._loops

    def __len__(self) -> int:
        return self._numbers[_PRESENT]

    @property
    def room(self) -> int:
        """Page ids below this have a row."""
        return len(self.here) - 1

    def which(self, pages: Pages) -> Mask:
        """Which of `pages` are here."""
        known = (pages >= 0) & (pages < self.room)
        here: Mask = known & self.here[np.where(known, pages, ROOT)]
        return here

    def require(self, pages: Pages) -> None:
        """KeyError naming the first of `pages` that is not here."""
        try:
            good = np.count_nonzero(self.here[pages]) == len(pages) and (not len(pages) or pages[pages.argmin()] >= 0)
        except IndexError:
            good = False
        if not good:
            raise KeyError(int(pages[~self.which(pages)][0]))

    def arrive(self, pages: Pages, parents: Pages, depths: Pages) -> None:
        """Pages come, withdrawn until they are `rescored`.

        ValueError, and nothing changed, naming the first of them that is here, or if numbers are impossible.
        """
        if self._loops is not None and self._loops.arrive(pages, parents, depths):
            self.withdraw(pages)
            return
        if not len(pages):
            return
        lowest = min(pages[pages.argmin()], depths[depths.argmin()], parents[parents.argmin()] - ROOT)
        if lowest < 0 or np.count_nonzero(pages == parents):
            told = f"pages {pages} with parents {parents} at depths {depths}"
            raise ValueError(f"{told}: ids and depths are 0 or more, a parent is another page or ROOT ({ROOT})")
        # Refused before the columns grow: loops of others over them (`A2CR`) are fitted to larger ones only after a call that is done.
        if np.count_nonzero(held := self.which(pages)):
            raise ValueError(f"page {pages[held.argmax()]} is already in this tier")
        self._grow(int(max(pages[pages.argmax()], parents[parents.argmax()])) + 1)
        self.parent[pages] = parents
        self.depth[pages] = depths
        self._restore(pages)
        self.withdraw(pages)

    def leave(self, pages: Pages) -> None:
        """Pages that are here go."""
        if self._loops is None or not self._loops.leave(pages):
            for page in pages.tolist():
                self._go(page)
            self._sweep_if_wasteful()

    def withdraw(self, pages: Pages) -> None:
        """These pages, which are here, do not queue until they are `rescored`: to be called before score or last touch change.

        KeyError, and nothing done, naming the first that is not here.
        """
        if self._loops is None or not self._loops.withdraw(pages):
            self.require(pages)
            self._withdrawn.update(pages.tolist())

    def rescored(self, pages: Pages) -> None:
        """Withdrawn pages queue again, by the score and last touch that stand in the columns now."""
        if self._loops is None or not self._loops.rescored(pages):
            self._withdrawn.difference_update(pages.tolist())
            for page in pages[self.children[pages] == 0].tolist():
                heappush(self._entries, self._entry(page))
            self._sweep_if_wasteful()

    def rebuild(self) -> None:
        """The scores of many pages changed in the column. O(rows)."""
        if self._loops is not None:
            self._loops.rebuild()
            return
        leaves = np.flatnonzero(self.here & (self.children == 0))
        self._entries = [self._entry(page) for page in leaves.tolist()]
        heapify(self._entries)

    def take(self, count: int, protected: Protection) -> Pages | None:
        """`count` pages out of the tier, in leaving order; None, and nothing changed, if so many cannot leave or `protected` raises."""
        if count < 0:
            raise ValueError(f"count is {count}; it must be 0 or more")
        if count > len(self):
            return None
        left = self._choose(count, protected)
        if len(left) == count:
            return left
        self._restore(left)
        return None

    def first(self, count: int, protected: Protection) -> Pages:
        """Up to `count` pages that `take` would take out, in that order. They stay."""
        if count < 0:
            raise ValueError(f"count is {count}; it must be 0 or more")
        chosen = self._choose(min(count, len(self)), protected)
        self._restore(chosen)
        return chosen

    def _choose(self, wanted: int, protected: Protection) -> Pages:
        """Up to so many pages leave, each the first that may."""
        if self._loops is not None and (exit := exit_of(protected)) is not None:
            out = np.empty(wanted, np.int64)
            if (found := self._loops.choose(*exit, out)) >= 0:
                return out[:found]
        answers: dict[int, bool] = {}
        chosen, stays = self._first_run(wanted, protected, answers)
        if stays is None:  # the usual case
            return chosen
        left, withdrawn = [chosen], [stays]
        try:
            while stays is not None:
                self.withdraw(np.array([stays]))
                wanted -= len(chosen)
                chosen, stays = self._first_run(wanted, protected, answers)
                left.append(chosen)
                if stays is not None:
                    withdrawn.append(stays)
        except BaseException:
            for part in reversed(left):
                self._restore(part)
            raise
        finally:
            self.rescored(np.array(withdrawn))
        return np.concatenate(left)

    def _first_run(self, wanted: int, protected: Protection, answers: dict[int, bool]) -> tuple[Pages, int | None]:
        """The first pages leave, up to one that may not; that page, None if there were `wanted` or there is no other."""
        chosen = self._pop(wanted)
        try:
            leave = self._leading(chosen, protected, answers)
        except BaseException:
            self._restore(chosen)
            raise
        if leave == len(chosen):
            return chosen, None
        self._restore(chosen[leave:])
        return chosen[:leave], int(chosen[leave])

    def _leading(self, chosen: Pages, protected: Protection, answers: dict[int, bool]) -> int:
        """How many of `chosen` leave before the first that may not. Nobody is asked about a page twice."""
        unknown = chosen
        if answers:
            unknown = np.array([page for page in chosen.tolist() if page not in answers], np.int64)
        stays = protected(unknown) if len(unknown) else np.zeros(0, np.bool_)
        if not answers and 1 not in stays.tobytes():
            return len(chosen)
        answers.update(zip(unknown.tolist(), stays.tolist(), strict=True))
        return next((place for place, page in enumerate(chosen.tolist()) if answers[page]), len(chosen))

    def _pop(self, count: int) -> Pages:
        out = np.empty(count, np.int64)
        if self._loops is not None:
            found = self._loops.pop(out)
        else:
            found = 0
            while found < count and self._entries:
                entry = heappop(self._entries)
                page = entry[3]
                if self.here[page] and not self.children[page] and page not in self._withdrawn and entry == self._entry(page):
                    out[found] = page
                    found += 1
                    self._go(page)
        return out if found == count else out[:found]

    def _restore(self, pages: Pages) -> None:
        if self._loops is None or not self._loops.restore(pages):
            self._come(pages)

    def _come(self, pages: Pages) -> None:
        for page in pages[::-1].tolist():
            self.here[page] = True
            self._numbers[_PRESENT] += 1
            self.children[self.parent[page]] += 1
            if not self.children[page]:
                heappush(self._entries, self._entry(page))
        self._sweep_if_wasteful()

    def _go(self, page: int) -> None:
        self.here[page] = False
        self._numbers[_PRESENT] -= 1
        parent = int(self.parent[page])
        self.children[parent] -= 1
        if parent != ROOT and self.here[parent] and not self.children[parent]:
            heappush(self._entries, self._entry(parent))

    def _entry(self, page: int) -> Entry:
        return (float(self.score[page]), float(self.last[page]), -int(self.depth[page]), page)

    def _sweep_if_wasteful(self) -> None:
        if len(self._entries) > 2 * len(self) + SPARE_ENTRIES:
            self.rebuild()

    def _grow(self, pages: int) -> None:
        held = self.room
        if pages <= held:
            return
        rows = max(pages, 2 * held) + 1
        seats, heap = _vacant(rows), np.zeros(rows, np.int64)
        seats[:held] = self._seats[:held]
        queued, aside = self._numbers[_QUEUED], self._numbers[_ASIDE]
        heap[:queued], heap[rows - aside :] = self._heap[:queued], self._heap[held + 1 - aside :]
        self._look_at(seats)
        self._heap = heap
        self._loops = self.attach()

    def check_integrity(self) -> None:
        """IntegrityError if columns and queue disagree. Looks at everything; for tests."""
        pages = np.flatnonzero(self.here[: self.room])
        if len(pages) != len(self):
            raise IntegrityError(f"{len(pages)} pages are here, {len(self)} were counted")
        children = np.zeros(self.room + 1, np.int64)
        np.add.at(children, self.parent[pages], 1)
        if not np.array_equal(children[: self.room], self.children[: self.room]):
            raise IntegrityError("child counts differ from the pages that are here")
        leaves = set(pages[children[pages] == 0].tolist())
        if not all(math.isfinite(score) for score in self.score[pages].tolist()):
            raise IntegrityError("a score is no number")
        if self._withdrawn:
            raise IntegrityError(f"pages {self._withdrawn} are withdrawn, though nobody chooses")
        if self._loops is None:
            if missing := leaves - {entry[3] for entry in self._entries if self._entry(entry[3]) == entry}:
                raise IntegrityError(f"leaves {sorted(missing)} are not queued")
            return
        queue, aside = self._heap[: self._numbers[_QUEUED]], self._heap[: self.room - self._numbers[_ASIDE] : -1]
        if sorted((*queue.tolist(), *aside.tolist())) != sorted(leaves):
            raise IntegrityError("the queue, with those that wait beside it, is not that of the leaves")
        if not np.array_equal(self._place[aside], UNQUEUED - 1 - np.arange(len(aside))):
            raise IntegrityError("a page that waits beside the queue does not know its place")
        if not np.array_equal(self._place[queue], np.arange(len(queue))):
            raise IntegrityError("a queued page does not know its place")
        order = [self._entry(page) for page in queue.tolist()]
        if any(order[(place - 1) // 2] > entry for place, entry in enumerate(order) if place):
            raise IntegrityError("the queue is out of order")
