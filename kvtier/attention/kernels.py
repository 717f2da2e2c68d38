"""Digests of keys and what queries make of them as Triton kernels: `digest.encode` and `digest.page_logits`, each in one launch. Stateless.

A program makes the digest of one piece (page, layer, head), straight from where the engine keeps its keys; another scores some pages of one
head for some queries, from the digests' bytes, of which nothing is unpacked to memory. Sums go in another order than torch's and logarithms
are the GPU's, so a number in many is rounded to the other side; scales are the reference's own. Imports Triton.
"""

from __future__ import annotations

import contextlib
from functools import lru_cache

import torch
import triton
import triton.language as tl

from kvtier.attention.digest import DigestLayout
from kvtier.formats.hadamard import block_size, rotate, unrotate_factor
from kvtier.formats.paged import PagedKV
from kvtier.formats.triton.arithmetic import ROUNDER, butterflies, numbers_of_words
from kvtier.formats.triton.launch import DTYPES
from kvtier.formats.triton.pages import numbers_at, vector_starts

MOST_TOKENS = 64
MOST_DIM = 256
"""Of a piece: more does not fit the registers of a program, and torch does the work."""
LEAST = 16
"""What products of matrices are padded to."""
PAGES = 16
QUERIES = 16
"""Of one program that scores."""
LARGEST: tl.constexpr = tl.constexpr(7.0)
SMALLEST_SCALE: tl.constexpr = tl.constexpr(2.0**-16)
TINY: tl.constexpr = tl.constexpr(1.1754943508222875e-38)
SQUARINGS: tl.constexpr = tl.constexpr(4)


@lru_cache(maxsize=16)
def scales(device: torch.device) -> torch.Tensor:
    """What each of the 256 bytes of a scale stands for, fp32."""
    return torch.exp2(torch.arange(256, dtype=torch.float32) / 8 - 16).to(device)


@triton.jit
def _scale_byte(largest):
    """The byte of the smallest scale that cuts nothing of `largest` (a scalar) off, int32."""
    steps = tl.ceil(tl.log2(tl.maximum(largest / LARGEST, SMALLEST_SCALE)) * 8 + 128)
    # Whatever is computed, a byte is one of 256: it says what is read next.
    return tl.where(steps > 0, tl.minimum(steps, 255.0), 0.0).to(tl.int32)


@triton.jit
def _whole(numbers):
    """fp32 rounded to whole numbers within +-7."""
    return (tl.minimum(tl.maximum(numbers, -LARGEST), LARGEST) + ROUNDER) - ROUNDER


@triton.jit
def _store_nibbles(address, codes, D: tl.constexpr, BYTES: tl.constexpr):
    """Whole numbers -7 to 7 `[D]` as BYTES bytes, the even ones low."""
    pairs = tl.reshape((codes + 8.0).to(tl.int32), [D // 2, 2])
    packed = tl.sum(pairs << (tl.arange(0, 2)[None, :] * 4), 1)
    places = tl.arange(0, D // 2)
    tl.store(address + places, packed.to(tl.uint8), places < BYTES)


@triton.jit
def _direction(gram, rest, T: tl.constexpr):
    """The direction along which `rest` `[T, D]` varies most, in whole numbers `[D]`, and its Gram matrix `[T, T]` without it."""
    token = tl.arange(0, T)
    diagonal = token[:, None] == token[None, :]
    power = gram
    for _ in tl.static_range(0, SQUARINGS):
        trace = tl.sum(tl.sum(tl.where(diagonal, power, 0.0), 1), 0)
        power = tl.where(trace > TINY, power / tl.maximum(trace, TINY), 0.0)  # what rounding left of nothing may be below 0
        power = tl.dot(power, power, input_precision="ieee")
    largest = tl.argmax(tl.sum(tl.where(diagonal, power, 0.0), 1), 0)
    weights = tl.sum(tl.where(token[None, :] == largest, power, 0.0), 1)
    weights = weights / tl.maximum(tl.sqrt(tl.sum(weights * weights, 0)), 1e-20)
    seen = tl.sum(gram * weights[None, :], 1)
    explained = tl.maximum(tl.sum(weights * seen, 0), 1e-20)
    along = tl.sum(weights[:, None] * rest, 0)
    direction = _whole(along * (LARGEST / tl.maximum(tl.max(tl.abs(along), 0), 1e-20)))
    return direction, gram - seen[:, None] * seen[None, :] / explained


@triton.jit(do_not_specialize=["layers"])
def digest_kernel(
    bases, table, out, scale_table, layers, block_stride, token_stride, head_stride, DTYPE: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, PIECES: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PLANES: tl.constexpr, T: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, VECTOR_BYTES: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Grid: pages x layers x HEADS x PIECES, in the order of the digests' bytes. Keys are plane 0."""
    PIECE_TOKENS: tl.constexpr = TOKENS // PIECES
    program = tl.program_id(0)
    piece = program % PIECES
    head = program // PIECES % HEADS
    layer = program // PIECES // HEADS % layers
    page = (program // PIECES // HEADS // layers).to(tl.int64)
    local = tl.arange(0, T)
    rows = local < PIECE_TOKENS
    tokens = tl.minimum(piece * PIECE_TOKENS + local, TOKENS - 1)
    starts = vector_starts(table, page, head, tokens, rows, block_stride, token_stride, head_stride, TOKENS, BLOCK_TOKENS)
    channel = tl.arange(0, D)
    inside = rows[:, None] & (channel[None, :] < HEAD_DIM)
    words = tl.load(numbers_at(tl.load(bases + layer * PLANES), DTYPE, ALIGN) + (starts[:, None] + channel[None, :]), inside, 0)
    keys = numbers_of_words(words.to(tl.uint32), DTYPE)
    keys = tl.where(tl.abs(keys) < float("inf"), keys, 0.0)
    rotated = butterflies(keys, T, D, BLOCK) * NORM

    mean = tl.sum(rotated, 0) / PIECE_TOKENS
    mean_byte = _scale_byte(tl.max(tl.abs(mean), 0))
    mean_scale = tl.load(scale_table + mean_byte)
    mean_codes = _whole(mean / mean_scale)
    rest = tl.where(rows[:, None], rotated - (mean_codes * mean_scale)[None, :], 0.0)

    gram = tl.dot(rest, tl.trans(rest), input_precision="ieee")
    first, gram = _direction(gram, rest, T)
    second, _gram = _direction(gram, rest, T)

    shares1, shares2 = tl.sum(rest * first[None, :], 1), tl.sum(rest * second[None, :], 1)
    b = tl.sum(first * second, 0)
    a, c = tl.sum(first * first, 0) * 1.0001 + 1e-6, tl.sum(second * second, 0) * 1.0001 + 1e-6
    determinant = a * c - b * b
    along1 = (c * shares1 - b * shares2) / determinant
    along2 = (a * shares2 - b * shares1) / determinant
    byte1, byte2 = _scale_byte(tl.max(tl.abs(along1), 0)), _scale_byte(tl.max(tl.abs(along2), 0))
    codes1 = (_whole(along1 / tl.load(scale_table + byte1)) + 8.0).to(tl.int32)
    codes2 = (_whole(along2 / tl.load(scale_table + byte2)) + 8.0).to(tl.int32)

    address = out + program.to(tl.int64) * (3 * VECTOR_BYTES + PIECE_TOKENS + 3)
    _store_nibbles(address, mean_codes, D, VECTOR_BYTES)
    _store_nibbles(address + VECTOR_BYTES, first, D, VECTOR_BYTES)
    _store_nibbles(address + 2 * VECTOR_BYTES, second, D, VECTOR_BYTES)
    behind = address + 3 * VECTOR_BYTES
    tl.store(behind + local, (codes1 | (codes2 << 4)).to(tl.uint8), rows)
    tl.store(behind + PIECE_TOKENS, mean_byte.to(tl.uint8))
    tl.store(behind + PIECE_TOKENS + 1, byte1.to(tl.uint8))
    tl.store(behind + PIECE_TOKENS + 2, byte2.to(tl.uint8))


@triton.jit
def _dots(asked, digests, there, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """`[QUERIES, PAGES]`: the queries times a vector of 4-bit numbers at each page's pointer."""
    channel = tl.arange(0, D)[None, :]
    inside = there[:, None] & (channel < HEAD_DIM)
    bytes_ = tl.load(digests[:, None] + channel // 2, inside, 0).to(tl.int32)
    numbers = tl.where(inside, ((bytes_ >> (channel % 2 * 4)) & 15) - 8, 0).to(tl.float32)
    return tl.dot(asked, tl.trans(numbers), input_precision="ieee")


@triton.jit(do_not_specialize=["queries", "pages"])
def logits_kernel(
    digests, asked, out, scale_table, queries, pages, page_stride, head_stride, PIECES: tl.constexpr, PIECE_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VECTOR_BYTES: tl.constexpr, T: tl.constexpr, D: tl.constexpr, Q: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Grid: pages / P x queries / Q x kv_heads. `asked` fp32 `[kv_heads, queries, HEAD_DIM]`, rotated and scaled; `out` fp32
    `[kv_heads, queries, pages]`."""
    head = tl.program_id(2)
    page = tl.program_id(0) * P + tl.arange(0, P)
    query = tl.program_id(1) * Q + tl.arange(0, Q)
    there = page < pages
    channel = tl.arange(0, D)[None, :]
    places = (head * queries + query).to(tl.int64)
    wanted = (query < queries)[:, None] & (channel < HEAD_DIM)
    numbers = tl.load(asked + places[:, None] * HEAD_DIM + channel, wanted, 0.0)
    token = tl.arange(0, T)[None, :]
    tokens = there[:, None] & (token < PIECE_TOKENS)
    largest = tl.full([Q, P], float("-inf"), tl.float32)
    summed = tl.zeros([Q, P], tl.float32)
    address = digests + page.to(tl.int64) * page_stride + head.to(tl.int64) * head_stride
    for _ in range(PIECES):
        behind = address + 3 * VECTOR_BYTES
        bytes_ = tl.load(behind[:, None] + token, tokens, 0).to(tl.int32)
        mean_scale = tl.load(scale_table + tl.load(behind + PIECE_TOKENS, there, 0).to(tl.int32))
        scale1 = tl.load(scale_table + tl.load(behind + PIECE_TOKENS + 1, there, 0).to(tl.int32))
        scale2 = tl.load(scale_table + tl.load(behind + PIECE_TOKENS + 2, there, 0).to(tl.int32))
        along1 = ((bytes_ & 15) - 8).to(tl.float32) * scale1[:, None]
        along2 = ((bytes_ >> 4) - 8).to(tl.float32) * scale2[:, None]
        mean = _dots(numbers, address, there, HEAD_DIM, D) * mean_scale[None, :]
        first = _dots(numbers, address + VECTOR_BYTES, there, HEAD_DIM, D)
        second = _dots(numbers, address + 2 * VECTOR_BYTES, there, HEAD_DIM, D)
        logits = first[:, :, None] * along1[None, :, :] + second[:, :, None] * along2[None, :, :] + mean[:, :, None]
        logits = tl.where((token < PIECE_TOKENS)[None, :, :], logits, float("-inf"))
        most = tl.maximum(largest, tl.max(logits, 2))
        summed = summed * tl.exp(largest - most) + tl.sum(tl.exp(logits - most[:, :, None]), 2)
        largest = most
        address = behind + (PIECE_TOKENS + 3)
    inside = (query < queries)[:, None] & there[None, :]
    tl.store(out + places[:, None] * pages + page[None, :], largest + tl.log(summed), inside)


def fits(shape: DigestLayout) -> bool:
    """Whether programs hold a piece of such digests."""
    return shape.piece_tokens <= MOST_TOKENS and shape.head_dim <= MOST_DIM


def encode_paged(paged: PagedKV, table: torch.Tensor) -> torch.Tensor:
    """Queue the digests of the pages of a block table: uint8 `[pages, layers, kv_heads, digest_bytes]` on their device."""
    layout, shape = paged.layout, DigestLayout.of(paged.layout)
    out = torch.empty((len(table), layout.layers, layout.kv_heads, shape.digest_bytes), dtype=torch.uint8, device=paged.device)
    with _on(paged.device):
        digest_kernel[(len(table) * layout.layers * layout.kv_heads * shape.pieces,)](
            paged.bases, table, out, scales(paged.device), layout.layers, *paged.strides, DTYPE=DTYPES[layout.dtype],
            TOKENS=layout.page_tokens, BLOCK_TOKENS=paged.block_tokens, PIECES=shape.pieces, HEADS=layout.kv_heads,
            HEAD_DIM=layout.head_dim, PLANES=layout.planes, T=_padded(shape.piece_tokens), D=_padded(layout.head_dim),
            BLOCK=block_size(layout.head_dim), NORM=unrotate_factor(layout.head_dim), VECTOR_BYTES=shape.vector_bytes,
            ALIGN=paged.address_alignment, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def page_logits(digests: torch.Tensor, queries: torch.Tensor, shape: DigestLayout, scaling: float) -> torch.Tensor:
    """Queue `digest.page_logits`, whose arguments were checked, on the device of both; a page's bytes lie side by side."""
    pages, kv_heads, _ = digests.shape
    tokens, heads, width = queries.shape
    asked = rotate(queries.to(torch.float32).contiguous() * scaling).view(tokens, kv_heads, heads // kv_heads, width)
    asked = asked.transpose(0, 1).reshape(kv_heads, -1, width)
    count = asked.shape[1]
    out = torch.empty((kv_heads, count, pages), dtype=torch.float32, device=digests.device)
    grid = (-(-pages // PAGES), -(-count // QUERIES), kv_heads)
    with _on(digests.device):
        if pages and count:
            logits_kernel[grid](
                digests, asked, out, scales(digests.device), count, pages, digests.stride(0), digests.stride(1), PIECES=shape.pieces,
                PIECE_TOKENS=shape.piece_tokens, HEAD_DIM=width, VECTOR_BYTES=shape.vector_bytes, T=_padded(shape.piece_tokens),
                D=_padded(width), Q=QUERIES, P=PAGES, num_warps=4,
            )  # fmt: skip
    return out.view(kv_heads, tokens, heads // kv_heads, pages).transpose(0, 1).reshape(tokens, heads, pages)


def _padded(size: int) -> int:
    return max(LEAST, 1 << (size - 1).bit_length())


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
