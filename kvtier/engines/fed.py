"""What a model was fed through one cache: for each row of the batch, the tokens whose KV stands there.

Pages are named by their tokens, so what is committed must be what was fed, whatever beams, speculation and samplers did with the rows.
Everything is noted as it happens without reading a tensor (which would wait for a GPU at every step) and replayed when it is asked for.
Used by the thread that runs the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kvtier.errors import LayoutError


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


def check_mask(mask: object, padding: Sequence[int], rows: int) -> None:
    """LayoutError unless a model's attention mask, None or `[rows, columns]`, hides the left padding of each prompt and nothing else.

    What stands behind a hidden token is not the KV of the tokens it would be named by. Waits for a GPU that has the mask. A mask of
    another form is not looked at.
    """
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and len(mask) == rows and rows % len(padding) == 0:
        left = torch.tensor(padding, device=mask.device).repeat_interleave(rows // len(padding))
        good = torch.equal(mask != 0, torch.arange(mask.shape[1], device=mask.device) >= left[:, None])
    else:
        good = mask is not None or not any(padding)
    if not good:
        raise LayoutError(
            f"the attention mask hides something else than this cache's padding ({', '.join(map(str, padding))} columns at the left); give "
            "the model what left_padded makes of these sequences, or this cache the mask too: TieredCache(..., attention_mask=mask)"
        )


def unpadded(token_ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    """The sequences of a batch `[sequences, tokens]` that is padded on the left, as its mask says. LayoutError for any other mask."""
    shown = mask != 0
    if token_ids.shape != mask.shape or mask.ndim != 2 or not bool(shown[:, -1].all()) or bool((shown[:, :-1] & ~shown[:, 1:]).any()):
        raise LayoutError(
            f"an attention mask of shape {list(mask.shape)} for tokens of shape {list(token_ids.shape)}: expected [sequences, tokens] for "
            "both, zeros at the left of each sequence (its padding) and ones from there on"
        )
    return [row[kept].tolist() for row, kept in zip(token_ids, shown, strict=True)]


def _fed(rows: list[Row], ids: list[list[int]]) -> list[Row]:
    times, left = divmod(len(ids), len(rows))
    if left or not times:
        raise LayoutError(f"the model was fed {len(ids)} sequences with the cache of {len(rows)}; expected as many, or so many of each")
    return [Row(row.prompt, row.token_ids + new) for row, new in zip(_repeated(rows, times), ids, strict=True)]


def _repeated(rows: list[Row], times: int) -> list[Row]:
    return [row for row in rows for _ in range(times)]
