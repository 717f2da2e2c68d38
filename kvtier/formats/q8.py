"""q8: Hadamard rotation along head_dim, then int8 with one fp16 scale per vector. Near-lossless; the host tier's format.

The block of ggml's q8_0 (int8, symmetric, one fp16 scale) over a whole rotated vector; rotation as in `hadamard.py`.

Block, little-endian:
    codes   int8  [tokens, heads, head_dim]   -127..127, in the rotated basis
    scales  fp16  [tokens, heads]             largest rotated magnitude / 127, rounded before its inverse is taken
    value = (codes @ H) * (scale * block**-0.5)   with H the +-1 Hadamard matrix (exact whole numbers until the scale)

NaN counts as 0, +-Inf as the largest finite value, which is where magnitudes saturate: 127 * 65504 / sqrt(block) (1.04e6 at head_dim 64),
or 65504 in an fp16 page. One such value makes the step of its vector so large that small neighbours vanish. Zeros stay zeros (a negative
zero comes back positive). A vector whose largest rotated magnitude is below 3.8e-6 has a scale of 0 and comes back as zeros; up to
7.7e-3 the scale is an fp16 subnormal, absolute errors stay below 4e-6. Output is always finite.

Bits per value at head_dim 64: 8.25. Relative rms error 0.006 on Gaussian data and on real K and V alike, because the rotation removes
outliers; without it real keys lose three times as much KL (docs/quality.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kvtier.formats.codec import BlockCodec, BlockShape
from kvtier.formats.hadamard import block_size, butterflies, unrotate_factor, unrotate_whole
from kvtier.formats.numbers import FP16_MAX, as_page_dtype, finite, numbers_of, symmetric_codes

LARGEST_CODE = 127


@dataclass(frozen=True)
class Q8(BlockCodec):
    """See the file's head."""

    name = "q8"
    native_id = 1

    def block_bytes(self, shape: BlockShape) -> int:
        return shape.vectors * (shape.head_dim + 2)

    def encode(self, blocks: torch.Tensor, shape: BlockShape) -> torch.Tensor:
        limit = LARGEST_CODE * FP16_MAX / math.sqrt(block_size(shape.head_dim))
        codes, scales = symmetric_codes(butterflies(finite(blocks, limit)), LARGEST_CODE, unrotate_factor(shape.head_dim))
        return torch.cat([codes.to(torch.int8).view(torch.uint8).flatten(1), scales.flatten(1).view(torch.uint8)], 1)

    def decode(self, coded: torch.Tensor, shape: BlockShape) -> torch.Tensor:
        codes, scales = coded.split_with_sizes([shape.vectors * shape.head_dim, shape.vectors * 2], 1)
        whole = unrotate_whole(codes.view(torch.int8).reshape(-1, shape.tokens, shape.heads, shape.head_dim).float())
        factors = numbers_of(scales, torch.float16).view(-1, shape.tokens, shape.heads, 1).float() * unrotate_factor(shape.head_dim)
        return as_page_dtype(whole * factors, shape.torch_dtype)
