"""The contract of a page format: turns pages into bytes and back, and knows nothing of tiers.

A format is a frozen value named by a short string ("q8", "q4+lz4"); see `kvtier.formats.get_format`. Its payload is self-contained
given the page layout and the format's name: every scale, mean or flag needed to decode is inside.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kvtier.layout import PageLayout

Payload = NDArray[np.uint8]


class Format(ABC):
    """One way to write a page as bytes.

    Implementations hold no mutable state and may be called from several threads at once.
    """

    name: str
    """Canonical name; `get_format(name)` gives an equal format."""

    lossless: bool
    """True if decode(encode(page)) has the same bits as page, for every page (NaN payloads included)."""

    fixed_size: bool
    """True if every payload has exactly `payload_bytes(layout)` bytes; otherwise that is the upper bound."""

    @abstractmethod
    def payload_bytes(self, layout: PageLayout) -> int:
        """Bytes of one payload: exact where `fixed_size`, else the most it can take. LayoutError if the layout does not fit."""

    @abstractmethod
    def encode(self, pages: torch.Tensor, layout: PageLayout) -> list[Payload]:
        """Payloads of `pages` `[n, layers, planes, page_tokens, kv_heads, head_dim]` in `layout.torch_dtype` on any device.

        The result lives in CPU memory, one 1-D uint8 array per page, contiguous. Input is not changed. LayoutError if shape or
        dtype differ. NaN, infinities and extreme values encode to what the format's documentation states, never raise.
        """

    def unpack(self, payloads: Sequence[Payload], layout: PageLayout) -> list[Payload]:
        """Undo a byte stage, if this format has one; the result is what `decode` takes. Raises ValueError on a malformed payload."""
        return list(payloads)

    @abstractmethod
    def decode(self, payloads: Sequence[Payload], layout: PageLayout, layers: slice = slice(None)) -> torch.Tensor:
        """Pages `[n, len(layers), planes, page_tokens, kv_heads, head_dim]` in `layout.torch_dtype` on CPU, from unpacked payloads.

        `layers` is a slice of the layer axis with step 1: decoding layer by layer gives the same numbers as decoding all at once.
        ValueError if a payload has another size than `payload_bytes`.
        """

    def element_bytes(self, layout: PageLayout) -> int:
        """Bytes of each number if the payload is a plain row of them, else 1. A byte stage may group bytes of equal significance."""
        return 1

    def bits_per_value(self, layout: PageLayout) -> float:
        """Bits per number of the page, every scale and flag counted (upper bound where the size varies)."""
        return self.payload_bytes(layout) * 8 / layout.values


def check_pages(pages: torch.Tensor, layout: PageLayout) -> None:
    """LayoutError unless `pages` is `[n, *layout.shape]` of the layout's dtype."""
    from kvtier.errors import LayoutError

    if pages.dim() != 6 or tuple(pages.shape[1:]) != layout.shape:
        raise LayoutError(f"pages have shape {tuple(pages.shape)}; expected [n, {', '.join(map(str, layout.shape))}]")
    if pages.dtype != layout.torch_dtype:
        raise LayoutError(f"pages are {pages.dtype}; expected {layout.torch_dtype}")
