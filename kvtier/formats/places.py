"""Where the blocks of a payload are and what codes each: worked out once per format and layout, for the reference and the native kernels.

Blocks come layer by layer, keys before values, without header or padding. Frozen, without mutable state.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kvtier.formats.base import Payload, Stream
from kvtier.formats.codec import BlockCodec, BlockShape
from kvtier.formats.native import NativeCodecs
from kvtier.formats.native import codecs as native_codecs
from kvtier.layout import PageLayout

NATIVE_DTYPES = {"bf16": 0, "fp16": 1, "fp32": 2}


@dataclass(frozen=True)
class Place:
    """Where one block of a payload is and what codes it."""

    codec: BlockCodec
    shape: BlockShape
    offset: int
    size: int


@dataclass(frozen=True)
class Plan:
    """All blocks of one format and layout, by layer and plane; the native kernels and the same for them (None if they cannot do it)."""

    places: tuple[tuple[Place, ...], ...]
    payload_bytes: int
    streams: tuple[Stream, ...]
    native: tuple[NativeCodecs, bytes] | None

    def blocks(self, payload: Payload, first: int, stop: int, plane: int) -> Payload:
        """The blocks of one plane for layers `first` to `stop`, all coded alike: a view `[layers, block bytes]` of the payload."""
        place = self.places[first][plane]
        layer_bytes = sum(each.size for each in self.places[first])
        stretch = payload[place.offset : place.offset + (stop - first - 1) * layer_bytes + place.size]
        return np.lib.stride_tricks.as_strided(stretch, (stop - first, place.size), (layer_bytes, 1))

    def runs(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """Stretches of layers `first` to `stop` in which every layer is coded alike."""
        begin = first
        for layer in range(first + 1, stop + 1):
            if layer == stop or [p.codec for p in self.places[layer]] != [p.codec for p in self.places[begin]]:
                yield begin, layer
                begin = layer


def make_plan(pairs: Sequence[tuple[BlockCodec, BlockCodec]], layout: PageLayout) -> Plan:
    """The plan for pages whose layers are coded by `pairs`, those of keys and values of each. LayoutError where a codec cannot."""
    places, offset = [], 0
    for pair in pairs:
        row = []
        for codec, keys in zip(pair if layout.planes == 2 else pair[1:], (True, False), strict=False):
            shape = BlockShape(layout.page_tokens, layout.kv_heads, layout.head_dim, layout.dtype, keys and layout.planes == 2)
            row.append(Place(codec, shape, offset, codec.block_bytes(shape)))
            offset += row[-1].size
        places.append(tuple(row))
    return Plan(tuple(places), offset, _streams(places), _native_plan(places, layout, offset))


def _streams(places: Sequence[Sequence[Place]]) -> tuple[Stream, ...]:
    """One for each kind of bytes of each codec and plane: keys and values have different statistics."""
    alike: dict[tuple[BlockCodec, bool, int], list[tuple[int, int]]] = {}
    elements: dict[tuple[BlockCodec, bool, int], int] = {}
    for place in (place for row in places for place in row):
        start = place.offset
        for kind, size in enumerate(place.codec.sections(place.shape)):
            if size:
                key = place.codec, place.shape.keys, kind
                alike.setdefault(key, []).append((start, size))
                elements[key] = place.codec.element_bytes(place.shape)
            start += size
    return tuple(Stream(elements[key], tuple(spans)) for key, spans in alike.items())


def _native_plan(places: Sequence[Sequence[Place]], layout: PageLayout, payload_bytes: int) -> tuple[NativeCodecs, bytes] | None:
    native = native_codecs()
    if native is None:
        return None
    geometry = (NATIVE_DTYPES[layout.dtype], layout.page_tokens, layout.kv_heads, layout.head_dim)
    entries = [place for row in places for place in row]
    for codec in {place.codec for place in entries}:
        if codec.native_id is None or not native.supports(codec.native_id, *geometry):
            return None
    head = struct.pack("<8i", geometry[0], layout.layers, layout.planes, *geometry[1:], len(entries), 0)
    body = b"".join(struct.pack("<iiq", place.codec.native_id, place.shape.keys, place.offset) for place in entries)
    return native, head + body + struct.pack("<q", payload_bytes)
