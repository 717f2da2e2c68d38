"""Next-token predictions over a given KV, and how two of them differ: the one way kvtier computes KL.

KL divergence is the figure to trust; small perplexity changes drown in noise. `Quality` keeps sums, so that turns can be added one by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from kvtier.engines.models import cache_argument


@torch.inference_mode()
def score(model: Any, past: Any, text: list[int]) -> torch.Tensor:
    """Logits `[len(text) - 1, vocabulary]`, fp32, for predicting each next token of `text` after `past`, which is left as it was."""
    logits: torch.Tensor = model(torch.tensor([text], device=model.device), **cache_argument(past)).logits[0, :-1].float()
    past.crop(-len(text))
    return logits


@dataclass(frozen=True)
class TokenScores:
    """Per scored token, `[tokens]`: `kl` of the changed prediction from the reference in nats, whether both have the same `top1`, and the
    negative log likelihood of the true token under both, in nats."""

    kl: torch.Tensor
    top1: torch.Tensor
    nll: torch.Tensor
    nll_reference: torch.Tensor


@torch.inference_mode()
def compare(reference: torch.Tensor, changed: torch.Tensor, text: list[int]) -> TokenScores:
    """How `changed` differs from `reference`, both logits `[len(text) - 1, vocabulary]` for the tokens of `text` from the second on."""
    targets = torch.tensor(text[1:], device=changed.device)[:, None]
    expected, got = reference.log_softmax(-1), changed.log_softmax(-1)
    return TokenScores(
        kl=(expected.exp() * (expected - got)).sum(-1),
        top1=expected.argmax(-1) == got.argmax(-1),
        nll=-got.gather(1, targets)[:, 0],
        nll_reference=-expected.gather(1, targets)[:, 0],
    )


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
        scores = compare(untiered, logits, text)
        self.tokens += len(text) - 1
        self.kl += float(scores.kl.sum())
        self.agreements += int(scores.top1.sum())
        self.nll += float(scores.nll.sum())
        self.nll_untiered += float(scores.nll_reference.sum())

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
