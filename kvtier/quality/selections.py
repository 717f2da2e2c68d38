"""What a decode step attends over when it may not attend over everything: kvtier's way to spend a budget of pages, and its rivals.

Pure functions of one layer's queries and keys (`Step`); a rival is named by its paper. `budget.py` measures what each does to a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvtier.attention.digest import DigestLayout, encode, page_logits
from kvtier.attention.select import best_pages, page_mass
from kvtier.leases.budget import SINKS, shares


@dataclass
class Step:
    """One layer of one document: queries `[heads, tokens, head_dim]` in order, keys `[kv_heads, total, head_dim]` of context and text, how
    logits are scaled, and the attention that the context's tokens got from the context `[kv_heads, context]`."""

    queries: torch.Tensor
    keys: torch.Tensor
    scaling: float
    context_attention: torch.Tensor
    page_tokens: int
    device_pages: int

    @property
    def positions(self) -> torch.Tensor:
        """Of the queries, `[tokens]`."""
        total = self.keys.shape[1]
        return torch.arange(total - self.queries.shape[1], total, device=self.keys.device)

    @property
    def visible(self) -> torch.Tensor:
        """What is not in a query's future, bool `[tokens, total]`."""
        return torch.arange(self.keys.shape[1], device=self.keys.device) <= self.positions[:, None]

    @property
    def paged(self) -> torch.Tensor:
        """The keys of the full pages, `[pages, page_tokens, kv_heads, head_dim]`."""
        heads, total, width = self.keys.shape
        pages = total // self.page_tokens
        return self.keys[:, : pages * self.page_tokens].view(heads, pages, self.page_tokens, width).permute(1, 2, 0, 3)

    @property
    def page_of(self) -> torch.Tensor:
        """The page of each token, `[total]`."""
        return torch.arange(self.keys.shape[1], device=self.keys.device) // self.page_tokens


Selection = Callable[[Step], torch.Tensor]
"""What each query attends over: bool `[kv_heads or 1, tokens, total]`."""


def by_attention(step: Step) -> torch.Tensor:
    """kvtier: the first page, the recent ones, and the parked ones that the digests choose for the query (`kvtier.leases.budget`)."""
    digests = encode(step.paged[:, None])[:, 0]
    shape = DigestLayout(step.page_tokens, step.keys.shape[2])
    return _recalled(step, page_logits(digests, step.queries.transpose(0, 1), shape, step.scaling))


def by_bounds(step: Step) -> torch.Tensor:
    """Quest (Tang et al. 2024): the same, but pages are chosen by the largest logit that the extremes of each channel allow.

    The bounds are exact here; in 8 bits they take more bytes than kvtier's digests.
    """
    group = step.queries.shape[0] // step.keys.shape[0]
    low, high = (bound.repeat_interleave(group, 1) for bound in (step.paged.amin(1), step.paged.amax(1)))
    queries = step.queries * step.scaling
    least, most = torch.einsum("hqd,phd->qhp", queries.clamp_max(0), low), torch.einsum("hqd,phd->qhp", queries.clamp_min(0), high)
    return _recalled(step, least + most)


def _recalled(step: Step, logits: torch.Tensor) -> torch.Tensor:
    """The pages that stay and the best others, by what `[tokens, heads, pages]` says of each page."""
    pages, tokens = logits.shape[2], step.page_tokens
    recent, frames = shares(step.device_pages)
    number, full = torch.arange(pages, device=logits.device), step.positions[:, None] // tokens
    chosen = best_pages(page_mass(logits, number < full), (number >= SINKS) & (number < full - recent), frames)
    stays = (step.page_of < SINKS) | (step.page_of >= full - recent)
    choosable = torch.nn.functional.pad(chosen, (0, 1))[:, step.page_of.clamp_max(pages)]
    return ((stays | choosable) & step.visible)[None]


def by_window(step: Step) -> torch.Tensor:
    """StreamingLLM (Xiao et al. 2023): the first page and the most recent ones."""
    current = step.positions[:, None] // step.page_tokens
    return (((step.page_of < SINKS) | (step.page_of > current - (step.device_pages - SINKS))) & step.visible)[None]


def by_cumulative_attention(step: Step) -> torch.Tensor:
    """H2O (Zhang et al. 2023): half of the budget the most recent tokens, half those that got most attention so far. Nothing comes back.

    Token by token and head by head, which is finer than pages: the budget in tokens is the same.
    """
    kv_heads, total, width = step.keys.shape
    count = step.queries.shape[1]
    context = total - count
    budget = step.device_pages * step.page_tokens
    recent = budget - budget // 2
    grouped = step.queries.view(kv_heads, -1, count, width) * step.scaling
    alive = torch.zeros(kv_heads, total, dtype=torch.bool, device=step.keys.device)
    alive[:, :context] = True
    got = torch.zeros(kv_heads, total, device=step.keys.device)
    got[:, :context] = step.context_attention
    kept = torch.empty(kv_heads, count, total, dtype=torch.bool, device=step.keys.device)
    for index in range(count):
        now = context + index
        alive[:, now] = True
        surplus = int(alive[0].sum()) - budget
        if surplus > 0:
            weight = got.masked_fill(~alive, math.inf)
            weight[:, now - recent + 1 :] = math.inf
            alive.scatter_(1, weight.topk(surplus, 1, largest=False).indices, False)
        kept[:, index] = alive
        logits = torch.einsum("hgd,htd->hgt", grouped[:, :, index], step.keys).masked_fill(~alive[:, None], -math.inf)
        got += logits.softmax(2).sum(1)
    return kept


SELECTIONS: dict[str, Selection] = {"attention": by_attention, "quest": by_bounds, "window": by_window, "h2o": by_cumulative_attention}
RECALLING = ("attention", "quest")
"""Those whose pages come back; all heads of a layer attend over the same ones."""
