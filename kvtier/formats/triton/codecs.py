"""q8, fp8 and sparse24 as Triton functions over the vectors of one head of one block: `[T, D]`, padded to powers of two. Pure.

`address` is the coded block; `vectors` `[T]` numbers its vectors in their order. Layouts: `q8.py`, `fp8.py`, `sparse24.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvtier.formats.fp8 import E4M3_MAX
from kvtier.formats.q8 import LARGEST_CODE
from kvtier.formats.triton.arithmetic import (
    BF16,
    FP16,
    FP32,
    butterflies,
    divided,
    finite,
    half_word,
    inverse,
    load_word,
    numbers_of_words,
    rounded,
    store_word,
    words_of_numbers,
)

LARGEST8: tl.constexpr = tl.constexpr(float(LARGEST_CODE))
LARGEST_E4M3: tl.constexpr = tl.constexpr(E4M3_MAX)


@triton.jit
def encode_q8(
    numbers, address, vectors, rows, inside, COUNT: tl.constexpr, HEAD_DIM: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, LIMIT: tl.constexpr, NORM: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    SCALES_ALIGN: tl.constexpr = 2 if ALIGN % 2 == 0 and COUNT * HEAD_DIM % 2 == 0 else 1
    rotated = butterflies(finite(numbers, LIMIT), T, D, BLOCK)
    word = half_word(divided(tl.max(tl.abs(rotated), 1) * NORM, LARGEST8))
    factors = inverse(numbers_of_words(word, FP16)) * NORM
    codes = rounded(rotated * factors[:, None], LARGEST8).to(tl.int32)
    channel = tl.arange(0, D)
    tl.store(address + (vectors[:, None] * HEAD_DIM + channel[None, :]), codes.to(tl.uint8), inside)
    store_word(address + COUNT * HEAD_DIM, vectors, word, rows, 2, SCALES_ALIGN)


@triton.jit
def decode_q8(
    address, vectors, rows, inside, COUNT: tl.constexpr, HEAD_DIM: tl.constexpr, T: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    NORM: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    SCALES_ALIGN: tl.constexpr = 2 if ALIGN % 2 == 0 and COUNT * HEAD_DIM % 2 == 0 else 1
    channel = tl.arange(0, D)
    codes = tl.load(address + (vectors[:, None] * HEAD_DIM + channel[None, :]), inside, 0).to(tl.int8, bitcast=True)
    scales = numbers_of_words(load_word(address + COUNT * HEAD_DIM, vectors, rows, 2, SCALES_ALIGN), FP16)
    return butterflies(codes.to(tl.float32), T, D, BLOCK) * (scales * NORM)[:, None]


@triton.jit
def e4m3_codes(numbers):
    """uint8 codes of fp32 numbers within +-448, rounded half to even. Whole-number arithmetic: GPUs before sm_89 have no e4m3."""
    bits = numbers.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Below 2**-6 codes are even steps of 2**-9: adding 2**14 leaves exactly them in the mantissa.
    small = magnitude.to(tl.float32, bitcast=True) + 16384.0
    small_code = small.to(tl.uint32, bitcast=True) - 0x46800000
    code = (magnitude - 0x3C000000 + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
    code = tl.where(magnitude < 0x3C800000, small_code, code)
    return (code | (bits >> 24 & 0x80)).to(tl.uint8)


@triton.jit
def e4m3_values(codes):
    """fp32 values of uint32 e4m3 codes; the two NaN codes count as 0."""
    magnitude = codes & 0x7F
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, ((magnitude << 20) + 0x3C000000).to(tl.float32, bitcast=True))
    signed = (value.to(tl.uint32, bitcast=True) | ((codes & 0x80) << 24)).to(tl.float32, bitcast=True)
    return tl.where(magnitude == 0x7F, 0.0, signed)


@triton.jit
def encode_fp8(
    numbers, address, vectors, rows, inside, COUNT: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, LIMIT: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    SCALES_ALIGN: tl.constexpr = 2 if ALIGN % 2 == 0 and COUNT * HEAD_DIM % 2 == 0 else 1
    numbers = finite(numbers, LIMIT)
    word = half_word(divided(tl.max(tl.abs(numbers), 1), LARGEST_E4M3))
    scaled = numbers * inverse(numbers_of_words(word, FP16))[:, None]
    codes = e4m3_codes(tl.minimum(tl.maximum(scaled, -LARGEST_E4M3), LARGEST_E4M3))
    channel = tl.arange(0, D)
    tl.store(address + (vectors[:, None] * HEAD_DIM + channel[None, :]), codes, inside)
    store_word(address + COUNT * HEAD_DIM, vectors, word, rows, 2, SCALES_ALIGN)


@triton.jit
def decode_fp8(address, vectors, rows, inside, COUNT: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, ALIGN: tl.constexpr):
    SCALES_ALIGN: tl.constexpr = 2 if ALIGN % 2 == 0 and COUNT * HEAD_DIM % 2 == 0 else 1
    channel = tl.arange(0, D)
    codes = tl.load(address + (vectors[:, None] * HEAD_DIM + channel[None, :]), inside, 0).to(tl.uint32)
    scales = numbers_of_words(load_word(address + COUNT * HEAD_DIM, vectors, rows, 2, SCALES_ALIGN), FP16)
    return e4m3_values(codes) * scales[:, None]


@triton.jit
def kept_word(source, offsets, mask, DTYPE: tl.constexpr, LIMIT: tl.constexpr):
    """The bits of finite numbers in the 16 bits that sparse24 keeps, uint32: bf16 in bf16 pages, fp16 in others."""
    words = tl.load(source + offsets, mask, 0).to(tl.uint32)
    numbers = finite(numbers_of_words(words, DTYPE), LIMIT)
    if DTYPE == BF16:
        return words_of_numbers(numbers, BF16)
    return words_of_numbers(numbers, FP16)


@triton.jit
def _of_four(fours, PLACE: tl.constexpr):
    """One of the last axis of `[T, FOURS, 4]`, int32."""
    return tl.sum(tl.where(tl.arange(0, 4)[None, None, :] == PLACE, fours, 0), 2).to(tl.int32)


@triton.jit
def encode_sparse24(
    source, starts, address, vectors, rows, DTYPE: tl.constexpr, COUNT: tl.constexpr, HEAD_DIM: tl.constexpr, T: tl.constexpr,
    FOURS: tl.constexpr, LIMIT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Straight from the numbers at pointer `source`, vectors beginning at `starts` `[T]`: the four of each four apart."""
    channel = tl.arange(0, FOURS * 4)[None, :]
    words = kept_word(source, starts[:, None] + channel, rows[:, None] & (channel < HEAD_DIM), DTYPE, LIMIT)
    fours = tl.reshape(words.to(tl.int32), [T, FOURS, 4])
    w0, w1, w2, w3 = _of_four(fours, 0), _of_four(fours, 1), _of_four(fours, 2), _of_four(fours, 3)
    four = tl.arange(0, FOURS)[None, :]
    inside = rows[:, None] & (four < HEAD_DIM // 4)
    m0, m1, m2, m3 = w0 & 0x7FFF, w1 & 0x7FFF, w2 & 0x7FFF, w3 & 0x7FFF
    # How many of the others come before each one; of equal magnitudes the first does.
    b0 = (m1 > m0).to(tl.int32) + (m2 > m0).to(tl.int32) + (m3 > m0).to(tl.int32)
    b1 = (m0 >= m1).to(tl.int32) + (m2 > m1).to(tl.int32) + (m3 > m1).to(tl.int32)
    b2 = (m0 >= m2).to(tl.int32) + (m1 >= m2).to(tl.int32) + (m3 > m2).to(tl.int32)
    first = tl.where(b0 < 2, 0, tl.where(b1 < 2, 1, 2))
    last = tl.where((m0 >= m3).to(tl.int32) + (m1 >= m3).to(tl.int32) + (m2 >= m3).to(tl.int32) < 2, 3, tl.where(b2 < 2, 2, 1))
    kept0 = tl.where(first == 0, w0, tl.where(first == 1, w1, w2))
    kept1 = tl.where(last == 3, w3, tl.where(last == 2, w2, w1))
    pair = vectors[:, None] * (HEAD_DIM // 2) + four * 2
    store_word(address, pair, kept0.to(tl.uint32), inside, 2, ALIGN)
    store_word(address, pair + 1, kept1.to(tl.uint32), inside, 2, ALIGN)
    halves = tl.reshape(first | last << 2, [T, FOURS // 2, 2]) << (tl.arange(0, 2) * 4)[None, None, :]
    packed = tl.arange(0, FOURS // 2)[None, :]
    place = COUNT * HEAD_DIM + vectors[:, None] * (HEAD_DIM // 8) + packed
    tl.store(address + place, tl.sum(halves, 2).to(tl.uint8), rows[:, None] & (packed < HEAD_DIM // 8))


@triton.jit
def decode_sparse24(
    address, vectors, inside, DTYPE: tl.constexpr, COUNT: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, ALIGN: tl.constexpr
):  # fmt: skip
    """uint32 words in the page's dtype `[T, D]`."""
    channel = tl.arange(0, D)[None, :]
    four, place = channel // 4, channel % 4
    packed = tl.load(address + (COUNT * HEAD_DIM + vectors[:, None] * (HEAD_DIM // 8) + four // 2), inside, 0).to(tl.int32)
    nibble = packed >> (four % 2 * 4)
    is_first = (nibble & 3) == place
    is_second = (nibble >> 2 & 3) == place
    which = vectors[:, None] * (HEAD_DIM // 2) + four * 2 + tl.where(is_first, 0, 1)
    words = load_word(address, which, inside & (is_first | is_second), 2, ALIGN)
    if DTYPE == FP32:
        return numbers_of_words(words, FP16).to(tl.uint32, bitcast=True)
    return words
