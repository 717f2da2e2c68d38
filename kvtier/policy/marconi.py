"""Recency plus the work a page saves per byte: a deep page is dearer to compute again than a shallow one of the same size.

Source: Pan, Wang, Jia, Karakus, Zancato, Dao, Wang, Netravali, "Marconi: prefix caching for the era of hybrid LLMs", MLSys 2025: S =
recency + alpha x FLOP efficiency, both scaled to 0..1 over what is cached; alpha 0 until the first eviction. Here: pages of KV only,
all of one size; alpha is fixed (the paper tunes it by replaying the first traffic); recency is scaled by the age of the last victim
and a page's score is set when it is used (scaling all scores at every eviction would look at every page). A score is so in seconds:
how much longer a deep page may go unused.

For hybrid models, whose recurrent state is large and saves more the deeper it stands, and where long prompts matter most. Not for
attention-only models with ample room: deep pages are the ones least often shared.
"""

from __future__ import annotations

from kvtier.policy.gdsf import recompute_work
from kvtier.policy.queued import QueuedPolicy

ALPHA = 0.3
"""How many lifetimes longer the page that saves the most stays, compared to the one that saves the least."""


class Marconi(QueuedPolicy):
    """The score is last use + alpha x lifetime x efficiency, in seconds. Ties: deeper first."""

    name = "marconi"

    def __init__(self, page_tokens: int, alpha: float = ALPHA) -> None:
        super().__init__()
        self.page_tokens = page_tokens
        self.alpha = alpha
        self._lifetime = 0.0
        self._most_work = 1.0

    def entered(self, pages: list[int]) -> None:
        deepest = max((self.depth[page] for page in pages), default=0)
        self._most_work = max(self._most_work, recompute_work(deepest, self.page_tokens))
        self.used(pages)

    def used(self, pages: list[int]) -> None:
        for page in pages:
            saved = recompute_work(self.depth[page], self.page_tokens) - 1.0
            efficiency = saved / (self._most_work - 1.0) if saved else 0.0
            self.worth[page] = max(self.worth[page], self.latest + self.alpha * self._lifetime * efficiency)
            self.time[page] = self.latest

    def left(self, pages: list[int], evicted: bool) -> None:
        if evicted and pages:
            self._lifetime = self.latest - self.time[pages[-1]]
