"""The two kernels: pages of an engine's tensors into payloads, and back. One program codes one head of one block (page, layer, plane).

Which codec, dtype and shape is settled when a kernel is compiled; where the engine keeps its numbers is told by addresses and strides.
Launched without fused multiply-add, so that each step rounds as in the torch reference.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvtier.formats.triton.arithmetic import load_word, numbers_of_words, store_word, words_of_numbers
from kvtier.formats.triton.codecs import decode_fp8, decode_q8, decode_sparse24, encode_fp8, encode_q8, encode_sparse24
from kvtier.formats.triton.gaussian import decode_q4, encode_q4

RAW: tl.constexpr = tl.constexpr(0)
FP8: tl.constexpr = tl.constexpr(1)
Q8: tl.constexpr = tl.constexpr(2)
Q4: tl.constexpr = tl.constexpr(3)
SPARSE24: tl.constexpr = tl.constexpr(4)


@triton.jit
def vector_starts(
    table, page, head, tokens, rows, block_stride, token_stride, head_stride, TOKENS: tl.constexpr, BLOCK_TOKENS: tl.constexpr
):
    """Where the vectors of one head of a page begin, in numbers from the base: int64 `[T]`."""
    if BLOCK_TOKENS == TOKENS:
        blocks = tl.load(table + page) + tl.zeros_like(tokens).to(tl.int64)
    else:
        blocks = tl.load(table + page * (TOKENS // BLOCK_TOKENS) + tokens // BLOCK_TOKENS, rows, 0)
    within = (tokens % BLOCK_TOKENS).to(tl.int64) * token_stride + head.to(tl.int64) * head_stride
    return blocks * block_stride + within


@triton.jit
def numbers_at(base, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    """The engine's numbers at an address, as words of 16 or 32 bits."""
    if DTYPE == 2:
        pointer = base.to(tl.pointer_type(tl.uint32))
    else:
        pointer = base.to(tl.pointer_type(tl.uint16))
    return tl.multiple_of(pointer, ALIGN)


@triton.jit(do_not_specialize=["entries"])
def encode_kernel(
    bases, sources, offsets, table, out, out_rows, begins, mantissas, step_values, entries, block_stride, token_stride, head_stride,
    row_bytes, CODEC: tl.constexpr, KEYS: tl.constexpr, DTYPE: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, T: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr,
    NORM: tl.constexpr, FIRST: tl.constexpr, SOURCE_ALIGN: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Grid: pages x entries x HEADS. Entry e is the block `sources[e]` (layer * planes + plane), at `offsets[e]` in each payload."""
    program = tl.program_id(0)
    head = program % HEADS
    entry = program // HEADS % entries
    page = (program // HEADS // entries).to(tl.int64)
    tokens = tl.arange(0, T)
    rows = tokens < TOKENS
    starts = vector_starts(table, page, head, tokens, rows, block_stride, token_stride, head_stride, TOKENS, BLOCK_TOKENS)
    source = tl.load(bases + tl.load(sources + entry))
    place = tl.load(out_rows + page) * row_bytes + tl.multiple_of(tl.load(offsets + entry), ALIGN)
    address = tl.multiple_of(out + place, ALIGN)
    vectors = tokens * HEADS + head
    if CODEC == SPARSE24:
        encode_sparse24(
            numbers_at(source, DTYPE, SOURCE_ALIGN), starts, address, vectors, rows, DTYPE, TOKENS * HEADS, HEAD_DIM, T, D // 4, LIMIT,
            ALIGN,
        )  # fmt: skip
    else:
        channel = tl.arange(0, D)[None, :]
        inside = rows[:, None] & (channel < HEAD_DIM)
        BYTES: tl.constexpr = 4 if DTYPE == 2 else 2
        words = tl.load(numbers_at(source, DTYPE, SOURCE_ALIGN) + (starts[:, None] + channel), inside, 0).to(tl.uint32)
        if CODEC == RAW:
            store_word(address, vectors[:, None] * HEAD_DIM + channel, words, inside, BYTES, ALIGN)
        else:
            numbers = numbers_of_words(words, DTYPE)
            if CODEC == FP8:
                encode_fp8(numbers, address, vectors, rows, inside, TOKENS * HEADS, HEAD_DIM, D, LIMIT, ALIGN)
            elif CODEC == Q8:
                encode_q8(numbers, address, vectors, rows, inside, TOKENS * HEADS, HEAD_DIM, T, D, BLOCK, LIMIT, NORM, ALIGN)
            else:
                special = 0
                if FIRST:
                    special = tl.load(begins + page).to(tl.int32)
                encode_q4(
                    numbers, address, head, tokens, rows, special, mantissas, step_values, KEYS, TOKENS, HEADS, HEAD_DIM, T, D, BLOCK,
                    LIMIT, NORM, FIRST, ALIGN,
                )  # fmt: skip


@triton.jit(do_not_specialize=["begin", "entries"])
def decode_kernel(
    bases, targets, offsets, table, payloads, payload_rows, step_values, begin, entries, block_stride, token_stride, head_stride, row_bytes,
    CODEC: tl.constexpr, KEYS: tl.constexpr, DTYPE: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, T: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, FACTOR4: tl.constexpr,
    FACTOR3: tl.constexpr, CAN_BEGIN: tl.constexpr, TARGET_ALIGN: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The inverse of `encode_kernel`: entries from `begin` on; e is the block at `offsets[e]` of each payload and goes to `targets[e]`."""
    program = tl.program_id(0)
    head = program % HEADS
    entry = begin + program // HEADS % entries
    page = (program // HEADS // entries).to(tl.int64)
    tokens = tl.arange(0, T)
    rows = tokens < TOKENS
    starts = vector_starts(table, page, head, tokens, rows, block_stride, token_stride, head_stride, TOKENS, BLOCK_TOKENS)
    target = tl.load(bases + tl.load(targets + entry))
    place = tl.load(payload_rows + page) * row_bytes + tl.multiple_of(tl.load(offsets + entry), ALIGN)
    address = tl.multiple_of(payloads + place, ALIGN)
    vectors = tokens * HEADS + head
    channel = tl.arange(0, D)[None, :]
    inside = rows[:, None] & (channel < HEAD_DIM)
    COUNT: tl.constexpr = TOKENS * HEADS
    BYTES: tl.constexpr = 4 if DTYPE == 2 else 2
    if CODEC == RAW:
        words = load_word(address, vectors[:, None] * HEAD_DIM + channel, inside, BYTES, ALIGN)
    elif CODEC == SPARSE24:
        words = decode_sparse24(address, vectors, inside, DTYPE, COUNT, HEAD_DIM, D, ALIGN)
    elif CODEC == FP8:
        words = words_of_numbers(decode_fp8(address, vectors, rows, inside, COUNT, HEAD_DIM, D, ALIGN), DTYPE)
    elif CODEC == Q8:
        words = words_of_numbers(decode_q8(address, vectors, rows, inside, COUNT, HEAD_DIM, T, D, BLOCK, NORM, ALIGN), DTYPE)
    else:
        decoded = decode_q4(
            address, head, tokens, rows, inside, step_values, KEYS, TOKENS, HEADS, HEAD_DIM, T, D, BLOCK, FACTOR4, FACTOR3, CAN_BEGIN,
            ALIGN,
        )  # fmt: skip
        words = words_of_numbers(decoded, DTYPE)
    numbers = numbers_at(target, DTYPE, TARGET_ALIGN) + (starts[:, None] + channel)
    tl.store(numbers, words.to(numbers.dtype.element_ty), inside)
