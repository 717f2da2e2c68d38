"""Space inside a file, by Linux's `fallocate`: giving blocks back, and asking for them ahead. Functions over open files, no state."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable

_KEEP_SIZE, _PUNCH_HOLE = 1, 2
UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
"""What file systems answer that cannot do it."""
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""What those answer that have no room, whatever else they can do."""


def punch(file: int, offset: int, length: int) -> None:
    """Deallocate a range; it reads as zeros and the size stays. OSError, with an errno of UNSUPPORTED where that is not possible."""
    _fallocate(file, _PUNCH_HOLE | _KEEP_SIZE, offset, length)


def allocate(file: int, offset: int, length: int) -> None:
    """Allocate a range that reads as zeros where nothing was written, extending the file if need be. OSError."""
    _fallocate(file, 0, offset, length)


def _load_fallocate() -> Callable[[int, int, int, int], int] | None:
    function = getattr(ctypes.CDLL(None, use_errno=True), "fallocate64", None)
    if function is None:
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    function.restype = ctypes.c_int
    call: Callable[[int, int, int, int], int] = function
    return call


_libc_fallocate = _load_fallocate()


def _fallocate(file: int, mode: int, offset: int, length: int) -> None:
    if _libc_fallocate is None:
        raise OSError(errno.ENOSYS, "this C library has no fallocate64")
    while _libc_fallocate(file, mode, offset, length) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
