"""Which pages a step attends over: the share of attention each page would get, and the best of those that may be chosen. Stateless."""

from __future__ import annotations

import math

import torch


def page_mass(logits: torch.Tensor, counted: torch.Tensor | None = None) -> torch.Tensor:
    """Each page's share of the attention, mean over heads: fp32 `[tokens, pages]` for `page_logits` `[tokens, heads, pages]`.

    `counted`, bool `[tokens, pages]`: the pages there are for each query; the others get 0. Shares of a query sum to 1 (0 without pages).
    """
    if counted is not None:
        logits = logits.masked_fill(~counted[:, None], -math.inf)
    return logits.softmax(2).nan_to_num(0.0).mean(1)


def best_pages(mass: torch.Tensor, candidates: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` candidates of most `mass` for each query, all of them if there are fewer: bool `[tokens, pages]`.

    `mass` `[tokens, pages]`, `candidates` bool of the same shape. Of equal ones, which is open.
    """
    count = min(count, mass.shape[1])
    chosen = torch.zeros_like(candidates)
    if count:
        order = mass.masked_fill(~candidates, -1.0).topk(count, 1).indices
        chosen.scatter_(1, order, True)
    return chosen & candidates
