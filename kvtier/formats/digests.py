"""The xxhash package's own compiled function, for compiled code that digests between other work. State: its address, looked up once.

The package has no C interface, but its extension module, as it comes in wheels and from distributions, exports what xxHash's documented
one names. It is used only if it gives what the package gives.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvtier.formats.proof import LEAST_BYTES

DIGEST_BYTES = 16

_NAMES = "XXH3_128bits_dispatch", "XXH3_128bits"
"""The first takes the CPU's widest instructions; https://xxhash.com/doc/v0.8.3/group___x_x_h3__family.html"""


class _Halves(ctypes.Structure):
    """XXH128_hash_t."""

    _fields_ = (("low", ctypes.c_uint64), ("high", ctypes.c_uint64))


def short_digest(payload: NDArray[np.uint8], digest: bytes | None) -> int:
    """The xxh3-64 of a contiguous payload: half of its xxh3-128, where that is known."""
    if digest is None or payload.size < LEAST_BYTES:
        return xxhash.xxh3_64_intdigest(payload.data)
    return int.from_bytes(digest[DIGEST_BYTES // 2 :], "big")


def digests_of(payloads: Iterable[NDArray[np.uint8]]) -> list[bytes]:
    """The xxh3-128 of each, by the package."""
    return [xxhash.xxh3_128_digest(payload.data) for payload in payloads]


@lru_cache(maxsize=1)
def digest_address() -> int:
    """The address of xxHash's `XXH128_hash_t XXH3_128bits(const void *, size_t)`; 0 where it cannot be had."""
    found = importlib.util.find_spec("xxhash._xxhash")
    if found is None or found.origin is None:  # a build without the extension
        return 0
    try:
        library = ctypes.CDLL(found.origin)
    except OSError:
        return 0
    for name in _NAMES:
        if (function := getattr(library, name, None)) is not None and _is_digest(function):
            return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


def _is_digest(function: Any) -> bool:
    function.restype, function.argtypes = _Halves, (ctypes.c_char_p, ctypes.c_size_t)
    probe = bytes(range(256)) * 9
    halves = function(probe, len(probe))
    return (int(halves.high) << 64 | int(halves.low)) == xxhash.xxh3_128_intdigest(probe)
