"""Positioned file I/O: the contract of the engines the disk tier reads and writes with, one at a time or in batches.

An engine turns (file, offset, bytes) into system calls; it owns its threads and no other state. Its siblings are `direct` (O_DIRECT, the
default), `buffered` (page cache) and `async_files` (aiofiles); `probe` chooses. Nothing here knows what the bytes mean. Engines may be
called from several threads at once, also on the same file.
"""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

BLOCK_BYTES = 4096
"""Offsets, lengths and buffer addresses that are multiples of this satisfy every engine."""

Bytes = NDArray[np.uint8]


def page_aligned(size_bytes: int) -> Bytes:
    """Zeroed uint8 array of `size_bytes` whose address is a multiple of the memory page size."""
    return np.frombuffer(mmap.mmap(-1, size_bytes), dtype=np.uint8)


def address_of(buffer: Bytes) -> int:
    """Where the first byte of an array is in memory."""
    address: int = buffer.__array_interface__["data"][0]
    return address


class Request(NamedTuple):
    """One piece of a batch: the 1-D contiguous `buffer` is filled from, or written to, `offset` of `file`."""

    file: int
    offset: int
    buffer: Bytes


Outcome = tuple[int, int | OSError]
"""Index of the request, bytes or what the system said."""
Outcomes = Generator[Outcome, None, None]
"""As requests end."""
SomeOutcomes = Generator[list[Outcome], None, None]
"""All that ended meanwhile, one at least."""


class Then(Protocol):
    """What is to be done with requests of a batch once they were read. Several threads may call it at once, each about another request."""

    def take(self, index: int, read: int, memory: Bytes, /) -> None:
        """So many bytes of request `index` were read into `memory`, its own, or less than 0: the system said no."""

    def function(self) -> tuple[int, int]:
        """Address of compiled code that does the same, `void (*)(void *context, Py_ssize_t index, int64_t read, const void *memory)`, on
        any thread and without the interpreter's lock, and its context, which lives as long as this."""


class FileEngine(ABC):
    """Positioned I/O on regular files. Single calls raise OSError when the system does; batches say it per request.

    Offsets, lengths and buffer addresses are multiples of `alignment_bytes`; buffers are 1-D, contiguous and of bytes, and writable where
    they are filled. An AlignmentError names the first that is not, before any I/O of the call. A file is named by the whole number `open`
    returned. At most `depth` requests of a batch are under way at once, one of them on the caller's thread; batches of several callers
    share the other `depth - 1`.
    """

    name: str
    depth: int
    alignment_bytes: int
    cpus: tuple[int, ...] = ()
    """CPUs that the engine's own threads are kept on; any, if there are none."""
    reads_ahead: bool = False
    """Whether `read_then` goes on by itself once it has begun, and begins without waiting."""

    def keep_on(self, cpus: Sequence[int]) -> None:
        """Keep threads that the engine starts from now on on these CPUs, near the memory that they read and write. Where the system
        refuses, they run anywhere. Engines without threads of their own ignore it."""
        self.cpus = tuple(cpus)

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
    def read_each(self, requests: Sequence[Request]) -> Outcomes:
        """Fill the buffers, and yield (index of the request, bytes read or what the system said) in the order they become ready.

        Bytes are fewer than asked only at the end of the file. Reading begins with the first `next`. Closing the generator early begins
        no further request and waits for those under way, so that afterwards nobody writes into the buffers.
        """

    def read_some(self, requests: Sequence[Request]) -> SomeOutcomes:
        """As `read_each`, but each time all that ended since the last, so that the caller can work on them together."""
        with closing(self.read_each(requests)) as outcomes:
            for outcome in outcomes:
                yield [outcome]

    def read_then(self, requests: Sequence[Request], then: Then, at_once: int) -> SomeOutcomes:
        """As `read_some`, of requests that `then` is told of first: by the caller's thread, or by at most `at_once` of the engine's own, of
        all batches together, while the others read. With `reads_ahead` the first `next` only begins, and gives an empty list."""
        del at_once  # of the caller there is one
        with closing(self.read_some(requests)) as groups:
            for group in groups:
                for index, outcome in group:
                    then.take(index, -1 if isinstance(outcome, OSError) else outcome, requests[index].buffer)
                yield group

    @abstractmethod
    def write_all(self, requests: Sequence[Request]) -> list[OSError | None]:
        """Write all buffers, in any order, and wait; per request None or what the system said, in which case any part may be written.

        Requests of one batch must not overlap.
        """

    @abstractmethod
    def allocate(self, file: int, offset: int, length: int) -> bool:
        """Ask for disk blocks ahead of writing; they read as zeros. False if the system has none or cannot say.

        Without it, writes that extend a file or fill a hole wait for each other on most file systems.
        """

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

    @abstractmethod
    def stop(self) -> None:
        """End the engine's threads once they are idle. Called last, by the owner; safe to call twice.

        Batches asked for afterwards raise Closed, with nothing begun; one that `read_each` gave before may do so at its first `next`.
        """
