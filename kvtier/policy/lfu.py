"""LFU: the page used least often leaves first. Folklore; with counts that outlive eviction, "perfect LFU" in Breslau, Cao, Fan, Phillips,
Shenker, "Web caching and Zipf-like distributions: evidence and implications", INFOCOM 1999.

`lfu` keeps counts of pages that left as ghosts; `lfu-in-cache` starts again at one when a page comes back. Ghosts are what makes
counts useful in a small tier: without them the count cannot tell a page that returns from one that is new.

Not for tiers that hold more than a few per cent of the distinct pages, nor for traffic that changes: a count never falls, so
yesterday's pages stay. `lfu-da` ages.
"""

from __future__ import annotations

from kvtier.policy.ghosts import GHOSTS_PER_PAGE, Ghosts
from kvtier.policy.queued import QueuedPolicy


class LFU(QueuedPolicy):
    """The score is the number of uses, the arrival included. Ties: the least recently used, then deeper first.

    Remembers `ghosts_per_page` ghosts for every page it holds.
    """

    name = "lfu"

    def __init__(self, ghosts_per_page: float = GHOSTS_PER_PAGE) -> None:
        super().__init__()
        self._counts: Ghosts[float] = Ghosts(ghosts_per_page)

    def entered(self, pages: list[int]) -> None:
        for page in pages:
            self.worth[page] = 1.0 + (self._counts.recall(self.called[page]) or 0.0)

    def used(self, pages: list[int]) -> None:
        for page in pages:
            self.worth[page] += 1.0
            self.time[page] = self.latest

    def left(self, pages: list[int], evicted: bool) -> None:
        if evicted:
            self._counts.leave([(self.called[page], self.worth[page]) for page in pages], len(self))


class InCacheLFU(LFU):
    """`LFU` without ghosts: what most caches call LFU."""

    name = "lfu-in-cache"

    def __init__(self) -> None:
        super().__init__(ghosts_per_page=0)
