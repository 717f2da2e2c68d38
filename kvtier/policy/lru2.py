"""LRU-2: the page whose last use but one is the longest ago leaves first; one used only once before all others.

Source: O'Neil, O'Neil, Weikum, "The LRU-K page replacement algorithm for database disk buffering", SIGMOD 1993, with K = 2, no
correlated reference period, and the history kept past eviction that the paper calls retained information (a ghost: when the page was
last used).

For small tiers before much one-shot traffic: at 1 % of the Mooncake conversation trace it finds twice what LRU does. Not for tiers
that hold more than about a tenth of the distinct pages: pages that were used twice and are dead push out new ones for long.
"""

from __future__ import annotations

import math

from kvtier.policy.ghosts import GHOSTS_PER_PAGE, Ghosts
from kvtier.policy.queued import QueuedPolicy


class LRU2(QueuedPolicy):
    """The score is the time of the last use but one, in seconds. Ties: the last use, then deeper first.

    Remembers GHOSTS_PER_PAGE ghosts for every page it holds.
    """

    name = "lru-2"

    def __init__(self, ghosts_per_page: float = GHOSTS_PER_PAGE) -> None:
        super().__init__()
        self._last_used: Ghosts[float] = Ghosts(ghosts_per_page)

    def entered(self, pages: list[int]) -> None:
        for page in pages:
            before = self._last_used.recall(self.called[page])
            self.worth[page] = -math.inf if before is None else before

    def used(self, pages: list[int]) -> None:
        for page in pages:
            self.worth[page] = self.time[page]
            self.time[page] = self.latest

    def left(self, pages: list[int], evicted: bool) -> None:
        if evicted:
            self._last_used.leave([(self.called[page], self.time[page]) for page in pages], len(self))
