"""Payloads made of per-layer sections: what raw, fp8, q8 and q4 share.

A payload is a few sections one after the other, each `[layers, bytes of this section per layer]`, without header or padding, numbers in
little-endian order. So a slice of layers is one contiguous stretch of each section, and the layers of all pages of a call are coded in
one batch. Nothing of one layer depends on another, and decoding is exact arithmetic up to one rounding per step, so layer by layer,
page by page or all at once give the same numbers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
import torch

from kvtier.formats.base import Format, Payload, check_pages
from kvtier.layout import PageLayout

FP16_MAX = 65504.0
CHUNK_VALUES = 1 << 19
"""Numbers coded at once: temporaries stay at a few MiB, whatever the number of pages."""


class SectionedFormat(Format):
    """A format of fixed size whose payload is a row of per-layer sections."""

    fixed_size = True

    @abstractmethod
    def section_bytes(self, layout: PageLayout) -> tuple[int, ...]:
        """Bytes of one layer in each section, in the order in which the sections lie. LayoutError if the layout does not fit."""

    @abstractmethod
    def encode_layers(self, layers: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Sections of `layers` `[m, planes, page_tokens, kv_heads, head_dim]`, each `[m, ...]`, any dtype, `section_bytes` per row."""

    @abstractmethod
    def decode_layers(self, sections: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        """Fill `out` `[m, planes, page_tokens, kv_heads, head_dim]` from sections of uint8 `[m, section_bytes]`."""

    def payload_bytes(self, layout: PageLayout) -> int:
        return layout.layers * sum(self.section_bytes(layout))

    def encode(self, pages: torch.Tensor, layout: PageLayout) -> list[Payload]:
        check_pages(pages, layout)
        starts, sizes = self._sections(layout)
        payloads = [np.empty(self.payload_bytes(layout), np.uint8) for _ in range(len(pages))]
        for some_pages, some_layers in _chunks(len(pages), layout.layers, layout):
            batch = pages[some_pages, some_layers].flatten(0, 1)
            for start, size, section in zip(starts, sizes, self.encode_layers(batch), strict=True):
                rows = section.contiguous().view(torch.uint8).cpu().numpy().reshape(some_pages.stop - some_pages.start, -1)
                for payload, row in zip(payloads[some_pages], rows, strict=True):
                    payload[start + some_layers.start * size : start + some_layers.stop * size] = row
        return payloads

    def decode(self, payloads: Sequence[Payload], layout: PageLayout, layers: slice = slice(None)) -> torch.Tensor:
        starts, sizes = self._sections(layout)
        expected = self.payload_bytes(layout)
        for payload in payloads:
            if payload.dtype != np.uint8 or payload.shape != (expected,):
                raise ValueError(f"{self.name} payload is {payload.dtype} {payload.shape}; expected uint8 ({expected},) for {layout}")
        first, stop, step = layers.indices(layout.layers)
        if step != 1:
            raise ValueError(f"layers is {layers}; expected a slice with step 1")
        count = max(0, stop - first)
        out = torch.empty((len(payloads), count, *layout.shape[1:]), dtype=layout.torch_dtype)
        for some_pages, some_layers in _chunks(len(payloads), count, layout):
            rows = some_layers.stop - some_layers.start
            sections = []
            for start, size in zip(starts, sizes, strict=True):
                begin = start + (first + some_layers.start) * size
                parts = [payload[begin : begin + rows * size] for payload in payloads[some_pages]]
                sections.append(torch.from_numpy(np.concatenate(parts).reshape(-1, size)))
            self.decode_layers(tuple(sections), out[some_pages, some_layers].flatten(0, 1))
        return out

    def _sections(self, layout: PageLayout) -> tuple[list[int], tuple[int, ...]]:
        sizes = self.section_bytes(layout)
        return [layout.layers * before for before in accumulate(sizes[:-1], initial=0)], sizes


def _chunks(pages: int, layers: int, layout: PageLayout) -> Iterator[tuple[slice, slice]]:
    """Cut pages and layers into batches of about CHUNK_VALUES: several whole pages, or some layers of one page."""
    at_once = max(1, CHUNK_VALUES * layout.layers // layout.values)
    for page in range(0, pages, pages_at_once := max(1, at_once // max(1, layers))):
        for layer in range(0, layers, at_once):
            yield slice(page, min(page + pages_at_once, pages)), slice(layer, min(layer + at_once, layers))


def finite(numbers: torch.Tensor, limit: float) -> torch.Tensor:
    """fp32 `numbers` with NaN as 0 and everything within +-limit; the same tensor if nothing had to change."""
    numbers = numbers.float()
    lowest, highest = torch.aminmax(numbers)
    if bool(lowest >= -limit) and bool(highest <= limit):
        return numbers
    return numbers.clamp(-limit, limit).nan_to_num_(nan=0.0)


def limit_of(dtype: torch.dtype, limit: float) -> float:
    """The largest magnitude that both the page's dtype and the format can carry."""
    return min(limit, torch.finfo(dtype).max)


def fp16_scale(scale: torch.Tensor) -> torch.Tensor:
    """`scale` as fp16, saturated instead of infinite."""
    return scale.clamp(max=FP16_MAX).half()


def inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale in fp32; 0 where the scale is 0 or too small to have a finite inverse, so that such a vector codes as zeros."""
    scale = scale.float()
    return torch.where(scale >= torch.finfo(torch.float32).smallest_normal, 1 / scale, 0.0)


def store(numbers: torch.Tensor, out: torch.Tensor) -> None:
    """Copy fp32 `numbers` to `out`, saturating where fp16 would overflow."""
    if out.dtype == torch.float16:
        numbers = numbers.clamp(-FP16_MAX, FP16_MAX)
    out.copy_(numbers)
