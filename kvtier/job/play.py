"""Plays one turn in each of the ways that are compared: untiered, recomputed, and through the tiers.

The untiered way keeps every session's KV in a plain `DynamicCache`, cut to whole pages between turns: the same prefix lengths as the
tiers restore, so that with lossless formats every number, and so every token, must be equal.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from kvtier.cache import TieredKVCache
from kvtier.engines.models import cache_argument
from kvtier.engines.transformers import TieredCache
from kvtier.quality.scoring import score


@dataclass
class Played:
    """What one turn gave: generated tokens, milliseconds to the first of them, tokens that did not have to be computed."""

    tokens: list[int]
    ttft_ms: float
    reused: int
    probe_logits: torch.Tensor | None = None


@dataclass
class Untiered:
    """Sessions whose KV never leaves memory: the reference."""

    model: Any
    page_tokens: int
    caches: dict[int, DynamicCache] = field(default_factory=dict)

    def play(self, session: int, prompt: list[int], new_tokens: int, probe: list[int]) -> Played:
        """Play a turn; with `probe`, also score that text after it."""
        past = self.caches.setdefault(session, DynamicCache())
        whole_pages = min(past.get_seq_length(), len(prompt) - 1) // self.page_tokens * self.page_tokens
        past.crop(whole_pages - past.get_seq_length())
        start = time.perf_counter()
        tokens, first = greedy(self.model, prompt, past, new_tokens)
        played = Played(tokens, (first - start) * 1e3, whole_pages)
        if probe:
            played.probe_logits = score(self.model, past, probe)
        return played


def recompute(model: Any, prompt: list[int]) -> float:
    """Milliseconds to the first token when nothing was kept."""
    start = time.perf_counter()
    _, first = greedy(model, prompt, DynamicCache(), 1)
    return (first - start) * 1e3


def tiered(
    model: Any,
    cache: TieredKVCache,
    prompt: list[int],
    new_tokens: int,
    probe: list[int],
    salt: str,
    answer: list[int] | None = None,
    after_first: Callable[[], None] = lambda: None,
) -> Played:
    """Play a turn through the tiers and keep its pages.

    With `answer` those tokens are played as the model's (teacher forcing), so that two runs stay comparable after their first difference.
    `after_first` is called when the first token is out: the moment for a scheduler's hints.
    """
    start = time.perf_counter()
    with TieredCache(cache, prompt, salt) as past:
        tokens, first = greedy(model, prompt, past, new_tokens, answer, after_first)
        played = Played(tokens, (first - start) * 1e3, past.restored)
        past.commit(prompt + (answer or tokens))
        if probe:
            played.probe_logits = score(model, past, probe)
    return played


@torch.inference_mode()
def greedy(
    model: Any,
    prompt: list[int],
    past: Any,
    new_tokens: int,
    answer: list[int] | None = None,
    after_first: Callable[[], None] = lambda: None,
) -> tuple[list[int], float]:
    """Greedy tokens after `prompt`, and the time the first was known.

    `past` may hold a prefix of `prompt` and grows up to the last token but one. With `answer` (of `new_tokens` tokens) those are fed
    instead of the model's own choices, all at once.
    """
    ids = torch.tensor([prompt[past.get_seq_length() :]], device=model.device)
    tokens = [int(model(ids, logits_to_keep=1, **cache_argument(past)).logits[0, -1].argmax())]
    first = time.perf_counter()
    after_first()
    while len(tokens) < new_tokens:
        fed = tokens[-1:] if answer is None else answer[:-1]
        logits = model(torch.tensor([fed], device=model.device), **cache_argument(past)).logits[0]
        tokens += logits.argmax(-1).tolist()
    return tokens, first
