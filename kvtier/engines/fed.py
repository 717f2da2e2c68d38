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


def _fed(rows: list[Row], ids: list[list[int]]) -> list[Row]:
    times, left = divmod(len(ids), len(rows))
    if left or not times:
        raise LayoutError(f"the model was fed {len(ids)} sequences with the cache of {len(rows)}; expected as many, or so many of each")
    return [Row(row.prompt, row.token_ids + new) for row, new in zip(_repeated(rows, times), ids, strict=True)]


def _repeated(rows: list[Row], times: int) -> list[Row]:
    return [row for row in rows for _ in range(times)]
