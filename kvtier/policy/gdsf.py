"""Greedy-Dual-Size-Frequency: a page is worth its uses times the work it saves per byte, on top of what left last was worth.

Source: Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching policy", HP Labs HPL-98-69, 1998. Pages
are of one size, so the size drops out; the cost of a page is the work of computing it again, which grows with what stands before it
(`recompute_work`). `lfu-da` is the same with a cost of one: LFU with dynamic aging, Arlitt, Cherkasova, Dilley, Friedrich, Jin,
"Evaluating content management techniques for Web proxy caches", WISP 1999.

`gdsf` keeps counts of pages that left as ghosts, `lfu-da` counts from when the page came, as both sources do; with ghosts GDSF finds
more. Middling to good everywhere, so a choice where nothing is known about the traffic. Not for tiers that hold a fifth or more of the
distinct pages of long conversations: LRU is better there.
"""

from __future__ import annotations

from kvtier.policy.ghosts import GHOSTS_PER_PAGE, Ghosts
from kvtier.policy.queued import QueuedPolicy

ATTENTION_SHARE_PER_TOKEN = 0.0168 / 512
"""Work of attention to one token before, as a share of the work that a token costs anyway: Llama-3-8B, 4 x 32 layers x 4096 multiply-adds
against 16 G for the weights."""


def recompute_work(depth: int, page_tokens: int) -> float:
    """Work of computing a page with `depth` pages before it again; 1 with none."""
    return 1.0 + ATTENTION_SHARE_PER_TOKEN * page_tokens * depth


class GDSF(QueuedPolicy):
    """The score is L + count x cost at the last use, L the highest score that has left. Ties: the least recently used, then deeper first.

    Remembers `ghosts_per_page` ghosts for every page it holds.
    """

    name = "gdsf"

    def __init__(self, page_tokens: int, ghosts_per_page: float = GHOSTS_PER_PAGE) -> None:
        super().__init__()
        self.page_tokens = page_tokens
        self._inflation = 0.0
        self._count_of: list[int] = self.column(0)
        self._counts: Ghosts[int] = Ghosts(ghosts_per_page)

    def cost(self, page: int) -> float:
        """What losing the page costs, in pages without anything before them."""
        return recompute_work(self.depth[page], self.page_tokens)

    def entered(self, pages: list[int]) -> None:
        for page in pages:
            self._count_of[page] = self._counts.recall(self.called[page]) or 0
        self.used(pages)

    def used(self, pages: list[int]) -> None:
        for page in pages:
            self._count_of[page] += 1
            self.worth[page] = self._inflation + self._count_of[page] * self.cost(page)
            self.time[page] = self.latest

    def left(self, pages: list[int], evicted: bool) -> None:
        if evicted:
            self._inflation = max([self._inflation, *(self.worth[page] for page in pages)])
            self._counts.leave([(self.called[page], self._count_of[page]) for page in pages], len(self))


class LFUDA(GDSF):
    """LFU with dynamic aging: the score is L + count at the last use. No ghosts."""

    name = "lfu-da"

    def __init__(self) -> None:
        super().__init__(page_tokens=0, ghosts_per_page=0)

    def cost(self, page: int) -> float:
        return 1.0
