"""The xxhash package's own compiled function, for compiled code that digests between other work. State: its address, looked up once.

The package has no C interface, but its extension module, as it comes in wheels and from distributions, exports what xxHash's documented
one names. It is used only if it gives what the package gives.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import lru_cache
from typing import Any

import xxhash

_NAMES = "XXH3_128bits_dispatch", "XXH3_128bits"
"""The first takes the CPU's widest instructions; https://xxhash.com/doc/v0.8.3/group___x_x_h3__family.html"""


class _Halves(ctypes.Structure):
    """XXH128_hash_t."""

    _fields_ = (("low", ctypes.c_uint64), ("high", ctypes.c_uint64))


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
