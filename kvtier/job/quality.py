"""What a page format does to the model: next-token distributions after restored KV against those after untouched KV.

KL divergence is the figure to trust; small perplexity changes drown in noise. Sums are kept, so that turns can be added one by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass
class Quality:
    """Running sums over scored tokens."""

    tokens: int = 0
    kl: float = 0.0
    agreements: int = 0
    nll: float = 0.0
    nll_untiered: float = 0.0

    def add(self, untiered: torch.Tensor, logits: torch.Tensor, text: list[int]) -> None:
        """Take in one scored text: logits `[len(text) - 1, vocabulary]` of both runs for its tokens from the second on."""
        targets = torch.tensor(text[1:], device=logits.device)[:, None]
        reference, changed = untiered.log_softmax(-1), logits.log_softmax(-1)
        self.tokens += len(text) - 1
        self.kl += float((reference.exp() * (reference - changed)).sum())
        self.agreements += int((reference.argmax(-1) == changed.argmax(-1)).sum())
        self.nll -= float(changed.gather(1, targets).sum())
        self.nll_untiered -= float(reference.gather(1, targets).sum())

    def result(self) -> dict[str, float]:
        """Means per token: `kl` and `delta_nll` in nats, `top1_agreement` and `perplexity_change` as shares."""
        count = max(self.tokens, 1)
        delta = (self.nll - self.nll_untiered) / count
        return {
            "scored_tokens": self.tokens,
            "kl": self.kl / count,
            "delta_nll": delta,
            "top1_agreement": self.agreements / count,
            "perplexity_untiered": math.exp(self.nll_untiered / count),
            "perplexity_change": math.expm1(delta),
        }
