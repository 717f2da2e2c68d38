"""What a head in front of a payload must say for the payload to be used: plain data, so that compiled code can judge by it. No state."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property

LEAST_BYTES = 241
"""The shortest range of which the lower half of the xxh3-128 is the xxh3-64: XXH3 does shorter ones another way."""


@dataclass(frozen=True)
class Proof:
    """A head of `len(expected)` bytes: those where `mask` is 0xFF are as `expected`, the others 0 there, the wanted key is at `key_at`; the
    xxh3-128 of the payload at `digest_at`, as `xxhash.xxh3_128_digest` gives it; the xxh3-64 of the first `checked_bytes` (LEAST_BYTES or
    more) right behind these, little-endian."""

    expected: bytes
    mask: bytes
    key_at: int
    digest_at: int
    checked_bytes: int

    @cached_property
    def packed(self) -> bytes:
        """As the compiled kernels read it (`kvtier/formats/native/proof.h`)."""
        return struct.pack("<4q", len(self.expected), self.key_at, self.digest_at, self.checked_bytes) + self.expected + self.mask
