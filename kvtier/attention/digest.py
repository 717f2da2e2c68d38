"""Page digests: from some 3 % of a page's bytes, how much attention a query would pay to the page. Stateless; torch on any device.

A digest stands for the keys of one page in one layer and head. The page's tokens form pieces of at most 32. Per piece: the mean key, the
two directions in which the keys differ most from it, and for each token how far it lies along both, all in 4 bits after a Hadamard
rotation. A query's logit with every token follows up to what these leave out, and so does the log of the page's summed attention.

Why not per-channel bounds (Quest, Tang et al. 2024): attention falls on single tokens, which a low-rank sketch keeps apart and a box does
not: on SmolLM2, decoding on a quarter of the pages, choosing them by exact bounds costs three times the KL (docs/quality.md).

Bytes of one piece: ceil(head_dim / 2) for the mean and for each direction (two numbers a byte, low nibble first, offset 8), one per token
(its two coefficients), and three scales, each 2 ** (byte / 8 - 16).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from kvtier.errors import LayoutError
from kvtier.formats.hadamard import rotate
from kvtier.layout import PageLayout

PIECE_TOKENS = 32
RANK = 2
_LARGEST = 7
_SQUARINGS = 4
"""The start vector is multiplied by the Gram matrix 2**4 times: what is left of a direction with half the variance is 1 in 65536."""


@dataclass(frozen=True)
class DigestLayout:
    """Sizes of the digests of pages of `page_tokens` tokens with heads of `head_dim` numbers."""

    page_tokens: int
    head_dim: int

    @classmethod
    def of(cls, layout: PageLayout) -> DigestLayout:
        """For pages of `layout`."""
        return cls(layout.page_tokens, layout.head_dim)

    @cached_property
    def pieces(self) -> int:
        """Pieces of a page: the fewest equal ones of at most 32 tokens; a page that has none of at least half that stays whole."""
        fitting = [tokens for tokens in range(PIECE_TOKENS, PIECE_TOKENS // 2 - 1, -1) if self.page_tokens % tokens == 0]
        return self.page_tokens // fitting[0] if fitting else 1

    @property
    def piece_tokens(self) -> int:
        """Tokens of a piece."""
        return self.page_tokens // self.pieces

    @property
    def vector_bytes(self) -> int:
        """Bytes of `head_dim` 4-bit numbers."""
        return (self.head_dim + 1) // 2

    @property
    def piece_bytes(self) -> int:
        """Bytes of a piece, scales included."""
        return (1 + RANK) * self.vector_bytes + self.piece_tokens + 1 + RANK

    @property
    def digest_bytes(self) -> int:
        """Bytes of a digest: one page, layer and head."""
        return self.pieces * self.piece_bytes


def digest_page_bytes(layout: PageLayout) -> int:
    """Bytes of the digests of a whole page, all layers and heads."""
    return layout.layers * layout.kv_heads * DigestLayout.of(layout).digest_bytes


def encode(keys: torch.Tensor) -> torch.Tensor:
    """Digests, uint8 `[pages, layers, kv_heads, digest_bytes]`, of keys `[pages, layers, page_tokens, kv_heads, head_dim]` of any dtype.

    Keys that are not finite count as zeros. LayoutError for another number of dimensions.
    """
    if keys.ndim != 5:
        raise LayoutError(f"keys have shape {list(keys.shape)}; expected [pages, layers, page_tokens, kv_heads, head_dim]")
    pages, layers, tokens, heads, width = keys.shape
    shape = DigestLayout(tokens, width)
    rotated = rotate(keys.permute(0, 1, 3, 2, 4).to(torch.float32, copy=True).nan_to_num_(0.0, 0.0, 0.0).contiguous())
    pieces = rotated.view(-1, shape.piece_tokens, width)
    mean, mean_scale = _quantize(pieces.mean(1))
    rest = pieces - (mean * _scale(mean_scale))[:, None]
    directions = _directions(rest)
    coefficients = _fit(rest, directions)
    codes, scales = _quantize(coefficients.transpose(1, 2))
    vectors = _pack(torch.cat((mean[:, None], directions), 1)).flatten(1)
    parts = (vectors, _pack(codes.transpose(1, 2)).flatten(1), mean_scale, scales.flatten(1))
    return torch.cat(parts, 1).view(pages, layers, heads, shape.digest_bytes)


def page_logits(digests: torch.Tensor, queries: torch.Tensor, shape: DigestLayout, scaling: float | None = None) -> torch.Tensor:
    """For each query and page the estimated log of the summed exponentials of its logits, fp32 `[tokens, heads, pages]`.

    `digests`: one layer's, uint8 `[pages, kv_heads, digest_bytes]`. `queries`: `[tokens, heads, head_dim]`, rotated to their positions, as
    attention gets them; heads are groups of equal size, one per kv head. `scaling` of the logits: 1 / sqrt(head_dim) unless given.
    LayoutError for shapes that do not go together.
    """
    check_logits(digests, queries, shape)
    pages, kv_heads, _ = digests.shape
    tokens, heads, width = queries.shape
    scaling = width**-0.5 if scaling is None else scaling
    # [kv_heads, tokens * group, width] against [kv_heads, width, pages * pieces * 3]
    asked = rotate(queries.to(torch.float32).contiguous() * scaling).view(tokens, kv_heads, heads // kv_heads, width)
    asked = asked.transpose(0, 1).reshape(kv_heads, -1, width)
    vectors, coefficients = _unpack(digests, shape)
    dots = (asked @ vectors.flatten(1, 3).transpose(1, 2)).view(kv_heads, -1, pages, shape.pieces, 1 + RANK)
    logits = torch.einsum("hqnpr,hnptr->hqnpt", dots[..., 1:], coefficients) + dots[..., :1]
    summed = logits.flatten(3).logsumexp(3)
    return summed.view(kv_heads, tokens, heads // kv_heads, pages).transpose(0, 1).reshape(tokens, heads, pages)


def check_logits(digests: torch.Tensor, queries: torch.Tensor, shape: DigestLayout) -> None:
    """LayoutError unless these go together, as `page_logits` says."""
    if digests.ndim != 3 or digests.shape[2] != shape.digest_bytes:
        raise LayoutError(f"digests have shape {list(digests.shape)}; expected [pages, kv_heads, {shape.digest_bytes}]")
    kv_heads = digests.shape[1]
    if queries.ndim != 3 or queries.shape[2] != shape.head_dim or queries.shape[1] % kv_heads:
        expected = f"[tokens, a multiple of {kv_heads} heads, {shape.head_dim}]"
        raise LayoutError(f"queries have shape {list(queries.shape)}; expected {expected}")


def key_logits(keys: torch.Tensor, queries: torch.Tensor, scaling: float | None = None) -> torch.Tensor:
    """As `page_logits` for one page whose keys `[tokens of the page, kv_heads, head_dim]` are at hand: exact, `[tokens, heads, 1]`."""
    tokens, heads, width = queries.shape
    grouped = queries.to(torch.float32).view(tokens, keys.shape[1], -1, width) * (width**-0.5 if scaling is None else scaling)
    logits = torch.einsum("qhgd,thd->qhgt", grouped, keys.to(torch.float32))
    return logits.logsumexp(-1).view(tokens, heads, 1)


def _directions(rest: torch.Tensor) -> torch.Tensor:
    """The two directions along which `rest` `[n, tokens, width]` varies most, as whole numbers -7 to 7, fp32 `[n, 2, width]`."""
    gram = rest @ rest.transpose(1, 2)
    found = []
    for _ in range(RANK):
        power = gram
        for _ in range(_SQUARINGS):
            power = power / power.diagonal(dim1=1, dim2=2).sum(1).clamp_min(torch.finfo(torch.float32).tiny)[:, None, None]
            power = power @ power
        largest = power.diagonal(dim1=1, dim2=2).argmax(1)
        weights = power.take_along_dim(largest[:, None, None], 2)
        weights = weights / weights.norm(dim=1, keepdim=True).clamp_min(1e-20)
        found.append(weights)
        seen = gram @ weights
        explained = (weights * seen).sum(1, keepdim=True).clamp_min(1e-20)
        gram = gram - seen @ seen.transpose(1, 2) / explained
    along = torch.cat(found, 2).transpose(1, 2) @ rest
    return (along * (_LARGEST / along.abs().amax(2, keepdim=True).clamp_min(1e-20))).round()


def _fit(rest: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Least squares: what multiples of the directions come nearest to `rest`, `[n, tokens, 2]`."""
    shares = rest @ directions.transpose(1, 2)
    a, b, c = _products(directions)
    # Parallel directions: the second one adds nothing. A little on the diagonal instead of a case of its own.
    a, c = a * 1.0001 + 1e-6, c * 1.0001 + 1e-6
    determinant = a * c - b * b
    first = (c * shares[..., 0] - b * shares[..., 1]) / determinant
    second = (a * shares[..., 1] - b * shares[..., 0]) / determinant
    return torch.stack((first, second), 2)


def _products(directions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    first, second = directions[:, :1], directions[:, 1:]
    return (first * first).sum(2), (first * second).sum(2), (second * second).sum(2)


def _quantize(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers -7 to 7 (fp32) and the byte of their scale, uint8 `[..., 1]`, for `values` `[..., n]`; no number is cut off."""
    largest = values.abs().amax(-1, keepdim=True) / _LARGEST
    byte = (largest.clamp_min(2.0**-16).log2() * 8 + 128).ceil().clamp(0, 255)
    return (values / _scale(byte)).round().clamp(-_LARGEST, _LARGEST), byte.to(torch.uint8)


def _scale(byte: torch.Tensor) -> torch.Tensor:
    return torch.exp2(byte.to(torch.float32) / 8 - 16)


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """Whole numbers -7 to 7 `[..., n]` as nibbles, uint8 `[..., ceil(n / 2)]`."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    whole = (codes + 8).to(torch.uint8)
    return whole[..., 0::2] | (whole[..., 1::2] << 4)


def _nibbles(packed: torch.Tensor, count: int) -> torch.Tensor:
    """The inverse of `_pack`: the first `count` numbers, fp32."""
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)[..., :count]
    return codes.to(torch.float32) - 8


def _unpack(digests: torch.Tensor, shape: DigestLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and directions `[kv_heads, pages, pieces, 3, head_dim]`, coefficients `[kv_heads, pages, pieces, piece_tokens, 2]`."""
    pages, heads, _ = digests.shape
    pieces = digests.transpose(0, 1).reshape(heads, pages, shape.pieces, shape.piece_bytes)
    end = (1 + RANK) * shape.vector_bytes
    packed = pieces[..., :end].reshape(heads, pages, shape.pieces, 1 + RANK, shape.vector_bytes)
    vectors = _nibbles(packed, shape.head_dim)
    scales = _scale(pieces[..., -1 - RANK :])
    vectors[..., 0, :] *= scales[..., :1]
    codes = _nibbles(pieces[..., end : end + shape.piece_tokens, None], RANK)
    return vectors, codes * scales[..., None, 1:]
