"""What engines of plain system calls on a pool of threads have in common; `buffered` and `direct` differ in how they open files.

The state is the pool's, and whether the engine was stopped. `os` restarts interrupted calls by itself (PEP 475); short ones are continued
here.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kvtier.errors import AlignmentError, Closed
from kvtier.io import holes, native_pool
from kvtier.io.files import BLOCK_BYTES, Bytes, FileEngine, Outcomes, Request, SomeOutcomes, Then, address_of, page_aligned
from kvtier.io.pool import RequestPool

DEPTH = 8
"""Requests under way at once unless told otherwise: from there on, disks give no more."""


_STRIDES = (1,)


class PooledEngine(FileEngine):
    """preadv and pwrite on `depth` threads, which start when a batch first needs them."""

    flags = 0
    """Beyond what every file is opened with."""
    native = True
    """Whether batches go to compiled threads where there are any, instead of to `_pread` and `_pwrite` on Python's."""

    def __init__(self, depth: int = DEPTH, alignment_bytes: int = 1) -> None:
        self.depth = depth
        self.alignment_bytes = alignment_bytes
        self._stopped = False
        self._pool = RequestPool(depth, f"kvtier-{self.name}")
        self._native_pool = native_pool.make(depth, alignment_bytes) if self.native else None
        self.reads_ahead = self._native_pool is not None and depth > 1

    def keep_on(self, cpus: Sequence[int]) -> None:
        super().keep_on(cpus)
        self._pool.keep_on(self.cpus)
        if self._native_pool is not None:
            self._native_pool.keep_on(self.cpus)

    def open(self, path: Path) -> int:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | self.flags, 0o600)

    def size(self, file: int) -> int:
        return os.fstat(file).st_size

    def pread_into(self, file: int, offset: int, buffer: Bytes) -> int:
        self._check(offset, buffer, filled=True)
        return self._pread(file, offset, buffer)

    def pwrite(self, file: int, offset: int, data: Bytes) -> None:
        self._check(offset, data, filled=False)
        self._pwrite(file, offset, data)

    def read_each(self, requests: Sequence[Request]) -> Outcomes:
        self._check_all(requests, filled=True)
        return self._carry(requests, writing=False, helping=False)

    def read_some(self, requests: Sequence[Request]) -> SomeOutcomes:
        if self._native_pool is None:
            return super().read_some(requests)
        self._check_all(requests, filled=True)
        return self._native_pool.some(requests, writing=False, helping=False)

    def read_then(self, requests: Sequence[Request], then: Then, at_once: int) -> SomeOutcomes:
        if self._native_pool is None:
            return super().read_then(requests, then, at_once)
        self._check_all(requests, filled=True)
        return self._native_pool.then(requests, then, at_once)

    def write_all(self, requests: Sequence[Request]) -> list[OSError | None]:
        self._check_all(requests, filled=False)
        results: list[OSError | None] = [None] * len(requests)
        for index, outcome in self._carry(requests, writing=True, helping=True):
            if isinstance(outcome, OSError):
                results[index] = outcome
        return results

    def allocate(self, file: int, offset: int, length: int) -> bool:
        try:
            holes.allocate(file, offset, length)
        except OSError:
            return False
        return True

    def punch(self, file: int, offset: int, length: int) -> bool:
        try:
            holes.punch(file, offset, length)
        except OSError as error:
            if error.errno not in holes.UNSUPPORTED:
                raise
            self.pwrite(file, offset, page_aligned(min(length, BLOCK_BYTES)))
            return False
        return True

    def can_punch(self, directory: Path) -> bool:
        data = page_aligned(4 * BLOCK_BYTES)
        data[:] = 0xA5
        try:
            with tempfile.TemporaryFile(dir=directory) as probe:
                written = self._wrote(probe.fileno(), data)
                if not written:
                    os.truncate(probe.fileno(), data.nbytes)
                holes.punch(probe.fileno(), BLOCK_BYTES, 2 * BLOCK_BYTES)
                if not written:  # in a file without blocks there is nothing to see: the system's word has to do
                    return True
                self.pread_into(probe.fileno(), 0, data)
        except OSError as error:
            # Not to be taken for one without holes: there, what a store has beyond so many whole slots is cut off when it is opened.
            return error.errno in holes.FULL
        blocks = data.reshape(4, BLOCK_BYTES).any(axis=1)
        return bool((blocks == [True, False, False, True]).all())

    def sync(self, file: int) -> None:
        os.fdatasync(file)

    def close(self, file: int) -> None:
        os.close(file)

    def stop(self) -> None:
        self._stopped = True
        self._pool.stop()
        if self._native_pool is not None:
            self._native_pool.stop()

    def _wrote(self, file: int, data: Bytes) -> bool:
        """Whether there was room for it at the start of the file. OSError if anything else was in the way."""
        try:
            self.pwrite(file, 0, data)
        except OSError as error:
            if error.errno not in holes.FULL:
                raise
            return False
        return True

    def _carry(self, requests: Sequence[Request], writing: bool, helping: bool) -> Outcomes:
        if self._native_pool is not None:
            return self._native_pool.each(requests, writing, helping)
        return self._pool.each(self._write if writing else self._read, requests, helping)

    def _pread(self, file: int, offset: int, buffer: Bytes) -> int:
        view = buffer.data
        done = os.preadv(file, [view], offset)
        # A count that is not aligned can only come from the end of the file.
        while 0 < done < len(view) and done % self.alignment_bytes == 0:
            count = os.preadv(file, [view[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def _pwrite(self, file: int, offset: int, data: Bytes) -> None:
        view = data.data
        while len(view) > 0:
            count = os.pwrite(file, view, offset)
            if count == 0:
                raise OSError(errno.EIO, "the system wrote nothing and gave no reason")
            view = view[count:]
            offset += count

    def _read(self, request: Request) -> int | OSError:
        try:
            return self._pread(request.file, request.offset, request.buffer)
        except OSError as error:
            return error

    def _write(self, request: Request) -> int | OSError:
        try:
            self._pwrite(request.file, request.offset, request.buffer)
        except OSError as error:
            return error
        return request.buffer.nbytes

    def _check_all(self, requests: Sequence[Request], filled: bool) -> None:
        self._check_running()
        for _, offset, buffer in requests:
            self._check(offset, buffer, filled)

    def _check_running(self) -> None:
        if self._stopped:
            raise Closed(f"this {self.name} engine was stopped and carries no more batches; make a new one")

    def _check(self, offset: int, buffer: Bytes, filled: bool) -> None:
        # At each request, so the strides, which say almost all, come first.
        if (buffer.strides != _STRIDES and not _is_plain(buffer)) or (filled and not buffer.flags.writeable):
            access = "writable" if buffer.flags.writeable else "read-only"
            got = f"{access} {buffer.dtype} of shape {buffer.shape} and strides {buffer.strides}"
            wanted = "contiguous, writable memory to fill" if filled else "contiguous memory"
            raise AlignmentError(f"{self.name} I/O needs 1-D {wanted}, of bytes; got {got}; take memory from kvtier.io.files.page_aligned")
        if self.alignment_bytes > 1 and (address_of(buffer) | offset | buffer.nbytes) % self.alignment_bytes:
            parts = f"an address of {address_of(buffer):#x}, {buffer.nbytes} bytes at offset {offset}"
            raise AlignmentError(
                f"{self.name} I/O needs address, length and offset in multiples of {self.alignment_bytes}; got {parts}; "
                "take memory from kvtier.io.files.page_aligned, or disk.io_engine: buffered"
            )


def _is_plain(buffer: Bytes) -> bool:
    """Whether it is 1-D, contiguous and of bytes; arrays of one element or none may have any strides."""
    return buffer.ndim == 1 and buffer.itemsize == 1 and buffer.flags.c_contiguous
