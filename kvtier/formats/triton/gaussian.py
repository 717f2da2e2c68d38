"""q4 as Triton functions over the vectors of one head of one block, its page mean and its first pages included. Pure.

The block's layout and why it is so: `q4.py`; levels: `levels.py`; keys without their mean: `page_mean.py`.
"""

from __future__ import annotations

from itertools import pairwise

import triton
import triton.language as tl

from kvtier.formats.hadamard import unrotate_factor
from kvtier.formats.levels import LEVELS3, LEVELS4, Levels
from kvtier.formats.q4 import LARGEST_CODE, SMALLEST_SCALE, STEPS_PER_OCTAVE, ZERO_SCALE
from kvtier.formats.triton.arithmetic import (
    FP16,
    butterflies,
    divided,
    finite,
    half_word,
    inverse,
    joined,
    load_word,
    numbers_of_words,
    rounded,
    store_word,
    sum_of_columns,
    sum_of_rows,
)


def _bytes(values: list[int]) -> int:
    return sum(value << 8 * place for place, value in enumerate(values))


def _magnitudes(levels: Levels) -> list[int]:
    return sorted(level for level in levels.levels if level > 0)


def _boundaries(levels: Levels) -> list[int]:
    magnitudes = _magnitudes(levels)
    return [(lower + upper) // 2 for lower, upper in pairwise(magnitudes)]


MAGNITUDES4_LOW: tl.constexpr = tl.constexpr(_bytes(_magnitudes(LEVELS4)[:4]))
MAGNITUDES4_HIGH: tl.constexpr = tl.constexpr(_bytes(_magnitudes(LEVELS4)[4:]))
MAGNITUDES3: tl.constexpr = tl.constexpr(_bytes(_magnitudes(LEVELS3)))
BOUNDARIES4: tl.constexpr = tl.constexpr(_bytes(_boundaries(LEVELS4)))
BOUNDARIES3: tl.constexpr = tl.constexpr(_bytes(_boundaries(LEVELS3)))
PER_RMS4: tl.constexpr = tl.constexpr(LEVELS4.per_rms)
PER_RMS3: tl.constexpr = tl.constexpr(LEVELS3.per_rms)
ONE_RMS4: tl.constexpr = tl.constexpr(1 / LEVELS4.per_rms)
FIRST_STEP: tl.constexpr = tl.constexpr(LEVELS4.per_rms / LARGEST_CODE)
LARGEST8: tl.constexpr = tl.constexpr(float(LARGEST_CODE))
OCTAVE: tl.constexpr = tl.constexpr(STEPS_PER_OCTAVE)
NO_SCALE: tl.constexpr = tl.constexpr(ZERO_SCALE)
LOWEST: tl.constexpr = tl.constexpr(SMALLEST_SCALE)
PAYERS: tl.constexpr = tl.constexpr(8 - LEVELS4.bits)
"""Tokens with one bit less behind the first of a sequence."""


def decode_factors(head_dim: int) -> tuple[float, float]:
    """What whole numbers times scale are multiplied with after the rotation back: for four bits and for three."""
    return unrotate_factor(head_dim) / LEVELS4.per_rms, unrotate_factor(head_dim) / LEVELS3.per_rms


@triton.jit
def values4(codes):
    """fp32 levels of int32 codes 0..15."""
    above = codes >= 8
    place = tl.where(above, codes - 8, 7 - codes)
    magnitude = tl.where(place < 4, MAGNITUDES4_LOW, MAGNITUDES4_HIGH) >> (place & 3) * 8 & 127
    return tl.where(above, magnitude, -magnitude).to(tl.float32)


@triton.jit
def values3(codes):
    """fp32 levels of int32 codes 0..7: two bits of magnitude, then the sign."""
    magnitude = tl.full(codes.shape, MAGNITUDES3, tl.int32) >> (codes & 3) * 8 & 127
    return tl.where(codes >= 4, -magnitude, magnitude).to(tl.float32)


@triton.jit
def encode_levels(rotated, ROWS: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr, BITS: tl.constexpr):
    """int32 codes `[ROWS, D]` and fp32 scales `[ROWS]`: `Levels.encode`."""
    PER_RMS: tl.constexpr = PER_RMS4 if BITS == 4 else PER_RMS3
    energy = sum_of_rows(rotated * rotated, ROWS, D)
    factor = inverse(tl.sqrt_rn(divided(energy, HEAD_DIM))) * PER_RMS
    scaled = tl.minimum(tl.maximum(rotated * factor[:, None], -128.0), 127.0)
    cells = scaled.to(tl.int32)
    # Not tl.floor, which takes numbers below 1e-38 for 0 on a GPU.
    cells -= (scaled < cells.to(tl.float32)).to(tl.int32)
    # Boundaries are whole numbers and symmetric: cell c of -1, -2, ... is the mirror image of cell -1 - c.
    mirrored = cells ^ (cells >> 31)
    place = tl.zeros([ROWS, D], tl.int32)
    if BITS == 4:
        for boundary in tl.static_range(0, 7):
            place += (mirrored >= (BOUNDARIES4 >> (8 * boundary) & 127)).to(tl.int32)
        codes = tl.where(cells >= 0, 8 + place, 7 - place)
        along = sum_of_rows(values4(codes) * rotated, ROWS, D)
    else:
        for boundary in tl.static_range(0, 3):
            place += (mirrored >= (BOUNDARIES3 >> (8 * boundary) & 127)).to(tl.int32)
        codes = tl.where(cells >= 0, place, place + 4)
        along = sum_of_rows(values3(codes) * rotated, ROWS, D)
    return codes, energy * inverse(along) * PER_RMS


@triton.jit
def scale_steps(scales, largest, mantissas):
    """int32 steps 0..127 below the head's largest scale, a scalar: `q4._scale_steps`."""
    there = largest > 0
    ratio = tl.div_rn(scales, tl.zeros_like(scales) + tl.where(there, largest, 1.0))
    ratio = tl.where(there, tl.minimum(ratio, 1.0), tl.where(scales > 0, 1.0, 0.0))
    bits = ratio.to(tl.int32, bitcast=True)
    steps = (127 - (bits >> 23)) * OCTAVE - tl.load(mantissas + (bits >> 15 & 255))
    too_small = (steps > LOWEST + OCTAVE) | (ratio == 0)
    return tl.where(too_small, NO_SCALE, tl.minimum(tl.maximum(steps, 0), LOWEST))


@triton.jit
def encode_q4(
    numbers, address, head, tokens, rows, begins, mantissas, step_values, KEYS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, T: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr, NORM: tl.constexpr,
    FIRST: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    MEAN: tl.constexpr = HEADS * (2 + HEAD_DIM // 2) if KEYS else 0
    CODES: tl.constexpr = MEAN + HEADS * 2 + TOKENS * HEADS
    HALF: tl.constexpr = HEAD_DIM // 2
    HALF2: tl.constexpr = D // 2
    vectors = tokens * HEADS + head
    pair = tl.arange(0, HALF2)[None, :]
    numbers = finite(numbers, LIMIT)
    rotated = butterflies(numbers, T, D, BLOCK) * NORM
    reduced = tl.zeros([T], tl.int32)
    if KEYS:
        mean = butterflies(divided(sum_of_columns(numbers, T, D), TOKENS), 1, D, BLOCK) * NORM
        mean_codes, mean_scale = encode_levels(mean, 1, D, HEAD_DIM, 4)
        word = half_word(mean_scale)
        store_word(address, head + tl.arange(0, 1), word, tl.arange(0, 1) == 0, 2, ALIGN)
        mean_bytes = joined(mean_codes, 1, D, HEAD_DIM, 2, HALF2)
        tl.store(address + (HEADS * 2 + head * HALF + pair), mean_bytes, pair < HALF)
        shift = values4(mean_codes) * (numbers_of_words(word, FP16) * ONE_RMS4)[:, None]
        shift = tl.where(tl.arange(0, D)[None, :] < HEAD_DIM, shift, 0.0)
        without = rotated - shift
        shorter = sum_of_rows(without * without, T, D) < sum_of_rows(rotated * rotated, T, D)
        shorter = shorter & rows
        rotated = tl.where(shorter[:, None], without, rotated)
        reduced = shorter.to(tl.int32)
    if FIRST:
        special = begins != 0
    else:
        special = False
    if special:
        _encode_first(rotated, reduced, address, head, tokens, rows, mantissas, step_values, MEAN, CODES, HEADS, HEAD_DIM, T, D, ALIGN)
    else:
        codes, scales = encode_levels(rotated, T, D, HEAD_DIM, 4)
        super_word = half_word(tl.max(scales, 0))
        steps = scale_steps(scales, numbers_of_words(super_word, FP16), mantissas)
        _store_scales(address, head, vectors, rows, super_word, steps | reduced << 7, MEAN, HEADS, ALIGN)
        packed = joined(codes, T, D, HEAD_DIM, 2, HALF2)
        tl.store(address + (CODES + vectors[:, None] * HALF + pair), packed, rows[:, None] & (pair < HALF))


@triton.jit
def _store_scales(address, head, vectors, rows, super_word, steps, MEAN: tl.constexpr, HEADS: tl.constexpr, ALIGN: tl.constexpr):
    EVEN: tl.constexpr = 2 if ALIGN % 2 == 0 and MEAN % 2 == 0 else 1
    one = tl.arange(0, 1)
    store_word(address + MEAN, head + one, super_word + tl.zeros([1], tl.uint32), one == 0, 2, EVEN)
    tl.store(address + (MEAN + HEADS * 2 + vectors), steps.to(tl.uint8), rows)


@triton.jit
def _encode_first(
    rotated, reduced, address, head, tokens, rows, mantissas, step_values, MEAN: tl.constexpr, CODES: tl.constexpr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, T: tl.constexpr, D: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """`Gaussian.encode_first`: 8 bits for the first token, three for those that pay, four for the others."""
    SHORT: tl.constexpr = CODES + HEADS * HEAD_DIM
    SIGNS: tl.constexpr = SHORT + PAYERS * HEADS * (HEAD_DIM // 4)
    REST: tl.constexpr = SIGNS + PAYERS * HEADS * (HEAD_DIM // 8)
    vectors = tokens * HEADS + head
    is_first = tokens == 0
    is_short = (tokens > 0) & (tokens <= PAYERS)
    codes3, scales3 = encode_levels(rotated, T, D, HEAD_DIM, 3)
    codes4, scales4 = encode_levels(rotated, T, D, HEAD_DIM, 4)
    first_scales = tl.max(tl.abs(rotated), 1) * FIRST_STEP
    scales = tl.where(is_first, first_scales, tl.where(is_short, scales3, scales4))
    super_word = half_word(tl.max(scales, 0))
    largest = numbers_of_words(super_word, FP16)
    steps = scale_steps(scales, largest, mantissas)
    too_small = is_first & (steps > 0) & (steps < NO_SCALE) & (largest * tl.load(step_values + steps) < first_scales)
    steps -= too_small.to(tl.int32)
    _store_scales(address, head, vectors, rows, super_word | 0x8000, steps | reduced << 7, MEAN, HEADS, ALIGN)
    factors = divided(largest * tl.load(step_values + steps), PER_RMS4)
    whole = rounded(rotated * inverse(factors)[:, None], LARGEST8).to(tl.int32)
    channel = tl.arange(0, D)[None, :]
    at = CODES + head * HEAD_DIM + channel + 0 * tokens[:, None]
    tl.store(address + at, whole.to(tl.uint8), is_first[:, None] & (channel < HEAD_DIM))
    short = (tokens - 1) * HEADS + head
    quarter = tl.arange(0, D // 4)[None, :]
    low = joined(codes3 & 3, T, D, HEAD_DIM, 4, D // 4)
    tl.store(address + (SHORT + short[:, None] * (HEAD_DIM // 4) + quarter), low, is_short[:, None] & (quarter < HEAD_DIM // 4))
    eighth = tl.arange(0, D // 8)[None, :]
    high = joined(codes3 >> 2, T, D, HEAD_DIM, 8, D // 8)
    tl.store(address + (SIGNS + short[:, None] * (HEAD_DIM // 8) + eighth), high, is_short[:, None] & (eighth < HEAD_DIM // 8))
    rest = (tokens - 1 - PAYERS) * HEADS + head
    half = tl.arange(0, D // 2)[None, :]
    packed = joined(codes4, T, D, HEAD_DIM, 2, D // 2)
    others = rows & (tokens > PAYERS)
    tl.store(address + (REST + rest[:, None] * (HEAD_DIM // 2) + half), packed, others[:, None] & (half < HEAD_DIM // 2))


@triton.jit
def _codes4(address, offsets, mask, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """int32 codes `[n, D]` of vectors whose bytes begin at `offsets` `[n, 1]`."""
    channel = tl.arange(0, D)[None, :]
    packed = tl.load(address + (offsets + channel % (HEAD_DIM // 2)), mask, 0).to(tl.int32)
    return packed >> (channel // (HEAD_DIM // 2) * 4) & 15


@triton.jit
def decode_q4(
    address, head, tokens, rows, inside, step_values, KEYS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, T: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, FACTOR4: tl.constexpr, FACTOR3: tl.constexpr,
    CAN_BEGIN: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    MEAN: tl.constexpr = HEADS * (2 + HEAD_DIM // 2) if KEYS else 0
    CODES: tl.constexpr = MEAN + HEADS * 2 + TOKENS * HEADS
    EVEN: tl.constexpr = 2 if ALIGN % 2 == 0 and MEAN % 2 == 0 else 1
    vectors = tokens * HEADS + head
    per_rms = tl.full([T], FACTOR4, tl.float32)
    if CAN_BEGIN:
        special = tl.load(address + (MEAN + 1)) >= 0x80
    else:
        special = False
    if special:
        whole, per_rms = _decode_first(address, head, tokens, inside, CODES, HEADS, HEAD_DIM, D, FACTOR4, FACTOR3)
    else:
        whole = values4(_codes4(address, CODES + vectors[:, None] * (HEAD_DIM // 2), inside, HEAD_DIM, D))
    whole = tl.where(inside, whole, 0.0)
    steps = tl.load(address + (MEAN + HEADS * 2 + vectors), rows, 0).to(tl.int32)
    one = tl.arange(0, 1)
    super_word = load_word(address + MEAN, head + one, one == 0, 2, EVEN) & 0x7FFF
    scales = numbers_of_words(super_word, FP16) * tl.load(step_values + (steps & 127))
    numbers = butterflies(whole, T, D, BLOCK) * (scales * per_rms)[:, None]
    if KEYS:
        mean_word = load_word(address, head + one, one == 0, 2, ALIGN) & 0x7FFF
        channel = tl.arange(0, D)[None, :]
        codes = _codes4(address, HEADS * 2 + (head + one)[:, None] * (HEAD_DIM // 2), channel < HEAD_DIM, HEAD_DIM, D)
        levels = tl.where(channel < HEAD_DIM, values4(codes), 0.0)
        mean = butterflies(levels, 1, D, BLOCK) * (numbers_of_words(mean_word, FP16) * FACTOR4)[:, None]
        numbers += tl.where((steps >= 128)[:, None], mean, 0.0)
    return numbers


@triton.jit
def _decode_first(
    address, head, tokens, inside, CODES: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    FACTOR4: tl.constexpr, FACTOR3: tl.constexpr,
):  # fmt: skip
    """Whole numbers `[T, D]` of a page that begins a sequence, and each token's factor."""
    SHORT: tl.constexpr = CODES + HEADS * HEAD_DIM
    SIGNS: tl.constexpr = SHORT + PAYERS * HEADS * (HEAD_DIM // 4)
    REST: tl.constexpr = SIGNS + PAYERS * HEADS * (HEAD_DIM // 8)
    is_first = tokens == 0
    is_short = (tokens > 0) & (tokens <= PAYERS)
    channel = tl.arange(0, D)[None, :]
    first = tl.load(address + (CODES + head * HEAD_DIM + channel + 0 * tokens[:, None]), inside & is_first[:, None], 0)
    short = ((tokens - 1) * HEADS + head)[:, None]
    shorts = inside & is_short[:, None]
    low = tl.load(address + (SHORT + short * (HEAD_DIM // 4) + channel % (HEAD_DIM // 4)), shorts, 0).to(tl.int32)
    high = tl.load(address + (SIGNS + short * (HEAD_DIM // 8) + channel % (HEAD_DIM // 8)), shorts, 0).to(tl.int32)
    codes3 = (low >> (channel // (HEAD_DIM // 4) * 2) & 3) | (high >> (channel // (HEAD_DIM // 8)) & 1) << 2
    rest = ((tokens - 1 - PAYERS) * HEADS + head)[:, None]
    codes4 = _codes4(address, REST + rest * (HEAD_DIM // 2), inside & (tokens > PAYERS)[:, None], HEAD_DIM, D)
    others = tl.where(is_short[:, None], values3(codes3), values4(codes4))
    whole = tl.where(is_first[:, None], first.to(tl.int8, bitcast=True).to(tl.float32), others)
    return whole, tl.where(is_short, FACTOR3, FACTOR4)
