"""The page leaves first that is least likely to be used again within the time it would stay, by what was seen of pages of its kind.

Source: Wang, Han, Wei, Shen, Zhang, Fang, Chen, Yu, Chen, "KVCache cache in the wild: characterizing and optimizing KVCache cache at a
large cloud provider", USENIX ATC 2025 (arXiv 2506.02634): times to the next use are exponential within a category of requests;
priority is the probability of a use within the expected life, then the offset. The paper's categories are the request's type and turn.
A policy sees neither: here the turn is estimated by how often the page was used (a conversation's pages are used once a turn), counts
outliving eviction, and the depth stands for the type (shared prompts, middles, long contexts). A reconstruction, not the authors'
code.

For conversations in tiers of one to ten per cent of the distinct pages. Not for traffic whose kinds of pages behave alike, nor
for the first minutes: it learns.
"""

from __future__ import annotations

import math

from kvtier.policy.ghosts import GHOSTS_PER_PAGE, Ghosts
from kvtier.policy.queued import QueuedPolicy
from kvtier.policy.queues import NOBODY

TURNS = 4
DEPTHS = (1, 64)
"""Tokens / 512 at which the next class of depth begins."""
CATEGORIES = TURNS * (len(DEPTHS) + 1)
FIRST_GUESS_S = 60.0
"""Time to the next use, and life, before any was seen."""
FORGET_AFTER = 1 << 20
"""Waits of one category after which what was seen counts half."""


class _Seen:
    """What was seen of one category."""

    __slots__ = ("gap_s", "left", "life_s", "reused", "waits")

    def __init__(self) -> None:
        self.waits, self.reused, self.left = 2.0, 1.0, 1.0
        self.gap_s, self.life_s = FIRST_GUESS_S, FIRST_GUESS_S

    def began(self) -> None:
        self.waits += 1
        if self.waits > FORGET_AFTER:
            for name in self.__slots__:
                setattr(self, name, getattr(self, name) / 2)

    def ended(self, gap_s: float) -> None:
        self.reused += 1
        self.gap_s += gap_s

    def evicted(self, age_s: float) -> None:
        self.left += 1
        self.life_s += age_s

    def probability(self, age_s: float) -> float:
        """Of a use after `age_s` seconds and within the life of a page."""
        rate = self.reused / max(self.gap_s, 1e-9)
        return self.reused / self.waits * math.exp(-rate * age_s) * -math.expm1(-rate * self.life_s / self.left)


class ReuseProbability(QueuedPolicy):
    """The score is that probability, 0 to 1. Ties: the least recently used, then deeper first.

    A queue for each category. Remembers GHOSTS_PER_PAGE ghosts for every page it holds.
    """

    name = "reuse-probability"
    queues = CATEGORIES

    def __init__(self, page_tokens: int, ghosts_per_page: float = GHOSTS_PER_PAGE) -> None:
        super().__init__()
        self.page_tokens = page_tokens
        self._turn: list[int] = self.column(0)
        self._ghosts: Ghosts[tuple[int, int, float]] = Ghosts(ghosts_per_page)
        """Turn, category and last use."""
        self._seen = [_Seen() for _ in range(CATEGORIES)]
        self._now = 0.0
        self._heads: list[tuple[int, float, float]] = []
        """Per category its head, the head's last use and its score at `_now`."""

    def entered(self, pages: list[int]) -> None:
        for page in pages:
            self._turn[page], category, last = self._ghosts.recall(self.called[page]) or (0, NOBODY, 0.0)
            self._wait(page, category, last)

    def used(self, pages: list[int]) -> None:
        for page in pages:
            self._wait(page, self.queue[page], self.time[page])

    def _wait(self, page: int, before: int, last: float) -> None:
        """The page was used, last at `last` as one of category `before`."""
        if before != NOBODY:
            self._seen[before].ended(self.latest - last)
        self._turn[page] = min(TURNS, self._turn[page] + 1)
        tokens = self.depth[page] * self.page_tokens
        category = (self._turn[page] - 1) * (len(DEPTHS) + 1) + sum(tokens >= 512 * depth for depth in DEPTHS)
        self._seen[category].began()
        if category != self.queue[page]:
            self.move(page, category, self.latest, self.latest)
        else:
            self.worth[page] = self.time[page] = self.latest

    def asked(self, now: float) -> None:
        self._now = now
        self._heads = [(NOBODY, 0.0, math.inf)] * CATEGORIES

    def candidate(self) -> int:
        best, lowest = NOBODY, math.inf
        for category, (before, then, score) in enumerate(self._heads):
            page = self.head(category)
            if page == NOBODY:
                continue
            if page != before or self.time[page] != then:
                score = self._seen[category].probability(self._now - self.time[page])
                self._heads[category] = (page, self.time[page], score)
            if score < lowest or (score == lowest and self.time[page] < self.time[best]):
                best, lowest = page, score
        return best

    def left(self, pages: list[int], evicted: bool) -> None:
        if evicted:
            for page in pages:
                self._seen[self.queue[page]].evicted(self.latest - self.time[page])
            facts = [(self.called[page], (self._turn[page], self.queue[page], self.time[page])) for page in pages]
            self._ghosts.leave(facts, len(self))

    def score(self, page: int, now: float, pressure: float) -> float:
        last = super().score(page, now, pressure)
        return self._seen[self.queue[page]].probability(max(now, self.latest) - last)
