"""Measures page formats on a model: every document is played once over untouched KV, then once over the KV as each format gives it back.

Documents come one after the other, so that memory holds one at a time. Columns and protocol are explained in docs/quality.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from kvtier.engines.transformers import layout_of
from kvtier.errors import ConfigError, LayoutError, ModelError
from kvtier.formats import Format, Payload
from kvtier.layout import PageLayout
from kvtier.quality.protocol import CUE_PREDICTIONS, RECALL_DOCUMENTS, Protocol
from kvtier.quality.row import QualityRow
from kvtier.quality.scoring import TokenScores, compare, score
from kvtier.quality.untouched import Untouched, play_untouched, to_cache

PAGES_AT_ONCE = 16
"""Codecs without native code take many times the size of their input, and documents of large models are large."""

Progress = Callable[[int, int, str], None]
"""Called with steps done, steps in all, and what is going on."""


def measure_quality(
    model: Any,
    documents: Sequence[Sequence[int]],
    formats: Sequence[Format],
    protocol: Protocol | None = None,
    progress: Progress = lambda *_: None,
) -> list[QualityRow]:
    """One row per format, in the order given. Formats need not be registered.

    `documents`: token ids, at least `protocol.tokens` of each. `format.encode` gets a document's pages in order, at most
    `PAGES_AT_ONCE` in a call, and is told which of them begins the sequence.
    ConfigError, ModelError or LayoutError before anything is computed if model, documents, formats and protocol do not go together.
    """
    protocol = protocol or Protocol()
    layout = check_measurable(model, documents, formats, protocol)
    steps, done = len(documents) * (1 + len(formats)), 0
    measured: list[list[DocumentScores]] = [[] for _ in formats]
    for number, document in enumerate(documents):
        where = f"document {number + 1} of {len(documents)}"
        progress(done, steps, f"{where}, untouched")
        untouched = play_untouched(model, layout, document, protocol, repeat_from(number, protocol))
        done += 1
        for format, scores in zip(formats, measured, strict=True):
            progress(done, steps, f"{where}, {format.name}")
            scores.append(score_format(model, layout, untouched, format))
            done += 1
    progress(steps, steps, "done")
    return [row(format.name, scores) for format, scores in zip(formats, measured, strict=True)]


def page_layout(model: Any, protocol: Protocol) -> PageLayout:
    """The layout of the pages that the formats get. ModelError for models that kvtier cannot hold."""
    return replace(layout_of(model, protocol.page_tokens), dtype=protocol.page_dtype)


def check_measurable(model: Any, documents: Sequence[Sequence[int]], formats: Sequence[Format], protocol: Protocol) -> PageLayout:
    """The layout of the pages, or the error that `measure_quality` promises."""
    layout = page_layout(model, protocol)
    if not documents or not formats:
        raise ConfigError(f"there are {len(documents)} documents and {len(formats)} formats; quality needs at least one of each")
    check_playable(model, documents, protocol)
    for format in formats:
        try:
            format.payload_bytes(layout)
        except LayoutError as error:
            raise LayoutError(f"format {format.name} cannot hold pages of this model: {error}") from None
    return layout


def check_playable(model: Any, documents: Sequence[Sequence[int]], protocol: Protocol) -> PageLayout:
    """The layout of the pages. ConfigError or ModelError for documents that the model cannot read or the protocol finds too short."""
    layout = page_layout(model, protocol)
    if not documents:
        raise ConfigError("there are no documents; quality needs at least one")
    short = [len(document) for document in documents if len(document) < protocol.tokens]
    if short:
        raise ConfigError(f"a document has {short[0]} tokens; expected at least {protocol.tokens}; give longer texts or fewer --tokens")
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and protocol.tokens > positions:
        raise ModelError(f"documents of {protocol.tokens} tokens do not fit the model's {positions} positions; give fewer --tokens")
    largest = max(max(document[: protocol.tokens]) for document in documents)
    if largest >= config.vocab_size:
        raise ModelError(f"a document has token {largest}, but the model's vocabulary has {config.vocab_size}; use the model's tokenizer")
    return layout


def repeat_from(number: int, protocol: Protocol) -> int | None:
    """Where the repeated passage of document `number` begins: early in the first document, later in each; None past the last."""
    if number >= RECALL_DOCUMENTS:
        return None
    return protocol.context_tokens * (number + 1) // (RECALL_DOCUMENTS + 2)


@dataclass(frozen=True)
class DocumentScores:
    """One format on one document. Errors are per layer; `attention` is empty if attention could not be recorded."""

    tokens: TokenScores
    repeated: TokenScores | None
    payload_bits: list[float]
    errors: torch.Tensor
    attention: list[float]


@torch.inference_mode()
def score_format(model: Any, layout: PageLayout, untouched: Untouched, format: Format) -> DocumentScores:
    """Send the context's pages through `format` and play the rest of the document over what comes back."""
    payloads: list[Payload] = []
    parts = []
    for start in range(0, len(untouched.pages), PAGES_AT_ONCE):
        encoded = format.encode(untouched.pages[start : start + PAGES_AT_ONCE], layout, first=() if start else (0,))
        parts.append(format.decode(format.unpack(encoded, layout), layout))
        payloads += encoded
    pages = torch.cat(parts)
    past = to_cache(pages, model)
    tokens = compare(untouched.logits, score(model, past, untouched.text), untouched.text)
    repeated = None
    if untouched.repeated is not None and untouched.repeated_logits is not None:
        repeated = compare(untouched.repeated_logits, score(model, past, untouched.repeated), untouched.repeated)
    attention = []
    for call, layer, (keys, values) in zip(untouched.calls, past.layers, untouched.own, strict=False):
        output = call.repeat(model, torch.cat((layer.keys, keys), 2), torch.cat((layer.values, values), 2))
        reference = call.output.float()
        attention.append(float((output.float() - reference).norm() / reference.norm()))
    bits = [len(payload) * 8 / layout.values for payload in payloads]
    return DocumentScores(tokens, repeated, bits, plane_errors(untouched.pages, pages), attention)


def plane_errors(pages: torch.Tensor, restored: torch.Tensor) -> torch.Tensor:
    """Mean squared error over mean square, per layer and plane: `[layers, planes]`."""
    errors = torch.empty(pages.shape[1:3])
    for layer in range(pages.shape[1]):
        before, after = pages[:, layer].float(), restored[:, layer].float()
        errors[layer] = (after - before).square().sum((0, 2, 3, 4)) / before.square().sum((0, 2, 3, 4))
    return errors


def row(name: str, documents: list[DocumentScores]) -> QualityRow:
    """Means over what all documents gave."""
    kl = torch.cat([document.tokens.kl for document in documents])
    deltas = [float((document.tokens.nll - document.tokens.nll_reference).mean()) for document in documents]
    recalls = [document.repeated for document in documents if document.repeated is not None]
    recall = torch.cat([(scores.nll - scores.nll_reference)[CUE_PREDICTIONS:] for scores in recalls])
    errors = torch.stack([document.errors for document in documents]).mean((0, 1))
    attention = [error for document in documents for error in document.attention]
    return QualityRow(
        format=name,
        bits_per_value=float(np.mean([bits for document in documents for bits in document.payload_bits])),
        kl_mean=float(kl.mean()),
        kl_p99=float(np.percentile(kl.cpu().numpy(), 99)),
        delta_nll=float(np.mean(deltas)),
        delta_nll_standard_error=float(np.std(deltas, ddof=1) / math.sqrt(len(deltas))) if len(deltas) > 1 else None,
        top1_agreement=float(torch.cat([document.tokens.top1 for document in documents]).float().mean()),
        recall_nll=float(recall.mean()),
        k_error=float(errors[0]),
        v_error=float(errors[1]),
        attention_output_error=float(np.mean(attention)) if attention else None,
    )
