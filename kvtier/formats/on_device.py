"""Block formats where the pages are: encode from and decode into a pool of pages on a GPU, without the bytes passing through the host.

A payload has the bytes of `BlockFormat.encode`, one a row of a uint8 tensor beside the pool. `TorchKernels` is the reference, made of the
codecs themselves; compiled kernels take its place where there are some. All calls only launch work on the current stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from kvtier.errors import LayoutError
from kvtier.formats.base import Format
from kvtier.formats.blocks import BlockFormat
from kvtier.formats.lossless import Staged
from kvtier.layout import PageLayout

_VALUES_AT_ONCE = 1 << 24
"""Numbers the reference codes at once: temporaries of some 100 MiB of GPU memory."""


class Kernels(Protocol):
    """Encode and decode of one format and layout on a device.

    `pool` is `[slots, *layout.shape]` of the layout's dtype, contiguous; `slots` names its pages, `coded` is uint8 `[pages, payload_bytes]`
    or wider, both on the same device.
    """

    def encode(self, pool: torch.Tensor, slots: Sequence[int], coded: torch.Tensor, first: Sequence[int]) -> None:
        """Payload of page `slots[i]` to `coded[i]`. `first`: which i begin a sequence."""

    def decode(self, coded: torch.Tensor, pool: torch.Tensor, slots: Sequence[int], begin: int, end: int) -> None:
        """Layers `begin` to `end` of `coded[i]` to page `slots[i]`."""


class OnDevice:
    """What a format is to a GPU. `inner` is the format without its byte stage, which stays on the host.

    `layer_starts`: where each layer begins in a payload, and where the last one ends. `kernels` is None if payloads are the pages' own
    bytes, which then need no more than to be copied. LayoutError for formats that are not made of blocks.
    """

    def __init__(self, format: Format, layout: PageLayout) -> None:
        inner = format.inner if isinstance(format, Staged) else format
        if not isinstance(inner, BlockFormat):
            raise LayoutError(f"format {format.name} is not made of blocks, so a GPU cannot code it; use another one, or device.place cpu")
        self.inner = inner
        self.payload_bytes = inner.payload_bytes(layout)
        self.layer_starts = inner.layer_starts(layout)
        self.kernels: Kernels | None = None if inner.is_plain else TorchKernels(inner, layout)


class TorchKernels:
    """The reference: the codecs' own torch code, page by page where layers are coded differently."""

    def __init__(self, format: BlockFormat, layout: PageLayout) -> None:
        self._format = format
        self._layout = layout

    def encode(self, pool: torch.Tensor, slots: Sequence[int], coded: torch.Tensor, first: Sequence[int]) -> None:
        """See `Kernels`."""
        special = set(first)
        for begins in (False, True):
            rows = [row for row in range(len(slots)) if (row in special) == begins]
            for some in _parts(rows, self._layout.values):
                chosen = pool[_index([slots[row] for row in some], pool.device)]
                to = _index(some, pool.device)
                for start, stop, blocks in self._format.encode_blocks(chosen, self._layout, begins):
                    coded[to, start:stop] = blocks

    def decode(self, coded: torch.Tensor, pool: torch.Tensor, slots: Sequence[int], begin: int, end: int) -> None:
        """See `Kernels`."""
        for some in _parts(range(len(slots)), self._layout.values * (end - begin) // self._layout.layers):
            to = _index([slots[row] for row in some], pool.device)
            for layer, plane, numbers in self._format.decode_blocks(coded[some[0] : some[-1] + 1], self._layout, begin, end):
                pool[to, layer, plane] = numbers


def _parts(rows: Sequence[int], values_per_row: int) -> list[Sequence[int]]:
    at_once = max(1, _VALUES_AT_ONCE // max(1, values_per_row))
    return [rows[start : start + at_once] for start in range(0, len(rows), at_once)]


def _index(rows: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.as_tensor(rows, dtype=torch.int64).to(device, non_blocking=True)
