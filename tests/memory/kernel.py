"""What the kernel says about memory, and the pool of explicit huge pages, for the memory tests."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvtier.memory.region import PAGE_BYTES, Region

POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


def is_mapped(address: int) -> bool:
    """Whether /proc/self/maps has this address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(number, 16) for number in line.split()[0].split("-"))
        if first <= address < last:
            return True
    return False


def resident(region: Region) -> NDArray[np.bool_]:
    """Per 4 KiB page, whether it is in memory (mincore)."""
    pages = np.zeros(region.length_bytes // PAGE_BYTES, dtype=np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(region.address), ctypes.c_size_t(region.length_bytes), ctypes.c_void_p(pages.ctypes.data)) == 0
    return (pages & 1).astype(np.bool_)


def locked_bytes() -> int:
    """Locked memory of this process (VmLck)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmLck:"))


@contextmanager
def pool_of(pages: int) -> Iterator[bool]:
    """At least `pages` free huge pages in the pool inside; whether that worked. As it was afterwards."""
    knob = POOL / "nr_hugepages"
    try:
        before = int(knob.read_text())
        free = int((POOL / "free_hugepages").read_text())
        knob.write_text(str(before + max(0, pages - free)))
    except OSError:
        yield False
        return
    try:
        yield int((POOL / "free_hugepages").read_text()) >= pages
    finally:
        knob.write_text(str(before))
