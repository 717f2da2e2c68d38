"""q8: Hadamard rotation along head_dim, then int8 with one fp16 scale per vector. Near-lossless; the host tier's format.

The block of ggml's q8_0 (int8, symmetric, one fp16 scale) over a whole rotated vector; rotation as in `hadamard.py`.

Payload, in this order, little-endian:
    codes   int8  [layers, planes, page_tokens, kv_heads, head_dim]   -127..127, in the rotated basis
    scales  fp16  [layers, planes, page_tokens, kv_heads]             largest rotated magnitude / 127, rounded before its inverse is taken
    value = scale * block**-0.5 * (codes @ H)   with H the +-1 Hadamard matrix of the block (exact whole numbers until the scale)

NaN counts as 0, +-Inf as the largest finite value, which is where magnitudes saturate: 127 * 65504 / sqrt(block) (1.04e6 at head_dim 64),
or 65504 in an fp16 page. One such value makes the step of its vector so large that small neighbours vanish. Zeros stay zeros (a negative
zero comes back positive). A vector whose largest rotated magnitude is below 3.8e-6 has a scale of 0 and comes back as zeros; up to
7.7e-3 the scale is an fp16 subnormal, absolute errors stay below 4e-6. Output is always finite.

Bits per value at head_dim 64: 8.25. Relative rms error 0.006 on Gaussian data and on real K and V alike, because the rotation removes
outliers. Measured on SmolLM2-135M (context KV of 768 tokens in the format): KL 0.00002, top-1 99.7 % (without rotation 0.00007, 99.2 %).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kvtier.formats.hadamard import block_size, rotate, unrotate_factor, unrotate_whole
from kvtier.formats.sections import FP16_MAX, SectionedFormat, finite, fp16_scale, inverse, limit_of, store
from kvtier.layout import PageLayout

LARGEST_CODE = 127


@dataclass(frozen=True)
class Q8(SectionedFormat):
    """See the file's head."""

    name = "q8"
    lossless = False

    def section_bytes(self, layout: PageLayout) -> tuple[int, ...]:
        vectors = layout.planes * layout.page_tokens * layout.kv_heads
        return (vectors * layout.head_dim, vectors * 2)

    def encode_layers(self, layers: torch.Tensor) -> tuple[torch.Tensor, ...]:
        limit = LARGEST_CODE * FP16_MAX / math.sqrt(block_size(layers.shape[-1]))
        return quantize(rotate(finite(layers, limit_of(layers.dtype, limit))))

    def decode_layers(self, sections: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        codes, scales = sections
        store(dequantize_rotated(codes, scales, out.shape), out)


def quantize(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 codes of fp32 `vectors` `[..., head_dim]` and their fp16 scales `[..., 1]`."""
    scales = fp16_scale(vectors.abs().amax(-1, keepdim=True) / LARGEST_CODE)
    codes = (vectors * inverse(scales)).round_().clamp_(-LARGEST_CODE, LARGEST_CODE).to(torch.int8)
    return codes, scales


def dequantize_rotated(codes: torch.Tensor, scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """fp32 vectors `[..., head_dim]` of `shape`, rotated back, from the raw bytes of their codes and scales."""
    whole = unrotate_whole(codes.view(torch.int8).view(shape).float())
    return whole.mul_(scales.view(torch.float16).view(*shape[:-1], 1).float() * unrotate_factor(shape[-1]))
