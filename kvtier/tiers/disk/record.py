"""One copy on disk: a 256-byte header that says everything about the payload behind it. Pure functions over bytes, no I/O.

Little-endian: magic, version, header bytes, sequence, key, parent key, depth, layout fingerprint, hash of the format's name, payload
bytes, xxh3-128 of the payload, zeros, xxh3-64 of all header bytes before it. A record is padded to BLOCK_BYTES; the padding means
nothing.
"""

from __future__ import annotations

import hashlib
import struct
from typing import NamedTuple

import numpy as np
import xxhash

from kvtier.formats.proof import Proof
from kvtier.io.files import BLOCK_BYTES, Bytes
from kvtier.keys import KEY_BYTES
from kvtier.tiers.base import PageId, Refused

HEADER_BYTES = 256
_VERSION = 2
_MAGIC = b"kvtier\0r"
_FIELDS = struct.Struct("<8sIIQ32s32sQ16s16sQ16s")
_CHECKSUM = struct.Struct("<Q")
_CHECKED_BYTES = HEADER_BYTES - _CHECKSUM.size
_KEY_AT, _DIGEST_AT = struct.calcsize("<8sIIQ"), _FIELDS.size - 16


class Header(NamedTuple):
    """What a record says about itself. `sequence` grows with every record a store writes."""

    sequence: int
    page: PageId
    layout_fingerprint: bytes
    format_hash: bytes
    payload_bytes: int
    payload_checksum: bytes


def format_hash(name: str) -> bytes:
    """16 bytes that stand for a format's name."""
    return hashlib.blake2b(name.encode(), digest_size=16).digest()


def record_bytes(payload_bytes: int) -> int:
    """Bytes on disk of a record with that payload, padding included."""
    return -(-(HEADER_BYTES + payload_bytes) // BLOCK_BYTES) * BLOCK_BYTES


def payload_checksum(payload: Bytes) -> bytes:
    """xxh3-128 of a contiguous payload."""
    return xxhash.xxh3_128_digest(payload.data)


def compose(header: Header, payload: Bytes, buffer: Bytes) -> Bytes:
    """Write the record into `buffer` and return the part of it to be written to disk. Keys must be KEY_BYTES long (ValueError)."""
    page = header.page
    if len(page.key) != KEY_BYTES or len(page.parent) != KEY_BYTES:
        raise ValueError(f"page keys of {len(page.key)} and {len(page.parent)} bytes; expected {KEY_BYTES}")
    record = buffer[: record_bytes(header.payload_bytes)]
    record[:HEADER_BYTES] = 0
    fields = (_MAGIC, _VERSION, HEADER_BYTES, header.sequence, page.key, page.parent, page.depth)
    proof = (header.layout_fingerprint, header.format_hash, header.payload_bytes, header.payload_checksum)
    _FIELDS.pack_into(record.data, 0, *fields, *proof)
    _CHECKSUM.pack_into(record.data, _CHECKED_BYTES, xxhash.xxh3_64_intdigest(record[:_CHECKED_BYTES].data))
    end = HEADER_BYTES + header.payload_bytes
    record[HEADER_BYTES:end] = payload
    record[end:] = 0
    return record


def parse(record: Bytes) -> Header | None:
    """The header at the start of `record` (`[>= HEADER_BYTES]`), or None if its own checksum says it is not one."""
    if _CHECKSUM.unpack_from(record.data, _CHECKED_BYTES)[0] != xxhash.xxh3_64_intdigest(record[:_CHECKED_BYTES].data):
        return None
    magic, version, header_bytes, sequence, key, parent, depth, layout, name, size, checksum = _FIELDS.unpack_from(record.data)
    if (magic, version, header_bytes) != (_MAGIC, _VERSION, HEADER_BYTES):
        return None
    return Header(sequence, PageId(key, parent, depth), layout, name, size, checksum)


def proof(layout_fingerprint: bytes, format_hash: bytes, payload_bytes: int) -> Proof:
    """What a header in front of that many payload bytes of this layout and format must say, whatever else it says."""
    head, mask = bytearray(HEADER_BYTES), bytearray(HEADER_BYTES)
    nobody = bytes(KEY_BYTES)
    _FIELDS.pack_into(
        head, 0, _MAGIC, _VERSION, HEADER_BYTES, 0, nobody, nobody, 0, layout_fingerprint, format_hash, payload_bytes, bytes(16)
    )
    known = (b"\xff" * len(_MAGIC), 0xFFFFFFFF, 0xFFFFFFFF, 0, nobody, nobody, 0, b"\xff" * 16, b"\xff" * 16, (1 << 64) - 1, bytes(16))
    _FIELDS.pack_into(mask, 0, *known)
    return Proof(bytes(head), bytes(mask), _KEY_AT, _DIGEST_AT, _CHECKED_BYTES)


def is_blank(record: Bytes) -> bool:
    """Whether the header's place holds only zeros: never written, or punched."""
    return not np.any(record[:HEADER_BYTES])


def payload_of(header: Header, record: Bytes) -> Bytes | Refused:
    """The payload behind `header`, as a view of `record`, or why it cannot be trusted."""
    end = HEADER_BYTES + header.payload_bytes
    if end > len(record):
        return Refused("truncated")
    payload = record[HEADER_BYTES:end]
    return payload if payload_checksum(payload) == header.payload_checksum else Refused("checksum")
