"""Steps of the torch reference as Triton functions, each rounding where the reference rounds, in the same order. Pure.

What is not left to the compiler: divisions and roots are the correctly rounded ones, sums go by halves (`numbers.sum_by_halves`: a
reduction over an axis of two has one order only), conversions that some GPUs lack are whole-number arithmetic. Kernels are launched
without fused multiply-add (`pages.py`), which would skip a rounding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvtier.formats.numbers import FP16_MAX

BF16: tl.constexpr = tl.constexpr(0)
FP16: tl.constexpr = tl.constexpr(1)
FP32: tl.constexpr = tl.constexpr(2)
LARGEST_HALF: tl.constexpr = tl.constexpr(FP16_MAX)
SMALLEST_NORMAL: tl.constexpr = tl.constexpr(2.0**-126)
ROUNDER: tl.constexpr = tl.constexpr(1.5 * 2.0**23)
"""Added and taken away again, it leaves no room for a fraction: the sum is rounded to a whole number, half to even."""


@triton.jit
def load_word(address, places, mask, BYTES: tl.constexpr, ALIGN: tl.constexpr):
    """uint32: word number `places` of 1, 2 or 4 bytes from uint8 pointer `address` on, which is a multiple of ALIGN; byte by byte where
    words lie crooked."""
    if ALIGN % BYTES == 0:
        return tl.load(_word_pointer(address, BYTES, ALIGN) + places, mask, 0).to(tl.uint32)
    word = tl.load(address + places * BYTES, mask, 0).to(tl.uint32)
    for byte in tl.static_range(1, BYTES):
        word |= tl.load(address + (places * BYTES + byte), mask, 0).to(tl.uint32) << (8 * byte)
    return word


@triton.jit
def store_word(address, places, word, mask, BYTES: tl.constexpr, ALIGN: tl.constexpr):
    """The inverse of `load_word` for uint32 `word`."""
    if ALIGN % BYTES == 0:
        pointer = _word_pointer(address, BYTES, ALIGN) + places
        tl.store(pointer, word.to(pointer.dtype.element_ty), mask)
    else:
        for byte in tl.static_range(0, BYTES):
            tl.store(address + (places * BYTES + byte), (word >> (8 * byte)).to(tl.uint8), mask)


@triton.jit
def _word_pointer(address, BYTES: tl.constexpr, ALIGN: tl.constexpr):
    if BYTES == 2:
        pointer = address.to(tl.pointer_type(tl.uint16))
    elif BYTES == 4:
        pointer = address.to(tl.pointer_type(tl.uint32))
    else:
        pointer = address
    return tl.multiple_of(pointer, ALIGN)


@triton.jit
def numbers_of_words(words, DTYPE: tl.constexpr):
    """fp32 of uint32 words that hold numbers of a page's dtype."""
    if DTYPE == BF16:
        return (words << 16).to(tl.float32, bitcast=True)
    if DTYPE == FP16:
        return words.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return words.to(tl.float32, bitcast=True)


@triton.jit
def words_of_numbers(numbers, DTYPE: tl.constexpr):
    """uint32 words of finite fp32 numbers in a page's dtype: rounded half to even, saturated where fp16 would overflow."""
    if DTYPE == BF16:
        bits = numbers.to(tl.uint32, bitcast=True)
        return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    if DTYPE == FP16:
        within = tl.minimum(tl.maximum(numbers, -LARGEST_HALF), LARGEST_HALF)
        return within.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
    return numbers.to(tl.uint32, bitcast=True)


@triton.jit
def finite(numbers, LIMIT: tl.constexpr):
    """NaN as 0, everything within +-LIMIT."""
    there = numbers == numbers
    return tl.where(there, tl.minimum(tl.maximum(tl.where(there, numbers, 0.0), -LIMIT), LIMIT), 0.0)


@triton.jit
def inverse(scales):
    """1 / scale; 0 where the scale has no finite inverse."""
    large = scales >= SMALLEST_NORMAL
    return tl.where(large, tl.div_rn(tl.full(scales.shape, 1.0, tl.float32), tl.where(large, scales, 1.0)), 0.0)


@triton.jit
def divided(numbers, DIVISOR: tl.constexpr):
    """numbers / DIVISOR, rounded once."""
    return tl.div_rn(numbers, tl.full(numbers.shape, DIVISOR, tl.float32))


@triton.jit
def half_word(scales):
    """fp32 scales >= 0 as the bits of fp16, uint32, saturated."""
    return words_of_numbers(scales, FP16)


@triton.jit
def rounded(numbers, LARGEST: tl.constexpr):
    """Whole numbers within +-LARGEST, half to even."""
    return (tl.minimum(tl.maximum(numbers, -LARGEST), LARGEST) + ROUNDER) - ROUNDER


@triton.jit
def sum_of_rows(numbers, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """`[ROWS]`: each row `[ROWS, SIZE]` summed by halves; SIZE is a power of two."""
    for level in tl.static_range(0, 31):
        if (SIZE >> level) > 1:
            numbers = tl.sum(tl.reshape(numbers, [ROWS, 2, SIZE >> (level + 1)]), 1)
    return tl.reshape(numbers, [ROWS])


@triton.jit
def sum_of_columns(numbers, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """`[1, SIZE]`: the columns of `[ROWS, SIZE]` summed by halves; ROWS is a power of two."""
    for level in tl.static_range(0, 31):
        if (ROWS >> level) > 1:
            numbers = tl.sum(tl.reshape(numbers, [2, ROWS >> (level + 1), SIZE]), 0)
    return numbers


@triton.jit
def butterflies(numbers, ROWS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The +-1 Hadamard transform of each BLOCK numbers of `[ROWS, SIZE]`: `hadamard.rotate` without its factor."""
    for level in tl.static_range(0, 31):
        if (1 << level) < BLOCK:
            pairs = tl.reshape(numbers, [ROWS * SIZE >> (level + 1), 2, 1 << level])
            bits = pairs.to(tl.int32, bitcast=True)
            # The other one of each pair, from the sum of their bits as whole numbers: one reduction, exact whatever it wraps to.
            others = (tl.sum(bits, 1, keep_dims=True).to(tl.int32) - bits).to(tl.float32, bitcast=True)
            right = tl.arange(0, 2)[None, :, None] == 1
            numbers = tl.reshape(tl.where(right, others - pairs, pairs + others), [ROWS, SIZE])
    return numbers


@triton.jit
def joined(codes, ROWS: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr):
    """uint8 `[ROWS, PART]` of int32 codes `[ROWS, SIZE]`: byte i holds codes i + k HEAD_DIM / PARTS, the first lowest (`bits.py`).

    PART is the power of two that HEAD_DIM / PARTS fits in; what lies behind is undefined.
    """
    WIDTH: tl.constexpr = 8 // PARTS
    if HEAD_DIM == SIZE:
        place = tl.arange(0, PARTS)[None, :, None]
        return tl.sum(tl.reshape(codes, [ROWS, PARTS, PART]) << (place * WIDTH), 1).to(tl.uint8)
    packed = tl.zeros([ROWS, PART], tl.int32)
    channel = tl.zeros([ROWS, PART], tl.int32) + tl.arange(0, PART)[None, :]
    for part in tl.static_range(0, PARTS):
        taken = tl.minimum(channel + part * (HEAD_DIM // PARTS), SIZE - 1)
        packed |= tl.gather(codes, taken, 1) << (part * WIDTH)
    return packed.to(tl.uint8)
