"""Raw pages between a page-first pool and rows of bytes: by copies, one for each run of neighbours, or by one kernel. Stateless.

A copy engine moves a long run at the link's full speed but takes some microseconds to be told of each; a kernel is told once of all pages
but moves them with the GPU's own loads and stores. Which is faster depends on machine, page size and how scattered the pages are: both
are measured (`CopyCosts.measured`) and compared (`copies_are_faster`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from kvtier.errors import LayoutError
from kvtier.formats import get_format
from kvtier.formats.blocks import BlockFormat
from kvtier.formats.on_device import encode_pages
from kvtier.formats.paged import PagedKV
from kvtier.layout import PageLayout

Way = Literal["copy", "kernel"]


@dataclass(frozen=True)
class CopyCosts:
    """What one copy of neighbouring bytes and one kernel take: seconds to start, bytes per second then."""

    copy_start_s: float
    copy_bytes_per_s: float
    kernel_start_s: float
    kernel_bytes_per_s: float

    @classmethod
    def measured(cls, seconds_of: Callable[[Way, int], float], page_bytes: int, pages: int) -> CopyCosts:
        """From the seconds that one copy or kernel takes for 1 and for `pages` neighbouring pages, as `seconds_of` measures them.

        ValueError unless `pages` is at least 2 and more pages take longer.
        """
        if pages < 2:
            raise ValueError(f"copy costs: measured with {pages} pages; expected at least 2")
        fitted: list[float] = []
        for way in ("copy", "kernel"):
            one, all_of_them = seconds_of(way, 1), seconds_of(way, pages)
            if all_of_them <= one:
                raise ValueError(f"copy costs: a {way} of {pages} pages took {all_of_them} s, of one {one} s; measure more pages")
            page_s = (all_of_them - one) / (pages - 1)
            fitted += [max(0.0, one - page_s), page_bytes / page_s]
        return cls(*fitted)


def copies_are_faster(costs: CopyCosts, page_bytes: int, pages: int, runs: int) -> bool:
    """Whether `runs` copies move `pages` pages at least as fast as one kernel."""
    total = pages * page_bytes
    copies_s = runs * costs.copy_start_s + total / costs.copy_bytes_per_s
    return copies_s <= costs.kernel_start_s + total / costs.kernel_bytes_per_s


def runs_of(sources: Sequence[int], targets: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first source, first target, rows) of each stretch in which both count up by one, in order."""
    begin = 0
    for index in range(1, len(sources) + 1):
        if index == len(sources) or sources[index] != sources[index - 1] + 1 or targets[index] != targets[index - 1] + 1:
            yield sources[begin], targets[begin], index - begin
            begin = index


def copy_pages(
    pool: torch.Tensor, layout: PageLayout, rows: Sequence[int], out: torch.Tensor, out_rows: Sequence[int], costs: CopyCosts
) -> Way:
    """Raw bytes of `pool[rows]` to `out[out_rows]`, queued on the pool's current stream, the faster way of the two; says which it was.

    `pool`: `[pages, *layout.shape]`, contiguous. `out`: uint8 `[m, page_bytes]`, contiguous, on the same device or pinned. LayoutError,
    before anything is queued, if something does not fit.
    """
    if not pool.is_contiguous() or not out.is_contiguous() or out.dtype != torch.uint8 or out.shape[1:] != (layout.page_bytes,):
        raise LayoutError(f"copy pages: expected a contiguous pool and contiguous uint8 [m, {layout.page_bytes}]; out is {list(out.shape)}")
    if pool.shape[1:] != layout.shape or len(rows) != len(out_rows):
        raise LayoutError(f"copy pages: {len(rows)} rows of {list(pool.shape)} to {len(out_rows)} rows; expected as many, of {layout}")
    for name, some, places in (("rows", rows, len(pool)), ("out_rows", out_rows, len(out))):
        if some and not 0 <= min(some) <= max(some) < places:
            raise LayoutError(f"copy pages: {name} from {min(some)} to {max(some)}; there are {places}")
    runs = list(runs_of(rows, out_rows))
    if not copies_are_faster(costs, layout.page_bytes, len(rows), len(runs)):
        raw = get_format("raw")
        assert isinstance(raw, BlockFormat)
        encode_pages(raw, PagedKV.of_pool(pool, layout), rows, out, out_rows)
        return "kernel"
    coded = pool.view(len(pool), -1).view(torch.uint8)
    for source, target, count in runs:
        out[target : target + count].copy_(coded[source : source + count], non_blocking=True)
    return "copy"
