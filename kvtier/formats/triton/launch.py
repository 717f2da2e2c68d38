"""How a format becomes launches of the kernels: blocks coded alike go together, all pages and layers at once. No state but a cache.

Imports Triton: only for devices of which `kvtier.formats.triton.why_missing` has nothing to say.
"""

from __future__ import annotations

import contextlib
import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from kvtier.formats.blocks import BlockFormat
from kvtier.formats.codec import BlockShape
from kvtier.formats.fp8 import E4M3_MAX, FP8
from kvtier.formats.hadamard import block_size, unrotate_factor
from kvtier.formats.numbers import FP16_MAX
from kvtier.formats.paged import PagedKV
from kvtier.formats.places import Place
from kvtier.formats.q4 import Q4, mantissa_steps, step_values
from kvtier.formats.q8 import LARGEST_CODE, Q8
from kvtier.formats.raw import Raw
from kvtier.formats.sparse24 import Sparse24, kept_dtype
from kvtier.formats.triton import pages as kernels
from kvtier.formats.triton.gaussian import decode_factors
from kvtier.layout import PageLayout

CODECS = {
    Raw(): kernels.RAW.value,
    FP8(): kernels.FP8.value,
    Q8(): kernels.Q8.value,
    Q4: kernels.Q4.value,
    Sparse24(): kernels.SPARSE24.value,
}
DTYPES = {"bf16": 0, "fp16": 1, "fp32": 2}
MOST_VALUES = 1 << 15
"""Numbers of one head of one block that a program holds: more do not fit its registers."""

VALUES_PER_WARP = 512
MOST_WARPS = 8


@dataclass(frozen=True, eq=False)
class Group:
    """Blocks that are coded alike. `layers` ascending, and for each block int64 on the device: layer * planes + plane, and its offset."""

    layers: tuple[int, ...]
    numbers: torch.Tensor
    offsets: torch.Tensor
    offset_alignment: int
    can_begin: bool
    shared: dict[str, Any]
    """What both kernels are compiled for."""
    limit: float


@dataclass(frozen=True, eq=False)
class Launches:
    """All groups of one format and layout on one device, and the tables of q4's scales."""

    groups: tuple[Group, ...]
    mantissas: torch.Tensor
    step_values: torch.Tensor


@lru_cache(maxsize=64)
def launches(page_format: BlockFormat, layout: PageLayout, device: torch.device) -> Launches | None:
    """None if a codec of the format has no kernel, or a head of a page is too large for one program. LayoutError as `payload_bytes`."""
    alike: dict[tuple[int, bool], list[tuple[int, int, Place]]] = {}
    for layer, row in enumerate(page_format.places(layout)):
        for plane, place in enumerate(row):
            if place.codec not in CODECS or _power_of_two(place.shape.tokens) * _power_of_two(place.shape.head_dim) > MOST_VALUES:
                return None
            codec = CODECS[place.codec]
            keys = place.shape.keys and codec == CODECS[Q4]
            alike.setdefault((codec, keys), []).append((layer, layer * layout.planes + plane, place))
    groups = tuple(_group(codec, keys, entries, device) for (codec, keys), entries in alike.items())
    return Launches(groups, mantissa_steps().to(device), step_values().to(device))


def _group(codec: int, keys: bool, entries: list[tuple[int, int, Place]], device: torch.device) -> Group:
    shape = entries[0][2].shape
    layers, numbers, places = zip(*entries, strict=True)
    offsets = [place.offset for place in places]
    tokens, width = _power_of_two(shape.tokens), _power_of_two(shape.head_dim)
    shared = {
        "CODEC": codec,
        "KEYS": keys,
        "DTYPE": DTYPES[shape.dtype],
        "TOKENS": shape.tokens,
        "HEADS": shape.heads,
        "HEAD_DIM": shape.head_dim,
        "T": tokens,
        "D": width,
        "BLOCK": block_size(shape.head_dim),
        "NORM": unrotate_factor(shape.head_dim),
        "num_warps": min(MOST_WARPS, max(1, _power_of_two(tokens * width // VALUES_PER_WARP))),
        # Without it products and sums would be fused, and bytes differ from the reference's.
        "enable_fp_fusion": False,
    }
    return Group(
        layers,
        torch.tensor(numbers, dtype=torch.int64).to(device),
        torch.tensor(offsets, dtype=torch.int64).to(device),
        math.gcd(16, *offsets),
        codec == CODECS[Q4] and Q4.can_begin(shape),
        shared,
        _limit(codec, shape),
    )


def encode(
    plan: Launches, source: PagedKV, table: torch.Tensor, out: torch.Tensor, rows: torch.Tensor, begins: torch.Tensor | None
) -> None:
    """Queue the coding of all pages of `table` into `out[rows]`; `begins` uint8 `[n]`, not 0 for those that begin a sequence."""
    with on(source.device):
        for group in plan.groups:
            special = begins if begins is not None and group.can_begin else None
            kernels.encode_kernel[(len(table) * len(group.layers) * source.layout.kv_heads,)](
                source.bases, group.numbers, group.offsets, table, out, rows, table if special is None else special,
                plan.mantissas, plan.step_values, len(group.layers), *source.strides, out.stride(0),
                BLOCK_TOKENS=source.block_tokens, LIMIT=group.limit, FIRST=special is not None,
                SOURCE_ALIGN=source.address_alignment, ALIGN=_alignment(group, out), **group.shared,
            )  # fmt: skip


def decode(plan: Launches, payloads: torch.Tensor, rows: torch.Tensor, target: PagedKV, table: torch.Tensor, first: int, stop: int) -> None:
    """Queue the decoding of layers `first` to `stop` of `payloads[rows]` into the pages of `table`."""
    with on(target.device):
        for group in plan.groups:
            begin, end = bisect_left(group.layers, first), bisect_left(group.layers, stop)
            if begin == end:
                continue
            factor4, factor3 = decode_factors(target.layout.head_dim)
            kernels.decode_kernel[(len(table) * (end - begin) * target.layout.kv_heads,)](
                target.bases, group.numbers, group.offsets, table, payloads, rows, plan.step_values, begin, end - begin,
                *target.strides, payloads.stride(0),
                BLOCK_TOKENS=target.block_tokens, FACTOR4=factor4, FACTOR3=factor3, CAN_BEGIN=group.can_begin,
                TARGET_ALIGN=target.address_alignment, ALIGN=_alignment(group, payloads), **group.shared,
            )  # fmt: skip


def _alignment(group: Group, payloads: torch.Tensor) -> int:
    return math.gcd(group.offset_alignment, payloads.data_ptr(), payloads.stride(0))


def _limit(codec: int, shape: BlockShape) -> float:
    """Magnitude at which numbers saturate before they are coded."""
    limits = {
        CODECS[FP8()]: E4M3_MAX * FP16_MAX,
        CODECS[Q8()]: LARGEST_CODE * FP16_MAX / math.sqrt(block_size(shape.head_dim)),
        CODECS[Q4]: FP16_MAX,
        CODECS[Sparse24()]: torch.finfo(kept_dtype(shape)).max,
    }
    return min(limits.get(codec, math.inf), torch.finfo(shape.torch_dtype).max)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
