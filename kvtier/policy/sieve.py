"""SIEVE: one queue in order of arrival and a hand that goes over it again and again, from old to new. A page that was used since the hand
last came by stays where it is; one that was not leaves.

Source: Zhang, Yang, Yue, Vigfusson, Rashmi, "SIEVE is simpler than LRU: an efficient turn-key eviction algorithm for Web caches", NSDI
2024.

For traffic in which popular pages stay popular. Not for prefix caches: new pages are taken before old ones that were used once, and a
conversation's next turn comes too late. It loses to LRU from 5 % of the distinct pages on.
"""

from __future__ import annotations

from kvtier.policy.queued import QueuedPolicy
from kvtier.policy.queues import NOBODY, PAGE_BITS

Place = tuple[float, float, int]
"""(round of the hand, time of arrival, rank of the page)."""


class SIEVE(QueuedPolicy):
    """The hand is at a place of a round; a page's score is the round in which the hand comes to it next.

    The hand goes over pages with children as over others, and takes note that they were used; they only cannot leave. It does so when
    their last child is gone, which comes to the same.
    """

    name = "sieve"

    def __init__(self) -> None:
        super().__init__()
        self._used_before: list[float] = self.column(-1.0)
        """The round in which the hand first came, or will come, to the page after it was used."""
        self._hand: list[Place] = [(0.0, -1.0, 0)]
        """One place, in a list so that a choice can undo it."""

    def entered(self, pages: list[int]) -> None:
        for page in pages:
            self._used_before[page] = -1.0
            self.worth[page] = self._next_round(page)

    def used(self, pages: list[int]) -> None:
        for page in pages:
            self._used_before[page] = self._next_round(page)

    def candidate(self) -> int:
        while (page := self.head(0)) != NOBODY:
            time, round = self.time[page], self._next_round(page)
            if self.worth[page] < round:
                self.move(page, 0, round, time)
                continue
            self.change(self._hand, 0, (self.worth[page], time, page - (self.depth[page] << PAGE_BITS)))
            if self._used_before[page] < self.worth[page]:
                return page
            self.move(page, 0, self.worth[page] + 1.0, time)
        return NOBODY

    def _next_round(self, page: int) -> float:
        """The round in which the hand comes to the page next, from where it is."""
        round, time, rank = self._hand[0]
        return round if (self.time[page], page - (self.depth[page] << PAGE_BITS)) >= (time, rank) else round + 1.0
