"""Anonymous memory by whole pages: reserved without being touched, then perhaps locked and filled, by several threads at once.

A region belongs to whoever reserved it; its memory goes with `release`, or once the last array over it is gone. The calls are Linux's:
mmap(2), madvise(2), mlock2(2).

No region exists in forked children (MADV_DONTFORK). A child would count as having all of it again, and make this process copy every page
that it writes next; worse, disks and GPUs that are writing into the region would go on writing into pages that are by then the child's
(open(2), on O_DIRECT). A cache does not work in a forked child anyway, its threads are not there.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

PAGE_BYTES = mmap.PAGESIZE
HUGE_PAGE_BYTES = 2 << 20
PageKind = Literal["explicit", "transparent", "none"]
"""Which huge pages: those set apart in the pool of the system, those the kernel finds when memory is touched, or none at all."""

_MAP_HUGETLB_2MB = 0x40000 | 21 << 26  # 21: the size's logarithm; other sizes have pools of their own
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_MLOCK_ONFAULT = 1
_CHUNK_BYTES = 32 << 20  # some milliseconds of one thread

_libc = ctypes.CDLL(None, use_errno=True)  # releases the GIL during calls, which mmap.madvise does not
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mlock2.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint)

_mapped: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
_kept_by_child: list[mmap.mmap] = []
# Where a region was, a child may have mapped something else by the time it collects the object, which would then unmap that.
os.register_at_fork(after_in_child=lambda: _kept_by_child.extend(_mapped))


@dataclass(frozen=True)
class Region:
    """`length_bytes` of memory from `address`, whole pages, inside a mapping that may be larger. Zeros until written to."""

    mapping: mmap.mmap
    offset: int
    address: int
    length_bytes: int

    def array(self, size_bytes: int) -> NDArray[np.uint8]:
        """The first `size_bytes` as uint8 `[size_bytes]`; the memory lives at least as long as this array and views of it."""
        return np.frombuffer(self.mapping, dtype=np.uint8, count=size_bytes, offset=self.offset)

    def lock(self) -> None:
        """Keep pages in memory, from when they are first touched on. Touches none. OSError if that is not allowed."""
        if _libc.mlock2(self.address, self.length_bytes, _MLOCK_ONFAULT) != 0:
            raise _last_error()

    def fill(self, threads: int) -> None:
        """Take all pages from the system, as `threads` threads. OSError, and only some taken, if it has none left for this region."""
        starts = range(0, self.length_bytes, _CHUNK_BYTES)
        if threads == 1 or len(starts) == 1:
            for start in starts:
                self._fill_chunk(start)
            return
        with ThreadPoolExecutor(min(threads, len(starts)), thread_name_prefix="kvtier-fill") as pool:
            for _ in pool.map(self._fill_chunk, starts):
                pass

    def huge_page_bytes(self) -> int:
        """How much of this the kernel backs with transparent huge pages now. Reads /proc/self/smaps, some milliseconds."""
        total, inside, end = 0, False, self.address + self.length_bytes
        with Path("/proc/self/smaps").open() as lines:
            for line in lines:
                name, _, rest = line.partition(" ")
                if not name.endswith(":"):
                    first, last = (int(number, 16) for number in name.split("-"))
                    if first >= end:
                        break
                    inside = self.address < last
                elif inside and name == "AnonHugePages:":
                    total += int(rest.split()[0]) * 1024
        return min(total, self.length_bytes)

    def release(self) -> None:
        """Give the memory back now. BufferError while an array over it exists."""
        self.mapping.close()

    def _fill_chunk(self, start: int) -> None:
        length = min(_CHUNK_BYTES, self.length_bytes - start)
        if _libc.madvise(self.address + start, length, _MADV_POPULATE_WRITE) == 0:
            return
        error = _last_error()
        if error.errno != errno.EINVAL:
            raise error
        np.frombuffer(self.mapping, np.uint8, length, self.offset + start)[::PAGE_BYTES] = 0  # older kernels: touch each page


def reserve(size_bytes: int, pages: PageKind) -> Region:
    """A region of at least `size_bytes`, rounded up to whole pages of its kind and aligned to them.

    "explicit" takes the pages from the pool here, OSError if it has too few. "transparent" only asks: `Region.huge_page_bytes` says what
    became of it. OSError also when the system refuses that much address space.
    """
    if size_bytes < 1:
        raise ValueError(f"{size_bytes} bytes of memory are asked for; give at least 1")
    step = PAGE_BYTES if pages == "none" else HUGE_PAGE_BYTES
    length = -(-size_bytes // step) * step
    explicit = pages == "explicit"
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (_MAP_HUGETLB_2MB if explicit else 0)
    # The kernel aligns other mappings to 4 KiB only.
    mapping = mmap.mmap(-1, length if explicit else length + step - PAGE_BYTES, flags=flags)
    _mapped.add(mapping)
    base = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    offset = -base % step
    try:
        mapping.madvise(mmap.MADV_DONTFORK)
        if not explicit:
            _advise_huge_pages(mapping, offset, length, pages == "transparent")
    except OSError:
        mapping.close()
        raise
    return Region(mapping, offset, base + offset, length)


def aligned_array(size_bytes: int) -> NDArray[np.uint8]:
    """Zeroed uint8 `[size_bytes]` for staging: page aligned, so that every I/O engine takes it; in huge pages from 2 MiB on, if there are.

    Its pages come when they are first touched. Not there in forked children. OSError if the system refuses.
    """
    return reserve(size_bytes, "none" if size_bytes < HUGE_PAGE_BYTES else "transparent").array(size_bytes)


def _advise_huge_pages(mapping: mmap.mmap, offset: int, length: int, wanted: bool) -> None:
    try:
        mapping.madvise(mmap.MADV_HUGEPAGE if wanted else mmap.MADV_NOHUGEPAGE, offset, length)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a kernel built without them knows neither advice
            raise


def _last_error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))
