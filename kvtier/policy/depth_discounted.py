"""Count x exp(-age / 300 s) / (depth + 1): often, lately and near the start stays.

Source: the score of vllm-marconi-offload (a connector for vLLM; no paper). Taken as a logarithm, the order of two pages does not
change with time, so a page's place is set when it is used. Counts outlive eviction as ghosts.

For small tiers whose hits are shared prompts. Not where long conversations return: their deep pages always leave first.
"""

from __future__ import annotations

import math

from kvtier.policy.ghosts import GHOSTS_PER_PAGE, Ghosts
from kvtier.policy.queued import QueuedPolicy

FADING_S = 300.0
"""Seconds in which a use fades to 1/e."""


class DepthDiscounted(QueuedPolicy):
    """The score is log(count) + last use / 300 s - log(depth + 1). Ties: deeper first.

    Remembers GHOSTS_PER_PAGE ghosts for every page it holds.
    """

    name = "depth-discounted"

    def __init__(self, ghosts_per_page: float = GHOSTS_PER_PAGE) -> None:
        super().__init__()
        self._count_of: list[int] = self.column(0)
        self._counts: Ghosts[int] = Ghosts(ghosts_per_page)

    def entered(self, pages: list[int]) -> None:
        for page in pages:
            self._count_of[page] = self._counts.recall(self.called[page]) or 0
        self.used(pages)

    def used(self, pages: list[int]) -> None:
        faded = self.latest / FADING_S
        for page in pages:
            self._count_of[page] += 1
            self.worth[page] = math.log(self._count_of[page] / (self.depth[page] + 1)) + faded
            self.time[page] = self.latest

    def left(self, pages: list[int], evicted: bool) -> None:
        if evicted:
            self._counts.leave([(self.called[page], self._count_of[page]) for page in pages], len(self))
