"""q4: Hadamard rotation, 16 Gaussian levels, one fp16 scale per vector; keys without their page's mean. The cold tiers' format.

A rotated vector looks like Gaussian noise, for which the best 16 levels are those of Lloyd and Max (Max, "Quantizing for minimum
distortion", 1960), as in TurboQuant (Zandieh et al. 2025). More than half the energy of real keys is a constant per channel (KIVI, Liu et
al. 2024, codes keys per channel for that reason), so plane 0 of two-plane pages, the keys, is first reduced by its mean over the page's
tokens. Attention sinks (the first tokens) do not share that mean and would be ruined by it, and they take much attention: each key
chooses whichever of the two vectors is shorter and says so in the sign bit of its scale. A single plane (MLA latent) has no mean.

Payload, in this order, little-endian; vectors in the rotated basis:
    scales       fp16   [layers, planes, page_tokens, kv_heads]   magnitude: scale of the vector; sign bit set: its mean was subtracted
    codes        uint8  [layers, planes, page_tokens, kv_heads, head_dim / 2]   two 4-bit codes per byte, even index in the low half
    mean scales  fp16   [layers, kv_heads]                        only if planes is 2
    mean codes   int8   [layers, kv_heads, head_dim]              only if planes is 2
    vector = |scale| / LEVELS_PER_RMS * LEVELS[codes] + (sign bit ? mean scale * mean codes : 0)
    value  = block**-0.5 * (vector @ H)   with H the +-1 Hadamard matrix of the block

LEVELS are the Lloyd-Max levels in even whole numbers: that costs 0.2 % of squared error (0.00952 against 0.00950), every boundary between
levels is a whole number, and the rotation back adds whole numbers, exactly. The scale is `|x|^2 / <x, levels>`: the coded vector has the
same inner product with x as x itself, so attention logits are not shrunk. Measured KL with scale = rms 0.0040, least squares 0.0031, this
0.0028 (ideal levels). Searching the rms over (0.9, 1, 1.1) gains another 11 % for twice the encoding time; not done.

head_dim must be even. NaN counts as 0, +-Inf as 65504, which is where magnitudes saturate (a vector whose energy lies in one rotated
channel, such as a constant one, saturates from 22,000 on at head_dim 64). Zeros stay zeros. A vector with rms below 3e-8 comes back as
zeros; up to 6e-5 the scale is an fp16 subnormal and gets coarser. Output is always finite.

Bits per value at head_dim 64 and 16 tokens per page: 4.51 (4.25 + 0.52 for keys' means; 4.31 at 64 tokens). Relative rms error 0.10 on
Gaussian data and real values, 0.044 on real keys. Measured on SmolLM2-135M (context KV of 768 tokens in the format): KL 0.0026, top-1
97.1 %; without the mean 0.0065, with the mean always subtracted 0.0096.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from kvtier.errors import LayoutError
from kvtier.formats.hadamard import rotate, unrotate_factor, unrotate_whole
from kvtier.formats.q8 import dequantize_rotated, quantize
from kvtier.formats.sections import FP16_MAX, SectionedFormat, finite, fp16_scale, inverse, limit_of, store
from kvtier.layout import PageLayout

LEVELS = (-122, -92, -72, -56, -42, -30, -18, -6, 6, 18, 30, 42, 56, 72, 92, 122)
LEVELS_PER_RMS = 44.64


@dataclass(frozen=True)
class Q4(SectionedFormat):
    """See the file's head."""

    name = "q4"
    lossless = False

    def section_bytes(self, layout: PageLayout) -> tuple[int, ...]:
        if layout.head_dim % 2:
            raise LayoutError(f"q4 packs two numbers per byte and needs an even head_dim; the page layout has {layout.head_dim}; use q8")
        vectors = layout.planes * layout.page_tokens * layout.kv_heads
        means = (layout.kv_heads * 2, layout.kv_heads * layout.head_dim) if layout.planes == 2 else ()
        return (vectors * 2, vectors * layout.head_dim // 2, *means)

    def encode_layers(self, layers: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rotated = rotate(finite(layers, limit_of(layers.dtype, FP16_MAX)))
        if layers.shape[1] == 1:
            return _encode_vectors(rotated)
        keys = rotated[:, 0]
        mean_codes, mean_scales = quantize(keys.mean(1))
        means = (mean_codes * mean_scales.float()).unsqueeze(1)
        shorter = _energy(keys - means) < _energy(keys)
        keys.addcmul_(means, shorter, value=-1)
        scales, codes = _encode_vectors(rotated)
        scales[:, 0] = torch.where(shorter, -scales[:, 0], scales[:, 0])
        return scales, codes, mean_scales, mean_codes

    def decode_layers(self, sections: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        scales = sections[0].view(torch.float16).view(*out.shape[:-1], 1)
        factors = scales.float().abs_().mul_(unrotate_factor(out.shape[-1]) / LEVELS_PER_RMS)
        numbers = unrotate_whole(_levels_of(sections[1]).view(out.shape)).mul_(factors)
        if out.shape[1] == 2:
            layers, _, _, heads, head_dim = out.shape
            means = dequantize_rotated(sections[3], sections[2], torch.Size((layers, 1, heads, head_dim)))
            numbers[:, 0].addcmul_(means, torch.signbit(scales[:, 0]))
        store(numbers, out)


def _energy(vectors: torch.Tensor) -> torch.Tensor:
    return vectors.square().sum(-1, keepdim=True)


def _encode_vectors(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp16 scales `[..., 1]` and packed codes `[..., head_dim / 2]` of fp32 vectors `[..., head_dim]`."""
    energy = _energy(vectors)
    rms = (energy / vectors.shape[-1]).sqrt_()
    cells = (vectors * (inverse(rms) * LEVELS_PER_RMS)).floor_().clamp_(-128, 127).to(torch.int8)
    pairs = cells.view(torch.int16).int().bitwise_and_(0xFFFF)
    codes = _codes_of_cells(vectors.device).index_select(0, pairs.view(-1)).view(pairs.shape)
    along = (_levels_of(codes).view(vectors.shape) * vectors).sum(-1, keepdim=True)
    return fp16_scale(energy * inverse(along) * LEVELS_PER_RMS), codes


def _levels_of(codes: torch.Tensor) -> torch.Tensor:
    """fp32 levels, flat, of packed codes: one look-up of eight bytes gives the two numbers of a byte."""
    return _level_pairs(codes.device).index_select(0, codes.view(-1).int()).view(torch.float32)


@lru_cache(maxsize=8)
def _level_pairs(device: torch.device) -> torch.Tensor:
    """Per byte the fp32 levels of its low and its high half, as one int64."""
    byte = torch.arange(256)
    levels = torch.tensor(LEVELS, dtype=torch.float32)
    return torch.stack([levels[byte & 15], levels[byte >> 4]], dim=1).view(torch.int64).view(-1).to(device)


@lru_cache(maxsize=8)
def _codes_of_cells(device: torch.device) -> torch.Tensor:
    """Packed byte for two neighbouring cells, an int8 each, read as one little-endian 16-bit number.

    Cell c holds the numbers from c to c + 1. Boundaries between levels are whole numbers, so all of a cell has the same nearest level.
    """
    levels = torch.tensor(LEVELS)
    boundaries = (levels[1:] + levels[:-1]) // 2
    nearest = torch.bucketize(torch.arange(256, dtype=torch.uint8).view(torch.int8).long(), boundaries, right=True)
    pair = torch.arange(65536)
    return (nearest[pair & 255] | nearest[pair >> 8] << 4).to(torch.uint8).to(device)
