"""One document played over the KV that no format has touched: what every format is compared to, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvtier.engines.models import cache_argument
from kvtier.errors import ModelError, needing
from kvtier.layout import PageLayout
from kvtier.quality.attention import AttentionCall, record
from kvtier.quality.protocol import Protocol
from kvtier.quality.scoring import score

with needing("hf", "measuring quality", "transformers"):
    from transformers import DynamicCache


@dataclass(frozen=True)
class Untouched:
    """What is kept of a document.

    `pages`: the context's KV `[pages, layers, 2, page_tokens, kv_heads, head_dim]` in the page dtype, CPU. `text` follows the context and
    `logits` `[len(text) - 1, vocabulary]` predict it. `repeated` is a passage of the context and `repeated_logits` predict it where it is
    played again after the context; both None for documents that do not measure recall. `calls` is the attention of `text` in every layer
    and `own` the keys and values `[1, kv_heads, len(text), head_dim]` that it computed; both empty if attention cannot be recorded.
    """

    pages: torch.Tensor
    text: list[int]
    logits: torch.Tensor
    repeated: list[int] | None
    repeated_logits: torch.Tensor | None
    calls: list[AttentionCall]
    own: list[tuple[torch.Tensor, torch.Tensor]]


@torch.inference_mode()
def play_untouched(model: Any, layout: PageLayout, document: Sequence[int], protocol: Protocol, repeat_from: int | None) -> Untouched:
    """Compute the KV of the document's context, round it to the page dtype, and score what follows over it.

    `repeat_from`: where in the context the passage begins that is repeated after it, or None. ModelError if the page dtype cannot hold
    the KV.
    """
    context = list(document[: protocol.context_tokens])
    text = list(document[protocol.context_tokens :][: protocol.scored_tokens])
    computed = DynamicCache()
    model(torch.tensor([context], device=model.device), logits_to_keep=1, **cache_argument(computed))
    pages = to_pages(computed, layout)
    if not pages.isfinite().all():
        raise ModelError(f"the model's KV does not fit into {layout.dtype}; keep its pages in another dtype, such as bf16 (--page-dtype)")
    past = to_cache(pages, model)
    with record(model) as calls:
        logits = model(torch.tensor([text], device=model.device), **cache_argument(past)).logits[0, :-1].float()
    own = [(layer.keys[:, :, len(context) :].clone(), layer.values[:, :, len(context) :].clone()) for layer in past.layers]
    past.crop(-len(text))
    repeated = None if repeat_from is None else context[repeat_from : repeat_from + protocol.repeated_tokens]
    repeated_logits = None if repeated is None else score(model, past, repeated)
    noted = len(calls) == layout.layers
    return Untouched(pages, text, logits, repeated, repeated_logits, calls if noted else [], own if noted else [])


def to_pages(past: Any, layout: PageLayout) -> torch.Tensor:
    """The KV of a cache with one sequence of whole pages: `[pages, *layout.shape]` in the layout's dtype, contiguous, CPU."""
    kv = torch.stack([torch.stack((layer.keys[0], layer.values[0])).to("cpu", layout.torch_dtype) for layer in past.layers])
    layers, planes, heads, tokens, width = kv.shape
    pages = kv.view(layers, planes, heads, tokens // layout.page_tokens, layout.page_tokens, width)
    return pages.permute(3, 0, 1, 4, 2, 5).contiguous()


def to_cache(pages: torch.Tensor, model: Any) -> DynamicCache:
    """The inverse of `to_pages`, in what the model computes in, on its device."""
    past = DynamicCache()
    for index in range(pages.shape[1]):
        keys, values = pages[:, index].permute(1, 3, 0, 2, 4).flatten(2, 3).to(model.device, model.dtype)
        past.update(keys[None], values[None], index)
    return past
