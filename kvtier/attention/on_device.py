"""Digests where the keys are: by the Triton kernels on GPUs that have them, else by torch, with the same results but for rounding.

A digest's numbers are whole, and sums go in another order in a kernel: at most one byte in two hundred has a number that is rounded to the
other side (`tests/attention/test_kernels.py`). Logits differ by some 1e-5. Choosing the best pages from them stays with torch: it is one
number a page. Stateless; queued on the current stream, and nothing waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kvtier.attention import digest
from kvtier.attention.digest import DigestLayout
from kvtier.cuda.kernels import why_missing
from kvtier.formats.paged import PagedKV

if TYPE_CHECKING:
    from types import ModuleType


def encode_paged(paged: PagedKV, blocks: Sequence[int] | Sequence[Sequence[int]] | torch.Tensor) -> torch.Tensor:
    """`digest.encode` of the keys of these pages, straight from where an engine keeps them: uint8 `[pages, layers, kv_heads,
    digest_bytes]` on their device. LayoutError for blocks that do not exist (see `PagedKV.block_table`)."""
    table = paged.block_table(blocks)
    kernels = _kernels(DigestLayout.of(paged.layout), paged.device)
    if kernels is not None:
        made: torch.Tensor = kernels.encode_paged(paged, table)
        return made
    keys = [row[0][table].flatten(1, 2) for row in paged.views]
    return digest.encode(torch.stack(keys, 1))


def page_logits(digests: torch.Tensor, queries: torch.Tensor, shape: DigestLayout, scaling: float | None = None) -> torch.Tensor:
    """`digest.page_logits`, on the device of both."""
    kernels = _kernels(shape, digests.device)
    if kernels is None:
        return digest.page_logits(digests, queries, shape, scaling)
    digest.check_logits(digests, queries, shape)
    found: torch.Tensor = kernels.page_logits(digests, queries, shape, queries.shape[2] ** -0.5 if scaling is None else scaling)
    return found


def _kernels(shape: DigestLayout, device: torch.device) -> ModuleType | None:
    if why_missing(device):
        return None
    from kvtier.attention import kernels  # which imports Triton

    return kernels if kernels.fits(shape) else None
