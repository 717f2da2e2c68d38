"""What a device budget smaller than the context does to a model: ours, and what is usually done, at the same budget.

The context is read with full attention. Then every following token is a decode step of its own that attends over no more than the budget's
pages. All steps of a document are computed in one pass, each with the mask of what it may attend over: within a layer a step depends on
other steps only through that, so the numbers are those of decoding token by token (tests/quality/test_budget.py compares them with the
Hugging Face integration's).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from kvtier.engines.models import cache_argument
from kvtier.errors import ConfigError, ModelError, needing
from kvtier.layout import PageLayout
from kvtier.leases.budget import LEAST_PAGES
from kvtier.quality.attention import is_on_the_interface, replaced
from kvtier.quality.measure import Progress, check_playable
from kvtier.quality.protocol import Protocol
from kvtier.quality.scoring import TokenScores, compare, score
from kvtier.quality.selections import RECALLING, SELECTIONS, Selection, Step
from kvtier.quality.untouched import to_cache, to_pages

with needing("hf", "measuring quality", "transformers"):
    from transformers import DynamicCache

QUERIES_AT_ONCE = 128
"""For what H2O has to know of the context: its attention matrix, a few rows at a time."""


@dataclass(frozen=True)
class BudgetRow:
    """One way to spend the budget. `kl_*` and `delta_nll` (with its standard error over documents) in nats per token, `top1_agreement` a
    share, `perplexity_increase` the perplexity of all scored tokens less that of full attention. `recalled_pages`: pages that came back
    to a layer per decoded token, None where pages never do. `pages`: the budget, for "all" the mean of pages attended over."""

    select: str
    pages: float
    kl_mean: float
    kl_p99: float
    delta_nll: float
    delta_nll_standard_error: float | None
    perplexity_increase: float
    top1_agreement: float
    recalled_pages: float | None

    def as_json(self) -> dict[str, object]:
        """The row as `--json` shows it."""
        return asdict(self)


def budget_pages(share: float, protocol: Protocol) -> int:
    """Pages of a budget of `share` of the context's pages. ConfigError unless that is fewer than there are, and enough to work with."""
    pages = protocol.context_tokens // protocol.page_tokens
    budget = round(share * pages)
    if not LEAST_PAGES <= budget < pages:
        raise ConfigError(
            f"--budget {share:.4g} is {budget} of the context's {pages} pages; expected at least {LEAST_PAGES} and fewer than all: change "
            "--budget, or give more --tokens or fewer --page-tokens"
        )
    return budget


def measure_budget(
    model: Any, documents: Sequence[Sequence[int]], share: float, protocol: Protocol, progress: Progress = lambda *_: None
) -> list[BudgetRow]:
    """One row per way to spend a budget of `share` of the context's pages, and a last one for full attention ("all").

    ConfigError, ModelError or LayoutError before anything is computed if model, documents and protocol do not go together.
    """
    layout = check_playable(model, documents, protocol)
    if not is_on_the_interface(model):
        name = model.config.get_text_config()._attn_implementation
        raise ModelError(f"the model computes attention by {name!r}, which cannot be replaced; load it with attn_implementation='sdpa'")
    pages = budget_pages(share, protocol)
    steps, done = len(documents) * (1 + len(SELECTIONS)), 0
    measured: dict[str, list[TokenScores]] = {name: [] for name in (*SELECTIONS, "all")}
    recalled: dict[str, list[float]] = {name: [] for name in SELECTIONS}
    for number, document in enumerate(documents):
        where = f"document {number + 1} of {len(documents)}"
        progress(done, steps, f"{where}, full attention")
        read = read_context(model, layout, document, protocol)
        done += 1
        measured["all"].append(compare(read.logits, read.logits, read.text))
        for name, selection in SELECTIONS.items():
            progress(done, steps, f"{where}, {name}")
            attended: list[torch.Tensor] = []
            logits = decode(model, read, selection, pages, protocol, attended if name in RECALLING else None)
            measured[name].append(compare(read.logits, logits, read.text))
            recalled[name] += [recalls(mask, protocol.page_tokens) for mask in attended]
            done += 1
    progress(steps, steps, "done")
    rows = [_row(name, pages, measured[name], float(np.mean(recalled[name])) if name in RECALLING else None) for name in SELECTIONS]
    mean_pages = (protocol.context_tokens + protocol.scored_tokens / 2) / protocol.page_tokens
    return [*rows, _row("all", mean_pages, measured["all"], None)]


@dataclass(frozen=True)
class Read:
    """A document whose context was read: its cache, the text behind it, full attention's predictions of that, and per layer the attention
    that each token of the context got `[kv_heads, context]`."""

    past: Any
    text: list[int]
    logits: torch.Tensor
    attention: list[torch.Tensor]


@torch.inference_mode()
def read_context(model: Any, layout: PageLayout, document: Sequence[int], protocol: Protocol) -> Read:
    """Play the context with full attention, round its KV to what pages hold, and score what follows."""
    context = list(document[: protocol.context_tokens])
    text = list(document[protocol.context_tokens :][: protocol.scored_tokens])
    attention: list[torch.Tensor] = []

    def noting(original: Callable[..., Any]) -> Callable[..., Any]:
        def note(module: Any, query: Any, key: Any, value: Any, mask: Any, **settings: Any) -> Any:
            attention.append(_received(query[0], key[0], _scaling(query, settings)))
            return original(module, query, key, value, mask, **settings)

        return note

    computed = DynamicCache()
    with replaced(model, noting):
        model(torch.tensor([context], device=model.device), logits_to_keep=1, **cache_argument(computed))
    pages = to_pages(computed, layout)
    if not pages.isfinite().all():
        raise ModelError(f"the model's KV does not fit into {layout.dtype}; keep its pages in another dtype, such as bf16 (--page-dtype)")
    past = to_cache(pages, model)
    return Read(past, text, score(model, past, text), attention)


@torch.inference_mode()
def decode(
    model: Any, read: Read, selection: Selection, device_pages: int, protocol: Protocol, attended: list[torch.Tensor] | None = None
) -> torch.Tensor:
    """Logits `[len(text) - 1, vocabulary]` where every token of the text attends over what `selection` leaves it.

    `attended` gets that, layer by layer.
    """
    layers = iter(read.attention)

    def selecting(original: Callable[..., Any]) -> Callable[..., Any]:
        def select(module: Any, query: Any, key: Any, value: Any, mask: Any, **settings: Any) -> Any:
            scaling = _scaling(query, settings)
            step = Step(query[0].float(), key[0].float(), scaling, next(layers), protocol.page_tokens, device_pages)
            kept = selection(step)
            if attended is not None:
                attended.append(kept)
            per_head = kept.repeat_interleave(query.shape[1] // kept.shape[0], 0)[None]
            mask = torch.zeros(per_head.shape, dtype=query.dtype, device=query.device).masked_fill_(~per_head, -math.inf)
            return original(module, query, key, value, mask, **settings)

        return select

    with replaced(model, selecting):
        return score(model, read.past, read.text)


def recalls(attended: torch.Tensor, page_tokens: int) -> float:
    """Pages per step that a step attends over and the one before it did not, but for pages being written: of bool `[1, tokens, total]`."""
    tokens, total = attended.shape[1:]
    pages = attended[0, :, : total // page_tokens * page_tokens].view(tokens, -1, page_tokens).all(2)
    written = (total - tokens) // page_tokens
    fresh = pages[1:, :written] & ~pages[:-1, :written]
    return float(fresh.sum(1).float().mean())


def _received(queries: torch.Tensor, keys: torch.Tensor, scaling: float) -> torch.Tensor:
    """The attention each token gets from itself and what follows it, summed over queries and a key's heads: `[kv_heads, tokens]`."""
    kv_heads, total, width = keys.shape
    grouped = queries.float().view(kv_heads, -1, total, width) * scaling
    got = torch.zeros(kv_heads, total, device=keys.device)
    position = torch.arange(total, device=keys.device)
    for some in torch.split(position, QUERIES_AT_ONCE):
        logits = torch.einsum("hgqd,htd->hgqt", grouped[:, :, some], keys.float())
        got += logits.masked_fill_(position > some[:, None], -math.inf).softmax(3).sum((1, 2))
    return got


def _scaling(query: torch.Tensor, settings: dict[str, Any]) -> float:
    scaling = settings.get("scaling")
    return float(query.shape[-1] ** -0.5 if scaling is None else scaling)


def _row(name: str, pages: float, documents: list[TokenScores], recalled: float | None) -> BudgetRow:
    kl = torch.cat([document.kl for document in documents])
    deltas = [float((document.nll - document.nll_reference).mean()) for document in documents]
    nll, reference = (torch.cat([getattr(document, what) for document in documents]) for what in ("nll", "nll_reference"))
    return BudgetRow(
        select=name,
        pages=pages,
        kl_mean=float(kl.mean()),
        kl_p99=float(np.percentile(kl.cpu().numpy(), 99)),
        delta_nll=float(np.mean(deltas)),
        delta_nll_standard_error=float(np.std(deltas, ddof=1) / math.sqrt(len(deltas))) if len(deltas) > 1 else None,
        perplexity_increase=float(nll.mean().exp() - reference.mean().exp()),
        top1_agreement=float(torch.cat([document.top1 for document in documents]).float().mean()),
        recalled_pages=recalled,
    )
