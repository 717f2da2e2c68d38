"""What a model was fed through one cache: for each row of the batch, the tokens whose KV stands there.

Pages are named by their tokens, so what is committed must be what was fed, whatever beams, speculation and samplers did with the rows.
Everything is noted as it happens without reading a tensor (which would wait for a GPU at every step) and replayed when it is asked for.
Used by the thread that runs the model.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvtier.errors import LayoutError

_NO_MATTER = {"input_ids", "attention_mask", "position_ids", "cache_position", "labels", "logits_to_keep", "num_items_in_batch"}
"""Arguments of a forward pass that KV does not depend on, or that are looked at here."""


@dataclass(frozen=True)
class Row:
    """One row of the batch: the prompt it continues, and the tokens in its columns of the cache."""

    prompt: int
    token_ids: list[int]


class Fed:
    """Starts with `columns` restored columns: each prompt's first tokens, `prefixes`, at their right.

    `padding`: columns of padding at the left of each prompt, restored or fed; they are no tokens.
    """

    def __init__(self, prefixes: Sequence[Sequence[int]], padding: Sequence[int], columns: int) -> None:
        self._prefixes = prefixes
        self._padding = padding
        self._columns = columns
        self._events: list[Callable[[list[Row]], list[Row]]] = []

    def feed(self, input_ids: torch.Tensor) -> None:
        """The model gets `input_ids` `[rows, tokens]`; more rows than before are so many of each."""
        self._events.append(lambda rows: _fed(rows, input_ids.tolist()))

    def crop(self, tokens: int) -> None:
        """The last `tokens` tokens of every row are removed."""
        if tokens:
            self._events.append(lambda rows: [Row(row.prompt, row.token_ids[:-tokens]) for row in rows])

    def select(self, indices: torch.Tensor) -> None:
        """The rows are now those of `indices` `[rows]`."""
        self._events.append(lambda rows: [rows[index] for index in indices.tolist()])

    def repeat(self, times: int) -> None:
        """Every row stands there `times` times, one beside the other."""
        self._events.append(lambda rows: _repeated(rows, times))

    def clear(self) -> None:
        """Nothing is in the cache."""
        self._events.append(lambda rows: [Row(row.prompt, []) for row in rows])

    def rows(self) -> list[Row]:
        """What stands in each row of the batch, without padding."""
        rows = [Row(index, [0] * (self._columns - len(prefix)) + list(prefix)) for index, prefix in enumerate(self._prefixes)]
        for event in self._events:
            rows = event(rows)
        return [Row(row.prompt, row.token_ids[self._padding[row.prompt] :]) for row in rows]


def check_form(mask: object) -> None:
    """LayoutError for an attention mask of another form than `[rows, columns]`: it says for each token what it sees, and a token that does
    not see all those before it and none behind it has other KV than pages of these tokens."""
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        found = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise LayoutError(
            f"the attention mask is {found}; expected [sequences, columns], or none: pages are named by the tokens before, which each "
            "token has to see; give a mask for each token to a model with one of transformers' own caches"
        )


def check_mask(mask: object, padding: Sequence[int], rows: int, columns: int) -> None:
    """LayoutError unless a model's attention mask, None or `[rows, columns]`, hides the left padding of each prompt and nothing else.

    `columns`: those of the cache and the forward pass together; transformers hides what a narrower mask does not reach. What stands behind
    a hidden token is not the KV of the tokens it would be named by. Waits for a GPU that has the mask.
    """
    check_form(mask)
    if isinstance(mask, torch.Tensor) and len(mask) == rows and rows % len(padding) == 0:
        if mask.shape[1] < columns:
            raise LayoutError(
                f"the attention mask has {mask.shape[1]} columns; expected at least {columns}, for the restored tokens and the new ones: "
                "that of the whole sequence, as generate makes it, or none"
            )
        left = torch.tensor(padding, device=mask.device).repeat_interleave(rows // len(padding))
        good = torch.equal(mask != 0, torch.arange(mask.shape[1], device=mask.device) >= left[:, None])
    else:
        good = mask is not None or not any(padding)
    if not good:
        raise LayoutError(
            f"the attention mask hides something else than this cache's padding ({', '.join(map(str, padding))} columns at the left); give "
            "the model what left_padded makes of these sequences, or this cache the mask too: TieredCache(..., attention_mask=mask)"
        )


def check_inputs(named: Mapping[str, object]) -> None:
    """LayoutError for arguments of a forward pass that KV depends on, such as images: pages are named by token ids alone; and where caches
    are switched off, because `generate` then feeds the whole sequence again with each token."""
    if named.get("use_cache") is False:
        raise LayoutError(
            "use_cache is off (by the call, or by the model's generation_config or config), so every token would bring the whole sequence "
            "into the cache again; say use_cache=True"
        )
    others = sorted(name for name, value in named.items() if name not in _NO_MATTER and _holds_tensors(value))
    if others:
        raise LayoutError(
            f"a forward pass was given {', '.join(others)}: its KV depends on that, too, but pages are named by their tokens alone and "
            "would be found by others; leave it out, or give the model one of transformers' own caches"
        )


def _holds_tensors(value: object) -> bool:
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return isinstance(value, torch.Tensor) or any(map(_holds_tensors, parts))


def alike_up_to(model: Any) -> float:
    """Tokens in a sequence up to which a Hugging Face model rotates its keys in one way; in longer ones, all are rotated in another."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, dict)]
    bounds = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    bounds += [config.max_position_embeddings - 1 for kind in kinds if kind.get("rope_type") == "dynamic"]
    return min(bounds, default=math.inf)


class Positions:
    """The positions that a model was told of its tokens, which are part of their keys: KV of another position is not that of its tokens.

    `padding` as in `Fed`. Positions of another form than `[rows or 1, tokens]` are not looked at.
    """

    def __init__(self, padding: Sequence[int]) -> None:
        self._padding = padding
        self._told: dict[int, list[tuple[torch.Tensor, int]]] = {}
        """By number of rows: the positions of a forward pass, and its first column."""

    def tell(self, model: torch.nn.Module, positions: object, start: int, tokens: int) -> None:
        """A forward pass of `tokens` columns from column `start` on. Reads no tensor.

        LayoutError where nobody told and there is padding, for a model that asks: it would count the padding.
        """
        if positions is None and any(self._padding) and "position_ids" in inspect.signature(model.forward).parameters:
            raise LayoutError(
                "a forward pass over padded sequences without position_ids, so that the padding would be counted; give it "
                "position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0), of the columns it computes, or call generate, which does"
            )
        if isinstance(positions, torch.Tensor) and positions.ndim == 2 and positions.shape[1] == tokens:
            self._told.setdefault(len(positions), []).append((positions.clone(), start))  # generate's are views of all so far

    def check(self) -> None:
        """LayoutError if any was another than the number of tokens before, padding not counted. Waits for a GPU that has them."""
        for rows, told in self._told.items():
            positions = torch.cat([each for each, _ in told], dim=1)
            columns = torch.cat([torch.arange(start, start + each.shape[1]) for each, start in told]).to(positions.device)
            left = torch.tensor(self._padding, device=positions.device).repeat_interleave(max(1, rows // len(self._padding)))
            expected = columns - left[:, None]
            if not bool(((positions == expected) | (expected < 0)).all()):
                raise LayoutError(
                    "position_ids are not the places of these tokens in their sequences, the restored ones and no padding counted; leave "
                    "them out where there is no padding, or call generate"
                )


def unpadded(token_ids: Any, mask: Any) -> tuple[list[list[int]], int]:
    """The sequences of a batch `[sequences, tokens]` that is padded on the left, as its mask says, and its width.

    Tensors, arrays or lists. LayoutError for any other mask.
    """
    try:
        ids, shown = torch.as_tensor(token_ids).cpu(), torch.as_tensor(mask).cpu() != 0
    except (RuntimeError, TypeError, ValueError):  # such as rows of unequal length
        raise LayoutError("an attention mask goes with tokens of one width: expected [sequences, tokens] for both") from None
    if (
        ids.shape != shown.shape
        or ids.ndim != 2
        or not ids.numel()
        or not bool(shown[:, -1].all() and (shown[:, 1:] >= shown[:, :-1]).all())
    ):
        raise LayoutError(
            f"an attention mask of shape {list(shown.shape)} for tokens of shape {list(ids.shape)}: expected [sequences, tokens] for "
            "both, zeros at the left of each sequence (its padding) and ones from there on"
        )
    return [row[kept].tolist() for row, kept in zip(ids, shown, strict=True)], ids.shape[1]


def _fed(rows: list[Row], ids: list[list[int]]) -> list[Row]:
    times, left = divmod(len(ids), len(rows))
    if left or not times:
        raise LayoutError(f"the model was fed {len(ids)} sequences with the cache of {len(rows)}; expected as many, or so many of each")
    return [Row(row.prompt, row.token_ids + new) for row, new in zip(_repeated(rows, times), ids, strict=True)]


def _repeated(rows: list[Row], times: int) -> list[Row]:
    return [row for row in rows for _ in range(times)]
