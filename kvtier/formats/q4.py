"""q4 and q3: Hadamard rotation, 16 or 8 Gaussian levels; keys without their page's mean. The cold tiers' formats.

A rotated vector looks like Gaussian noise, for which the best levels are those of Lloyd and Max (Max, "Quantizing for minimum
distortion", 1960), as in TurboQuant (Zandieh et al. 2025). More than half the energy of real keys is a constant per channel (KIVI, Liu et
al. 2024, codes keys per channel for that reason), so keys are first reduced by their mean over the page's tokens (`page_mean.py`).

Block, little-endian, vectors in the rotated basis:
    mean    see page_mean.py                     keys only
    supers  fp16   [heads]                       the largest scale of the head in this page; sign bit: see below
    scales  uint8  [tokens, heads]               low 7 bits c: scale = super * 2**(-c / 32), 0 for c = 127; bit 7: the mean was subtracted
    codes   uint8  plane by plane (see bits.py): q4 [tokens, heads, head_dim / 2]; q3 the two low bits (the level's magnitude) of all
                   vectors [tokens, heads, head_dim / 4], then the third (its sign) of all [tokens, heads, head_dim / 8]
    value = (LEVELS[codes] @ H) * (scale * block**-0.5 / PER_RMS) + (bit 7 ? mean : 0)   with H the +-1 Hadamard matrix

LEVELS are the Lloyd-Max levels in even whole numbers: that costs 0.2 % of squared error, every boundary between levels is a whole number,
and the rotation back adds whole numbers, exactly. The scale is `|x|^2 / <x, levels>`: the coded vector has the same inner product with x
as x itself, so attention logits are not shrunk; on real KV that halves the damage of scale = rms. Steps of 2.2 % in the scales cost 5 % of
KL against fp16 scales and save 0.11 bits; steps of 4.4 % cost 20 %. Four octaves are enough: a vector 16 times smaller than its page's
largest is small against the error of the others.

A page that begins a sequence has the sign bit of its supers set. Its first token, which attention looks at more than at all others (the
attention sink of StreamingLLM, Xiao et al. 2023), has whole-number codes of 8 bits instead of levels, int8 `[heads, head_dim]`; the
8 - bits tokens behind it pay for that with one bit less each; then come the others as usual, these two lots each plane by plane. That one
token takes a third of the KL away. Pages too short to pay are coded as all others, and so are q4 pages whose head_dim is no multiple of 8:
three bits a code would not fill whole bytes.

head_dim must be a multiple of 4 (q4) or 8 (q3). NaN counts as 0, +-Inf as 65504, which is where magnitudes saturate. Zeros stay zeros; a
vector 24 times smaller than the largest of its head in the page gets a scale that is too large by up to its own size, a 32 times smaller
one comes back as zeros (plus the mean, if it was subtracted). Output is always finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from kvtier.errors import LayoutError
from kvtier.formats.bits import pack_planes, plane_bytes, unpack_planes
from kvtier.formats.codec import BlockCodec, BlockShape
from kvtier.formats.hadamard import rotate, unrotate_factor, unrotate_whole
from kvtier.formats.levels import LEVELS2, LEVELS3, LEVELS4, Levels
from kvtier.formats.numbers import FP16_MAX, as_page_dtype, divided, finite, fp16_scale, inverse, numbers_of
from kvtier.formats.page_mean import PageMean, mean_bytes

STEPS_PER_OCTAVE = 32
ZERO_SCALE = 127
SMALLEST_SCALE = 126
LARGEST_CODE = 127
FEWER = {4: LEVELS3, 3: LEVELS2}
"""The levels with one bit less."""
MULTIPLE = {4: 4, 3: 8, 2: 4}
"""What head_dim must be a multiple of for codes of so many bits to fill whole bytes."""


@dataclass(frozen=True)
class Gaussian(BlockCodec):
    """See the file's head. One codec per set of levels."""

    name: str
    levels: Levels
    native_id: int | None

    def block_bytes(self, shape: BlockShape) -> int:
        if shape.head_dim % (multiple := MULTIPLE[self.levels.bits]):
            raise LayoutError(f"{self.name} needs a head_dim that is a multiple of {multiple}, not {shape.head_dim}; use q8")
        return sum(self.sections(shape))

    def sections(self, shape: BlockShape) -> tuple[int, ...]:
        mean = mean_bytes(shape) if shape.keys else 0
        return mean, shape.heads * 2, shape.vectors, *(shape.vectors * each for each in plane_bytes(shape.head_dim, self.levels.bits))

    def can_begin(self, shape: BlockShape) -> bool:
        """Whether pages of that shape are coded differently where they begin a sequence."""
        return shape.tokens > self._payers and shape.head_dim % MULTIPLE[FEWER[self.levels.bits].bits] == 0

    @property
    def _payers(self) -> int:
        """Tokens with one bit less behind a first token with 8 bits."""
        return 8 - self.levels.bits

    def encode(self, blocks: torch.Tensor, shape: BlockShape) -> torch.Tensor:
        parts, vectors, reduced = _without_mean(blocks, shape)
        codes, scales = self.levels.encode(vectors)
        supers = fp16_scale(scales.amax(1, keepdim=True))
        steps = _scale_steps(scales, supers.float()) | reduced << 7
        parts += [supers.flatten(1).view(torch.uint8), steps.to(torch.uint8).flatten(1), *_packed(codes, self.levels)]
        return torch.cat(parts, 1)

    def encode_first(self, blocks: torch.Tensor, shape: BlockShape) -> torch.Tensor:
        if not self.can_begin(shape):
            return self.encode(blocks, shape)
        parts, vectors, reduced = _without_mean(blocks, shape)
        first, short, rest = vectors.split_with_sizes(self._first_tokens(shape), 1)
        fewer = FEWER[self.levels.bits]
        (short_codes, short_scales), (rest_codes, rest_scales) = fewer.encode(short), self.levels.encode(rest)
        first_scales = first.abs().amax(-1, keepdim=True) * (self.levels.per_rms / LARGEST_CODE)
        scales = torch.cat([first_scales, short_scales, rest_scales], 1)
        supers = fp16_scale(scales.amax(1, keepdim=True))
        steps = _scale_steps(scales, supers.float())
        values = step_values().to(steps.device)
        too_small = (steps[:, :1] > 0) & (steps[:, :1] < ZERO_SCALE) & (supers * values[steps[:, :1]] < first_scales)
        steps[:, :1] -= too_small.int()
        factors = divided(supers.float() * values[steps[:, :1]], self.levels.per_rms)
        first_codes = (first * inverse(factors)).round_().clamp_(-LARGEST_CODE, LARGEST_CODE).to(torch.int8)
        marked = supers.flatten(1).view(torch.int16) | -0x8000
        parts += [marked.view(torch.uint8), (steps | reduced << 7).to(torch.uint8).flatten(1), first_codes.view(torch.uint8).flatten(1)]
        parts += [*_packed(short_codes, fewer), *_packed(rest_codes, self.levels)]
        return torch.cat(parts, 1)

    def decode(self, coded: torch.Tensor, shape: BlockShape) -> torch.Tensor:
        before = self.sections(shape)[:3]
        mean, supers, steps, codes = coded.split_with_sizes([*before, coded.shape[1] - sum(before)], 1)
        begins = (supers[:, 1] >= 0x80) & self.can_begin(shape)
        whole = torch.empty(len(coded), shape.tokens, shape.heads, shape.head_dim, device=coded.device)
        per_rms = torch.full((len(coded), shape.tokens, 1, 1), _factor(shape.head_dim, self.levels.per_rms), device=coded.device)
        whole[~begins] = self._levels(codes[~begins], self.levels, shape)
        if bool(begins.any()):
            self._decode_first(codes, begins, shape, whole, per_rms)
        step = steps.reshape(-1, shape.tokens, shape.heads, 1).int()
        largest = numbers_of(supers, torch.float16).abs().float().view(-1, 1, shape.heads, 1)
        scales = largest * step_values().to(coded.device)[step & 127]
        numbers = unrotate_whole(whole) * (scales * per_rms)
        if shape.keys:
            numbers += torch.where(step >= 128, PageMean.decode(mean, shape).values(), 0.0)
        return as_page_dtype(numbers, shape.torch_dtype)

    def _decode_first(
        self, codes: torch.Tensor, begins: torch.Tensor, shape: BlockShape, whole: torch.Tensor, per_rms: torch.Tensor
    ) -> None:
        tokens, fewer = self._first_tokens(shape), FEWER[self.levels.bits]
        values = shape.heads * shape.head_dim
        sizes = [tokens[0] * values, tokens[1] * values * fewer.bits // 8, tokens[2] * values * self.levels.bits // 8]
        first, short, rest = codes[begins].split_with_sizes(sizes, 1)
        whole[begins] = torch.cat(
            [
                first.view(torch.int8).float().view(-1, 1, shape.heads, shape.head_dim),
                self._levels(short, fewer, shape),
                self._levels(rest, self.levels, shape),
            ],
            1,
        )
        paying = begins.view(-1, 1, 1, 1) & (torch.arange(shape.tokens, device=codes.device).view(-1, 1, 1) <= self._payers)
        paying[:, 0] = False
        per_rms[paying] = _factor(shape.head_dim, fewer.per_rms)

    def _first_tokens(self, shape: BlockShape) -> list[int]:
        return [1, self._payers, shape.tokens - 1 - self._payers]

    @staticmethod
    def _levels(packed: torch.Tensor, levels: Levels, shape: BlockShape) -> torch.Tensor:
        sizes = plane_bytes(shape.head_dim, levels.bits)
        vectors = packed.shape[1] // sum(sizes)
        planes = packed.split_with_sizes([vectors * size for size in sizes], 1)
        each = [plane.reshape(len(packed), vectors // shape.heads, shape.heads, size) for plane, size in zip(planes, sizes, strict=True)]
        return levels.decode(unpack_planes(each, levels.bits))


def _packed(codes: torch.Tensor, levels: Levels) -> list[torch.Tensor]:
    """The bytes of some tokens' codes, plane by plane: uint8 `[m, n]` each."""
    return [plane.flatten(1) for plane in pack_planes(codes, levels.bits)]


def _without_mean(blocks: torch.Tensor, shape: BlockShape) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Coded mean (nothing for values), rotated vectors, and int32 `[m, tokens, heads, 1]`: 1 where the mean was subtracted."""
    numbers = finite(blocks, FP16_MAX)
    vectors = rotate(numbers)
    if not shape.keys:
        return [], vectors, torch.zeros(1, dtype=torch.int32, device=vectors.device)
    mean = PageMean.of(numbers)
    vectors, reduced = mean.choose(vectors)
    return mean.encode(), vectors, reduced.int()


def _factor(head_dim: int, per_rms: float) -> float:
    return float(torch.tensor(unrotate_factor(head_dim) / per_rms, dtype=torch.float32))


@lru_cache(maxsize=1)
def step_values() -> torch.Tensor:
    """fp32 `[128]`: what a super is multiplied with; the last one is 0."""
    return torch.tensor([2.0 ** (-step / STEPS_PER_OCTAVE) for step in range(ZERO_SCALE)] + [0.0])


@lru_cache(maxsize=1)
def mantissa_steps() -> torch.Tensor:
    """int32 `[256]`: steps within an octave for the middle of each of 256 equal parts of a mantissa."""
    return torch.tensor([math.floor(STEPS_PER_OCTAVE * math.log2(1 + (part + 0.5) / 256) + 0.5) for part in range(256)], dtype=torch.int32)


def _scale_steps(scales: torch.Tensor, supers: torch.Tensor) -> torch.Tensor:
    """int32 steps 0..127 below the super for each scale. Whole-number arithmetic on the bits of the ratio, the same on every machine."""
    ratio = (scales / supers).nan_to_num_(nan=0.0).clamp_(max=1.0)
    bits = ratio.view(torch.int32)
    steps = (127 - (bits >> 23)) * STEPS_PER_OCTAVE - mantissa_steps().to(scales.device)[(bits >> 15) & 255]
    too_small = (steps > SMALLEST_SCALE + STEPS_PER_OCTAVE) | (ratio == 0)
    return torch.where(too_small, ZERO_SCALE, steps.clamp(0, SMALLEST_SCALE))


Q4 = Gaussian("q4", LEVELS4, 3)
Q3 = Gaussian("q3", LEVELS3, 4)
