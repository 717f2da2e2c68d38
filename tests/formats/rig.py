"""The native codecs called as `kvtier.formats.native` calls them, what the torch reference says beside them, and pages to code."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from kvtier.formats import BLOCK_CODECS, native
from kvtier.formats.bits import plane_bytes, unpack, unpack_planes
from kvtier.formats.codec import BlockShape
from kvtier.formats.levels import LEVELS2, LEVELS3, LEVELS4
from kvtier.layout import PageLayout

CODECS = {"raw": 0, "q8": 1, "q6": 2, "q4": 3, "q3": 4, "q8_0": 5, "q4_0": 6}
DTYPES = {"bf16": 0, "fp16": 1, "fp32": 2}
BITS = {"q4": 4, "q3": 3}
LEVELS = {levels.bits: levels.values for levels in (LEVELS2, LEVELS3, LEVELS4)}
EXACT = ("raw", "q8", "q8_0", "q4_0")
"""Codecs that give the reference's bytes."""

GUARD = 0xA5
loaded = native.codecs()
INSTRUCTION_SETS = loaded.available() if loaded else []

needs_native = pytest.mark.skipif(loaded is None, reason=f"native codecs: {native.why_missing()}")


def plan_of(name: str, layout: PageLayout) -> tuple[bytes, int]:
    entries, offset = b"", 0
    for shape in shapes_of(layout) * layout.layers:
        entries += struct.pack("<iiq", CODECS[name], shape.keys, offset)
        offset += BLOCK_CODECS[name].block_bytes(shape)
    sizes = (layout.layers, layout.planes, layout.page_tokens, layout.kv_heads, layout.head_dim)
    head = struct.pack("<8i", DTYPES[layout.dtype], *sizes, layout.layers * layout.planes, 0)
    return head + entries + struct.pack("<q", offset), offset


def shapes_of(layout: PageLayout) -> list[BlockShape]:
    sizes = (layout.page_tokens, layout.kv_heads, layout.head_dim, layout.dtype)
    return [BlockShape(*sizes, keys) for keys in ((True, False) if layout.planes == 2 else (False,))]


def reference_payloads(name: str, pages: torch.Tensor, layout: PageLayout, begins: bool = False) -> list[np.ndarray]:
    shapes, codec = shapes_of(layout), BLOCK_CODECS[name]
    encode = codec.encode_first if begins else codec.encode
    blocks = [[encode(layer[p][None], shape)[0] for layer in page for p, shape in enumerate(shapes)] for page in pages]
    return [torch.cat(each).numpy() for each in blocks]


def blocks_of(name: str, payload: np.ndarray, layout: PageLayout) -> list[tuple[torch.Tensor, BlockShape]]:
    blocks, offset = [], 0
    for shape in shapes_of(layout) * layout.layers:
        size = BLOCK_CODECS[name].block_bytes(shape)
        blocks.append((torch.from_numpy(payload[offset : offset + size].copy()), shape))
        offset += size
    return blocks


def reference_pages(name: str, payloads: list[np.ndarray], layout: PageLayout) -> torch.Tensor:
    blocks = [[BLOCK_CODECS[name].decode(block[None], shape)[0] for block, shape in blocks_of(name, each, layout)] for each in payloads]
    return torch.stack([torch.stack(each).view(layout.shape) for each in blocks])


def codes_of(name: str, payload: np.ndarray, layout: PageLayout, begins: bool) -> torch.Tensor:
    """Codes in the order of what they stand for."""
    parts = []
    for block, shape in blocks_of(name, payload, layout):
        values = shape.vectors * shape.head_dim
        if name == "q8":
            parts.append(block[:values].view(torch.int8).int())
        elif name == "q6":
            parts.append(unpack(block[-values * 6 // 8 :].view(shape.vectors, -1), 6).flatten().int())
        else:
            parts += level_codes(block[-values * BITS[name] // 8 :], shape, BITS[name], begins)
    return torch.cat(parts)


def level_codes(packed: torch.Tensor, shape: BlockShape, bits: int, begins: bool) -> list[torch.Tensor]:
    """The ranks of levels, run by run; the first token's codes are whole numbers."""
    runs = [(bits, shape.tokens)]
    if begins and shape.tokens > 8 - bits:
        runs = [(8, 1), (bits - 1, 8 - bits), (bits, shape.tokens - 9 + bits)]
    found, start = [], 0
    for width, tokens in runs:
        vectors = tokens * shape.heads
        size = vectors * shape.head_dim * width // 8
        part, start = packed[start : start + size], start + size
        if width == 8:
            found.append(part.view(torch.int8).int())
            continue
        sizes = plane_bytes(shape.head_dim, width)
        planes = part.split_with_sizes([vectors * each for each in sizes])
        codes = unpack_planes([plane.view(vectors, each) for plane, each in zip(planes, sizes, strict=True)], width)
        found.append(LEVELS[width].argsort().argsort()[codes.flatten().int()].int())
    return found


def usual_pages(layout: PageLayout, count: int = 3) -> torch.Tensor:
    """Vectors of many sizes, keys with a common mean."""
    random = torch.Generator().manual_seed(layout.head_dim)
    shape = (count, *layout.shape)
    pages = torch.randn(shape, generator=random) * torch.randn((*shape[:-1], 1), generator=random).exp()
    pages[:, :, 0] += 3 * torch.randn((layout.kv_heads, layout.head_dim), generator=random)
    return pages.to(layout.torch_dtype)


def encode(codecs, name: str, pages: torch.Tensor, layout: PageLayout, begins: bool = False) -> list[np.ndarray]:
    plan, size = plan_of(name, layout)
    payloads = list(np.zeros((len(pages), size), np.uint8))
    codecs.encode(plan, pages.data_ptr(), range(len(pages)), payloads, bytes([begins] * len(pages)), 0)
    return payloads


def decode(codecs, name: str, payloads: list[np.ndarray], layout: PageLayout) -> torch.Tensor:
    pages = torch.full((len(payloads), *layout.shape), 7.0).to(layout.torch_dtype)
    codecs.decode(plan_of(name, layout)[0], payloads, pages.data_ptr(), range(len(payloads)), 0, layout.layers, layout.page_bytes)
    return pages
