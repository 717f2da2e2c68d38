"""W-TinyLFU: new pages live in a small window; from there they get into the main part only if they were used more often than the page
that must leave for them. The main part is a segmented LRU.

Source: Einziger, Friedman, Manes, "TinyLFU: a highly efficient cache admission policy", ACM Transactions on Storage 13(4), 2017:
window 1 %, protected segment 80 % of the main part, counts up to 15 that are halved every 10 x tier uses. Counts are exact here, not a
sketch; halving drops those that reach nought, so at most 20 names a page are known.

Room is made before it is known what comes, so a page is not measured on arrival but when it has fallen out of the window, by a later
request; when none of these is left, pages of the main part leave without contest. Tiers of a few requests suffer from that.

For very small tiers before one-shot traffic. Not for tiers above a few per cent of the distinct pages: a conversation's new pages lose
against every page that was ever used twice.
"""

from __future__ import annotations

import math
from collections import OrderedDict

from kvtier.policy.queued import QueuedPolicy
from kvtier.policy.queues import NOBODY

WINDOW, ARRIVING, PROBATION, PROTECTED = 0, 1, 2, 3
"""Where pages are; those that are `ARRIVING` fell out of the window and must prove themselves."""
WINDOW_SHARE = 0.01
PROTECTED_SHARE = 0.8
MOST_COUNTED = 15
USES_PER_HALVING = 10
"""Times the number of pages here."""


class WTinyLFU(QueuedPolicy):
    """No page has a score of its own but its segment and last use; `score` is the last use, in seconds.

    Known counts, of pages here and gone, are at most 2 x USES_PER_HALVING for every page it holds.
    """

    name = "w-tinylfu"
    queues = 4

    def __init__(self) -> None:
        super().__init__()
        self._frequency: dict[int, int] = {}
        self._uses = 0
        self._window: OrderedDict[int, None] = OrderedDict()
        self._protected: OrderedDict[int, None] = OrderedDict()
        """Least recently used first, inner pages included."""

    def entered(self, pages: list[int]) -> None:
        self._tally(pages)
        for page in reversed(pages):
            self.worth[page] = self.latest
            self._window[page] = None
        # Until room is needed for the first time new pages have all the room there is; then they go on probation without contest.
        beyond = ARRIVING if self.sizes[PROBATION] else PROBATION
        while self.sizes[WINDOW] > max(1.0, WINDOW_SHARE * self.full):
            oldest, _ = self._window.popitem(last=False)
            self.move(oldest, beyond, self.worth[oldest], self.time[oldest])

    def used(self, pages: list[int]) -> None:
        self._tally(pages)
        for page in reversed(pages):
            if self.queue[page] == WINDOW and self.full < math.inf:
                self._window.move_to_end(page)
                self.worth[page] = self.time[page] = self.latest
                continue
            self._window.pop(page, None)
            self._protected.pop(page, None)
            self._protected[page] = None
            self.move(page, PROTECTED, self.latest, self.latest)
        while self.sizes[PROTECTED] > PROTECTED_SHARE * (1.0 - WINDOW_SHARE) * self.full:
            oldest, _ = self._protected.popitem(last=False)
            self.move(oldest, PROBATION, self.latest, self.latest)

    def candidate(self) -> int:
        comer = self.head(ARRIVING)
        order = (PROBATION, PROTECTED, WINDOW) if self.full < math.inf else (WINDOW, PROTECTED)
        victim = next((page for queue in order if (page := self.head(queue)) != NOBODY), NOBODY)
        if comer == NOBODY or victim == NOBODY:
            return victim if comer == NOBODY else comer
        if self._known(comer) <= self._known(victim):
            return comer
        self.move(comer, PROBATION, self.latest, self.latest)
        return victim

    def left(self, pages: list[int], evicted: bool) -> None:
        for page in pages:
            self._window.pop(page, None)
            self._protected.pop(page, None)

    def _known(self, page: int) -> int:
        return self._frequency.get(self.called[page], 0)

    def _tally(self, pages: list[int]) -> None:
        for page in pages:
            name = self.called[page]
            self._frequency[name] = min(MOST_COUNTED, self._frequency.get(name, 0) + 1)
        self._uses += len(pages)
        if self._uses >= USES_PER_HALVING * len(self):
            self._uses = 0
            self._frequency = {name: count // 2 for name, count in self._frequency.items() if count > 1}
