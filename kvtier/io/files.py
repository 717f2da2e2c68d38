"""Positioned file I/O: the small contract the disk tier writes against, and its buffered engine.

An engine turns (file, offset, bytes) into system calls and holds no other state; siblings (O_DIRECT, io_uring) implement the same
class. Nothing here knows what the bytes mean. Engines may be called from several threads at once, also on the same file.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

BLOCK_BYTES = 4096
"""Offsets, lengths and buffer addresses that are multiples of this satisfy every engine."""

Bytes = NDArray[np.uint8]

_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_CANNOT_PUNCH = {errno.EOPNOTSUPP, errno.ENOSYS}


def page_aligned(size_bytes: int) -> Bytes:
    """Zeroed uint8 array of `size_bytes` whose address is a multiple of the memory page size."""
    return np.frombuffer(mmap.mmap(-1, size_bytes), dtype=np.uint8)


class FileEngine(ABC):
    """Positioned I/O on regular files. Every method but `can_punch` raises OSError when the system does.

    Callers keep offsets, lengths and buffer addresses multiples of BLOCK_BYTES, so that unbuffered engines can serve them. A file is
    named by the whole number `open` returned.
    """

    name: str

    @abstractmethod
    def open(self, path: Path) -> int:
        """Open `path` for reading and writing, creating it empty if missing."""

    @abstractmethod
    def size(self, file: int) -> int:
        """Bytes from the start of the file to its end, holes included."""

    @abstractmethod
    def pread_into(self, file: int, offset: int, buffer: Bytes) -> int:
        """Fill the 1-D contiguous `buffer` from `offset`; returns the bytes read, fewer than asked only at the end of the file."""

    @abstractmethod
    def pwrite(self, file: int, offset: int, data: Bytes) -> None:
        """Write all of the 1-D contiguous `data` at `offset`, extending the file as needed. After an OSError any part may be written."""

    @abstractmethod
    def punch(self, file: int, offset: int, length: int) -> bool:
        """Make sure that what starts at `offset` is gone: True if the range was deallocated and reads as zeros, False if the file
        system cannot do that and only the first BLOCK_BYTES were overwritten with zeros."""

    @abstractmethod
    def can_punch(self, directory: Path) -> bool:
        """Whether `punch` deallocates for files in `directory`; tried for real with an unnamed file."""

    @abstractmethod
    def sync(self, file: int) -> None:
        """Return once every earlier write to the file would survive a power failure (fdatasync)."""

    @abstractmethod
    def close(self, file: int) -> None:
        """Give the file back; its number must not be used again."""


class BufferedEngine(FileEngine):
    """System calls through the page cache. `os` restarts interrupted calls by itself (PEP 475); short ones are continued here."""

    name = "buffered"

    def open(self, path: Path) -> int:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def size(self, file: int) -> int:
        return os.fstat(file).st_size

    def pread_into(self, file: int, offset: int, buffer: Bytes) -> int:
        view = buffer.data
        done = 0
        while done < len(view):
            count = os.preadv(file, [view[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def pwrite(self, file: int, offset: int, data: Bytes) -> None:
        view = data.data
        while len(view) > 0:
            count = os.pwrite(file, view, offset)
            if count == 0:
                raise OSError(errno.EIO, "the system wrote nothing and gave no reason")
            view = view[count:]
            offset += count

    def punch(self, file: int, offset: int, length: int) -> bool:
        try:
            _fallocate(file, _PUNCH_HOLE | _KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno not in _CANNOT_PUNCH:
                raise
            self.pwrite(file, offset, np.zeros(min(length, BLOCK_BYTES), dtype=np.uint8))
            return False
        return True

    def can_punch(self, directory: Path) -> bool:
        try:
            with tempfile.TemporaryFile(dir=directory) as probe:
                data = np.full(4 * BLOCK_BYTES, 0xA5, dtype=np.uint8)
                self.pwrite(probe.fileno(), 0, data)
                _fallocate(probe.fileno(), _PUNCH_HOLE | _KEEP_SIZE, BLOCK_BYTES, 2 * BLOCK_BYTES)
                self.pread_into(probe.fileno(), 0, data)
        except OSError:
            return False
        blocks = data.reshape(4, BLOCK_BYTES).any(axis=1)
        return bool((blocks == [True, False, False, True]).all())

    def sync(self, file: int) -> None:
        os.fdatasync(file)

    def close(self, file: int) -> None:
        os.close(file)


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
