"""The byte stages behind "<format>+lz4" and "<format>+zstd": another format's payload in fewer bytes, stored where it does not shrink.

Bytes that are alike are compressed together: blocks of the same codec that hold the same plane (keys or values) are one stream. Plain
numbers are first rotated left by one bit, so that the sign leaves its place above the exponent, and split into planes of bytes,
the most significant first. That plane (for bf16 exactly the exponent) is the only one that shrinks; each plane is a part of its own and
stored if it does not. Sizes on real pages (SmolLM2-135M, 16 tokens): see docs/formats.md. Compressed bytes have hardly any repeats, what
shrinks them is zstd's entropy coder, so its search for repeats is kept small: faster, and smaller than plain level 1.

Payload, little-endian:
    stage     uint8    0 inner payload stored whole, 1 LZ4 blocks, 2 Zstandard frames
    parts     uint8    parts that follow; 0 if stored whole
    reserved  uint16   0
    length    uint32   bytes of the inner payload
    table     per part: coding uint32 (0 stored, 1 compressed), bytes of its body uint32
    bodies    one after the other
Parts: stream by stream (in the order in which they first appear in the inner payload), plane by plane.

`unpack` believes nothing: the layout says how many parts there are and how long each is, every field is compared with that, and no
decompressor may produce more. Numbers (NaN, infinities, ...) come back as the inner format says.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import lz4.block
import numpy as np
import torch
import zstandard

from kvtier.errors import LayoutError
from kvtier.formats.base import Format, Payload, Stream, check_pages, check_rows, described_bytes, room_for
from kvtier.layout import PageLayout

PREFIX = struct.Struct("<BBHI")
PART = struct.Struct("<II")
STORED, COMPRESSED = 0, 1
WORTHWHILE = 64
"""A part is stored unless compressing takes more than one byte in so many away: less is not worth the time of unpacking."""

LARGEST_INPUT = 0x7E000000
"""Bytes of an inner payload that LZ4 can take at most; as good a limit for Zstandard."""


@dataclass(frozen=True)
class Coder:
    """A general compressor. `compressor()` gives a function for one thread; `decompress(body, length)` gives at most `length` bytes."""

    number: int
    compressor: Callable[[], Callable[[Payload], bytes]]
    decompress: Callable[[Payload, int], bytes]


def _lz4_compressor() -> Callable[[Payload], bytes]:
    def compress(data: Payload) -> bytes:
        compressed: bytes = lz4.block.compress(data, store_size=False)
        return compressed

    return compress


def _lz4_decompress(body: Payload, length: int) -> bytes:
    try:
        data: bytes = lz4.block.decompress(body, uncompressed_size=length)
    except lz4.block.LZ4BlockError as error:
        raise ValueError(f"lz4 payload does not decompress: {error}") from error
    return data


def _zstd_compressor() -> Callable[[Payload], bytes]:
    few_repeats = zstandard.ZstdCompressionParameters.from_level(1, min_match=7, hash_log=8)
    compressor = zstandard.ZstdCompressor(compression_params=few_repeats)
    return lambda data: compressor.compress(data.data)


def _zstd_decompress(body: Payload, length: int) -> bytes:
    try:
        # The decompressor allocates what the frame says, so it must not say more than expected.
        said = zstandard.frame_content_size(body.data)
        if said != length:
            raise ValueError(f"zstd payload says that a part has {said} bytes; expected {length}")
        return zstandard.ZstdDecompressor().decompress(body.data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"zstd payload does not decompress: {error}") from error


CODERS = {"lz4": Coder(1, _lz4_compressor, _lz4_decompress), "zstd": Coder(2, _zstd_compressor, _zstd_decompress)}


@dataclass(frozen=True)
class Staged(Format):
    """See the file's head. `inner` must have payloads of fixed size, `stage` is a name in `CODERS`."""

    inner: Format
    stage: str
    fixed_size = False

    def __post_init__(self) -> None:
        if not self.inner.fixed_size:
            raise ValueError(f"{self.stage} stage: {self.inner.name} has payloads of varying size; expected a format of fixed size")

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.inner.name}+{self.stage}"

    @property
    def lossless(self) -> bool:  # type: ignore[override]
        return self.inner.lossless

    def payload_bytes(self, layout: PageLayout) -> int:
        inner = self.inner.payload_bytes(layout)
        if inner > LARGEST_INPUT:
            raise LayoutError(f"{self.name}: a page has {inner} bytes; the stage takes at most {LARGEST_INPUT}; use smaller pages")
        return PREFIX.size + inner

    def encode(
        self,
        pages: torch.Tensor,
        layout: PageLayout,
        rows: Sequence[int] | None = None,
        out: Sequence[Payload] | None = None,
        first: Collection[int] = (),
        *,
        compress: bool = True,
    ) -> list[Payload]:
        """As `Format.encode`. With `compress` False everything is stored, at no cost; `economy.py` says when that is better."""
        rows = check_rows(rows, check_pages(pages, layout), "encode")
        count, size = len(rows), self.payload_bytes(layout)
        if not compress:
            places = room_for(count, size, out)
            self.inner.encode(pages, layout, rows, [place[PREFIX.size :] for place in places], first)
            for place in places:
                _write_prefix(place, STORED, 0, size - PREFIX.size)
            return places
        if out is not None:
            room_for(count, size, out)
        return self.pack(self.inner.encode(pages, layout, rows, first=first), layout, out)

    def pack(self, payloads: Sequence[Payload], layout: PageLayout, out: Sequence[Payload] | None = None) -> list[Payload]:
        """The stage alone, over payloads of the inner format; `encode` is the inner format's and then this."""
        coder, streams = CODERS[self.stage], self.inner.streams(layout)
        compressor = coder.compressor()
        packed = (_pack(payload, streams, coder, compressor) for payload in payloads)
        if out is None:
            return [np.concatenate(pieces) for pieces in packed]
        return [_joined(pieces, place) for pieces, place in zip(packed, out, strict=False)]

    def store(self, payloads: Sequence[Payload], out: Sequence[Payload]) -> list[Payload]:
        """As `pack`, but everything is stored as it is: what `encode` does with `compress` False."""
        places = [place[: PREFIX.size + len(payload)] for payload, place in zip(payloads, out, strict=False)]
        for payload, place in zip(payloads, places, strict=True):
            place[PREFIX.size :] = payload
            _write_prefix(place, STORED, 0, len(payload))
        return places

    def unpack(self, payloads: Sequence[Payload], layout: PageLayout) -> list[Payload]:
        streams, length = self.inner.streams(layout), self.inner.payload_bytes(layout)
        return self.inner.unpack([_unpack(payload, streams, self.stage, length) for payload in payloads], layout)

    def decode(
        self,
        payloads: Sequence[Payload],
        layout: PageLayout,
        layers: slice = slice(None),
        out: torch.Tensor | None = None,
        rows: Sequence[int] | None = None,
    ) -> torch.Tensor:
        return self.inner.decode(payloads, layout, layers, out, rows)


def _pack(payload: Payload, streams: Sequence[Stream], coder: Coder, compress: Callable[[Payload], bytes]) -> list[Payload]:
    """The packed payload in pieces to be joined."""
    table, bodies, total = b"", [], 0
    for part in _parts(payload, streams):
        body = np.frombuffer(compress(part), np.uint8)
        coding = COMPRESSED if len(body) < len(part) - len(part) // WORTHWHILE else STORED
        bodies.append(body if coding == COMPRESSED else part)
        table += PART.pack(coding, len(bodies[-1]))
        total += len(bodies[-1])
    if len(table) + total >= len(payload):
        return [np.frombuffer(PREFIX.pack(0, 0, 0, len(payload)), np.uint8), payload]
    return [np.frombuffer(PREFIX.pack(coder.number, len(bodies), 0, len(payload)) + table, np.uint8), *bodies]


def _parts(payload: Payload, streams: Sequence[Stream]) -> Iterator[Payload]:
    for stream in streams:
        pieces = [payload[start : start + size] for start, size in stream.spans]
        joined = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        yield from [joined] if stream.element_bytes == 1 else _planes(joined, stream.element_bytes)


def _planes(data: Payload, element: int) -> list[Payload]:
    numbers = data.view(f"<u{element}")
    rotated = numbers << 1 | numbers >> (8 * element - 1)
    return [(rotated >> 8 * place).astype(np.uint8) for place in reversed(range(element))]


def _numbers(planes: Sequence[Payload]) -> Payload:
    """The inverse of `_planes`."""
    element = len(planes)
    rotated = planes[0].astype(f"<u{element}")
    for plane in planes[1:]:
        rotated <<= 8
        rotated |= plane
    return (rotated >> 1 | rotated << (8 * element - 1)).view(np.uint8)


def _unpack(packed: Payload, streams: Sequence[Stream], stage: str, length: int) -> Payload:
    usual = isinstance(packed, np.ndarray) and packed.dtype == np.uint8 and packed.ndim == 1
    if not usual or not packed.flags.c_contiguous or len(packed) < PREFIX.size:
        expected = f"contiguous uint8 of one dimension, at least {PREFIX.size} bytes"
        raise ValueError(f"{stage} payload is {described_bytes(packed)}; expected {expected}")
    number, count, reserved, said = PREFIX.unpack(packed[: PREFIX.size].tobytes())
    if (reserved, said) != (0, length):
        raise ValueError(f"{stage} payload says reserved {reserved}, length {said}; expected 0, {length}")
    coder = CODERS[stage]
    if (number, count) == (0, 0):
        if len(packed) != PREFIX.size + length:
            raise ValueError(f"{stage} payload holds {len(packed) - PREFIX.size} bytes; expected {length}")
        return packed[PREFIX.size :]
    if (number, count) != (coder.number, sum(stream.element_bytes for stream in streams)):
        raise ValueError(f"{stage} payload says stage {number} with {count} parts, which {stage} does not write for this layout")
    bodies = _bodies(packed, count, stage)
    payload = np.empty(length, np.uint8)
    for stream in streams:
        part_length = stream.bytes // stream.element_bytes
        planes = [_part(*next(bodies), part_length, coder, stage) for _ in range(stream.element_bytes)]
        joined = planes[0] if len(planes) == 1 else _numbers(planes)
        place = 0
        for start, size in stream.spans:
            payload[start : start + size] = joined[place : place + size]
            place += size
    return payload


def _bodies(packed: Payload, count: int, stage: str) -> Iterator[tuple[int, Payload]]:
    """Coding and body of each part."""
    start = PREFIX.size + count * PART.size
    if len(packed) < start:
        raise ValueError(f"{stage} payload has {len(packed)} bytes; expected a table of {count} parts, {start} bytes")
    table = list(PART.iter_unpack(packed[PREFIX.size : start].tobytes()))
    if start + sum(size for _, size in table) != len(packed):
        raise ValueError(f"{stage} payload has {len(packed)} bytes; its table says {start + sum(size for _, size in table)}")
    ends = np.cumsum([start, *(size for _, size in table)])
    return iter([(coding, packed[begin:end]) for (coding, _), begin, end in zip(table, ends, ends[1:], strict=False)])


def _part(coding: int, body: Payload, length: int, coder: Coder, stage: str) -> Payload:
    if coding == COMPRESSED and len(body) < length:
        body = np.frombuffer(coder.decompress(body, length), np.uint8)
    elif coding != STORED:
        raise ValueError(f"{stage} payload has a part coded {coding} with {len(body)} bytes; expected 0, or 1 with less than {length}")
    if len(body) != length:
        raise ValueError(f"{stage} payload has a part of {len(body)} bytes; expected {length}")
    return body


def _write_prefix(place: Payload, number: int, count: int, length: int) -> None:
    place[: PREFIX.size] = np.frombuffer(PREFIX.pack(number, count, 0, length), np.uint8)


def _joined(pieces: Sequence[Payload], place: Payload) -> Payload:
    size = sum(map(len, pieces))
    return np.concatenate(pieces, out=place[:size])
