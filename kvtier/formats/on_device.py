"""Pages between an engine's tensors and payloads, on the device they are on: gather and encode, decode and scatter. Stateless.

`encode_pages` and `decode_pages` are the two directions. On CUDA devices the Triton kernels of `kvtier.formats.triton` do both in one pass
over memory where they have the format's codecs; without Triton, and for other codecs, torch gathers and the reference codes, with the same
bytes and numbers. The kernels are queued on the current stream and nothing waits for them; torch's way looks at numbers, which does wait.
Arguments are checked before.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch

from kvtier.errors import LayoutError
from kvtier.formats.base import span_of
from kvtier.formats.blocks import BlockFormat
from kvtier.formats.paged import PagedKV
from kvtier.formats.triton import why_missing
from kvtier.layout import PageLayout

if TYPE_CHECKING:
    from kvtier.formats.triton.launch import Launches

Blocks = Sequence[int] | Sequence[Sequence[int]] | torch.Tensor
"""Which blocks hold the pages, `[n, page_blocks]` or, where a page is one block, `[n]`; see `PagedKV.block_table`."""


def encode_pages(
    page_format: BlockFormat,
    source: PagedKV,
    blocks: Blocks,
    out: torch.Tensor,
    rows: Sequence[int] | torch.Tensor | None = None,
    first: Collection[int] = (),
) -> None:
    """Payload of page i of `blocks` into `out[rows[i]]` (default `out[i]`), queued on the current stream of `source.device`.

    `out`: uint8 `[m, at least payload_bytes]`, rows of contiguous bytes, on the same device or in host memory that the device may write
    (pinned); bytes behind the payload are not touched. `rows` on the device are trusted, others checked. `first`: which pages (by index)
    begin a sequence, see `Format.encode`. The bytes are those of `page_format.encode`. LayoutError, before anything is queued, if `out`
    or indices do not fit.
    """
    table = source.block_table(blocks)
    places = _payload_rows(page_format, source, out, rows, len(table), "out")
    begins = _begins(first, len(table))
    if not len(table):
        return
    plan = _launches(page_format, source.layout, source.device)
    if plan is not None:
        from kvtier.formats.triton import launch

        launch.encode(plan, source, table, out, places, None if begins is None else begins.to(source.device, non_blocking=True))
        return
    coded = _encode_by_torch(page_format, source.gather(table, 0, source.layout.layers), source.layout, first)
    out[:, : coded.shape[1]].index_copy_(0, places.to(out.device), coded.to(out.device))


def decode_pages(
    page_format: BlockFormat,
    payloads: torch.Tensor,
    target: PagedKV,
    blocks: Blocks,
    rows: Sequence[int] | torch.Tensor | None = None,
    layers: slice = slice(None),
) -> None:
    """`layers` of payload `payloads[rows[i]]` (default `payloads[i]`) into page i of `blocks`, queued on the current stream.

    `payloads`: uint8 `[m, at least payload_bytes]`, rows of contiguous bytes, on the target's device or in host memory that it may read.
    `layers` is a slice with step 1: a restore by layers calls this once for each, on the same payloads. The numbers are those of
    `page_format.decode`; nothing else of the target is written. Payloads must be ones that `encode` wrote (checksums are the caller's).
    No page may be named twice. LayoutError, before anything is queued, if payloads or indices do not fit.
    """
    table = target.block_table(blocks)
    places = _payload_rows(page_format, target, payloads, rows, len(table), "payloads")
    begin, end = span_of(layers, target.layout)
    if not len(table) or begin == end:
        return
    plan = _launches(page_format, target.layout, target.device)
    if plan is not None:
        from kvtier.formats.triton import launch

        launch.decode(plan, payloads, places, target, table, begin, end)
        return
    size = page_format.payload_bytes(target.layout)
    coded = payloads[:, :size].index_select(0, places.to(payloads.device)).to(target.device)
    target.scatter(table, begin, _decode_by_torch(page_format, coded, target.layout, begin, end))


def fused(page_format: BlockFormat, layout: PageLayout, device: torch.device) -> bool:
    """Whether Triton kernels do the work there: both directions in one pass over memory each."""
    return _launches(page_format, layout, device) is not None


def _launches(page_format: BlockFormat, layout: PageLayout, device: torch.device) -> Launches | None:
    if why_missing(device):
        return None
    from kvtier.formats.triton.launch import launches  # which imports Triton

    return launches(page_format, layout, device)


def _encode_by_torch(page_format: BlockFormat, pages: torch.Tensor, layout: PageLayout, first: Collection[int]) -> torch.Tensor:
    """Payloads `[n, payload_bytes]` of pages `[n, layers, ...]`, on their device."""
    coded = torch.empty((len(pages), page_format.payload_bytes(layout)), dtype=torch.uint8, device=pages.device)
    for special in (False, True):
        some = [index for index in range(len(pages)) if (index in first) == special]
        if not some:
            continue
        chosen = pages[some]
        for layer, row in enumerate(page_format.places(layout)):
            for plane, place in enumerate(row):
                encode = place.codec.encode_first if special else place.codec.encode
                coded[some, place.offset : place.offset + place.size] = encode(chosen[:, layer, plane], place.shape)
    return coded


def _decode_by_torch(page_format: BlockFormat, coded: torch.Tensor, layout: PageLayout, begin: int, end: int) -> torch.Tensor:
    """Layers `begin` to `end` of payloads `[n, payload_bytes]`: `[n, layers, planes, page_tokens, kv_heads, head_dim]`."""
    rows = page_format.places(layout)[begin:end]
    return torch.stack(
        [
            torch.stack([place.codec.decode(coded[:, place.offset : place.offset + place.size], place.shape) for place in row], 1)
            for row in rows
        ],
        1,
    )


def _payload_rows(
    page_format: BlockFormat, paged: PagedKV, payloads: torch.Tensor, rows: Sequence[int] | torch.Tensor | None, count: int, name: str
) -> torch.Tensor:
    """int64 `[count]` on the device. LayoutError if the payloads or the rows do not fit."""
    size = page_format.payload_bytes(paged.layout)
    if payloads.dtype != torch.uint8 or payloads.ndim != 2 or payloads.shape[1] < size or payloads.stride(1) != 1:
        given_as = f"{name} is {payloads.dtype} {list(payloads.shape)}"
        raise LayoutError(f"{given_as}; {page_format.name} needs uint8 [pages, at least {size}] with contiguous rows")
    if payloads.device != paged.device and not (payloads.is_cpu and payloads.is_pinned()):
        raise LayoutError(f"{name} is on {payloads.device}; expected {paged.device}, or host memory that is pinned")
    given = range(count) if rows is None else rows
    places = given if isinstance(given, torch.Tensor) else torch.tensor(list(given), dtype=torch.int64)
    if places.shape != (count,) or places.dtype != torch.int64:
        raise LayoutError(f"rows are {places.dtype} {list(places.shape)}; expected int64 [{count}], one for each page")
    if places.is_cpu and count and not 0 <= int(places.min()) <= int(places.max()) < len(payloads):
        raise LayoutError(f"rows from {int(places.min())} to {int(places.max())}; {name} has {len(payloads)}")
    return places.to(paged.device, non_blocking=True)


def _begins(first: Collection[int], count: int) -> torch.Tensor | None:
    """uint8 `[count]`: 1 for pages that begin a sequence; None if there is none."""
    if not first:
        return None
    if not 0 <= min(first) <= max(first) < count:
        raise LayoutError(f"first names page {max(first) if min(first) >= 0 else min(first)} of {count}")
    begins = torch.zeros(count, dtype=torch.uint8)
    begins[list(first)] = 1
    return begins
