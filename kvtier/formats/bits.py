"""Codes of 2, 3, 4 and 6 bits as bytes, in planes that vector instructions take apart with shifts.

A vector of head_dim codes becomes one or two planes, put one after the other by `pack`:
    4 bits   low plane, head_dim / 2 bytes: byte i holds codes i and i + head_dim / 2 (upper half)
    3 bits   two low bits of all codes, head_dim / 4 bytes: byte i holds codes i, i + d/4, i + 2d/4, i + 3d/4, lowest first;
             then the third bits, head_dim / 8 bytes: byte i holds codes i + k d/8 in bit k
    2 bits   as the low bits for 3
    6 bits   low four bits as for 4 bits; then the two high bits, head_dim / 4 bytes, as the low bits for 3
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_PLANES = {2: ((0, 2),), 4: ((0, 4),), 3: ((0, 2), (2, 1)), 6: ((0, 4), (4, 2))}
"""Per width: (first bit, bits) of each plane."""


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 `[..., head_dim * bits / 8]` of uint8 codes `[..., head_dim]`."""
    return torch.cat(pack_planes(codes, bits), -1)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes `[..., head_dim]` of `pack`'s result."""
    return unpack_planes(packed.split_with_sizes(plane_bytes(packed.shape[-1] * 8 // bits, bits), -1), bits)


def plane_bytes(head_dim: int, bits: int) -> list[int]:
    """Bytes of each plane of a vector."""
    return [head_dim * width // 8 for _, width in _PLANES[bits]]


def pack_planes(codes: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """The planes of `pack`, each by itself: uint8 `[..., plane_bytes]`."""
    return [_join(codes >> shift & (1 << width) - 1, width) for shift, width in _PLANES[bits]]


def unpack_planes(planes: Sequence[torch.Tensor], bits: int) -> torch.Tensor:
    """uint8 codes `[..., head_dim]` of `pack_planes`' result."""
    first = planes[0]
    head_dim = first.shape[-1] * 8 // _PLANES[bits][0][1]
    codes = torch.zeros(*first.shape[:-1], head_dim, dtype=torch.uint8, device=first.device)
    for (shift, width), plane in zip(_PLANES[bits], planes, strict=True):
        parts = [plane >> place * width & (1 << width) - 1 for place in range(8 // width)]
        codes |= torch.cat(parts, -1) << shift
    return codes


def _join(values: torch.Tensor, width: int) -> torch.Tensor:
    joined, *others = values.chunk(8 // width, -1)
    for place, part in enumerate(others, 1):
        joined = joined | part << place * width
    return joined
