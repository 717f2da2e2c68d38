"""Laws checked: a region is what was asked for, filled when filled, gone when released, and no forked child has or harms it."""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import gc
import mmap
import os
import signal
from collections.abc import Callable

import numpy as np
import pytest

from kvtier.memory import region as module
from kvtier.memory.region import HUGE_PAGE_BYTES, PAGE_BYTES, PageKind, Region, aligned_array, reserve
from tests.memory.kernel import is_mapped, resident

LENGTH = 4 * HUGE_PAGE_BYTES


def in_a_child(work: Callable[[], object]) -> int:
    """The wait status of a forked child that does `work`."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        work()
        os._exit(0)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize(("pages", "step"), [("none", PAGE_BYTES), ("transparent", HUGE_PAGE_BYTES)])
@pytest.mark.parametrize("size", [1, PAGE_BYTES, PAGE_BYTES + 1, LENGTH + 77])
def test_regions_are_whole_pages_aligned_to_them_and_arrays_over_them_exact(pages: PageKind, step: int, size: int):
    region = reserve(size, pages)
    assert region.address % step == 0
    assert region.length_bytes == -(-size // step) * step
    array = region.array(size)
    assert (array.nbytes, array.ctypes.data) == (size, region.address)
    array[:] = 7
    assert array.flags.writeable
    del array
    region.release()


def test_reserving_touches_nothing_and_filling_touches_everything():
    region = reserve(LENGTH + 5, "none")
    assert not resident(region).any()
    region.fill(threads=1)
    assert resident(region).all()
    assert not region.array(LENGTH + 5).any()
    region.release()


@pytest.mark.parametrize("threads", [1, 3])
def test_filling_in_chunks_by_several_threads_leaves_no_gap(monkeypatch, threads):
    monkeypatch.setattr(module, "_CHUNK_BYTES", HUGE_PAGE_BYTES)
    region = reserve(LENGTH + PAGE_BYTES, "none")
    region.fill(threads)
    assert resident(region).all()
    region.release()


def test_on_older_kernels_each_page_is_touched_instead(monkeypatch):
    monkeypatch.setattr(module, "_MADV_POPULATE_WRITE", 12345)
    region = reserve(LENGTH, "none")
    region.fill(threads=2)
    assert resident(region).all()
    region.release()


def test_filling_that_the_system_refuses_is_an_error(monkeypatch):
    region = reserve(LENGTH, "none")
    monkeypatch.setattr(module, "_CHUNK_BYTES", HUGE_PAGE_BYTES)
    region.release()  # nothing is there any more
    with pytest.raises(OSError, match="memory") as caught:
        Region(region.mapping, region.offset, region.address, region.length_bytes).fill(threads=2)
    assert caught.value.errno == errno.ENOMEM


def test_a_released_region_is_mapped_no_more_and_arrays_keep_theirs():
    region = reserve(LENGTH, "transparent")
    assert is_mapped(region.address)
    array = region.array(LENGTH)
    with pytest.raises(BufferError):
        region.release()
    view = array[PAGE_BYTES:]
    address = region.address
    del region, array
    gc.collect()
    assert is_mapped(address)
    view[:] = 1
    del view
    assert not is_mapped(address)


def test_a_reservation_that_fails_half_way_stays_nowhere(monkeypatch):
    seen = []

    def refuse(mapping: mmap.mmap, *_: object) -> None:
        seen.append(ctypes.addressof(ctypes.c_char.from_buffer(mapping)))
        raise OSError(errno.ENOMEM, "no more mappings")

    monkeypatch.setattr(module, "_advise_huge_pages", refuse)
    with pytest.raises(OSError, match="no more mappings") as kept:  # an exception keeps what its frames hold
        reserve(LENGTH, "transparent")
    assert not is_mapped(seen[0])
    del kept


def test_nothing_at_all_is_refused():
    with pytest.raises(ValueError, match="0 bytes"):
        reserve(0, "none")


def test_forked_children_do_not_have_the_memory():
    array = aligned_array(LENGTH)
    array[:] = 1
    assert in_a_child(lambda: None) == 0
    assert in_a_child(lambda: ctypes.string_at(array.ctypes.data, 1)) == signal.SIGSEGV


def test_a_forked_child_that_drops_a_region_does_not_unmap_what_is_there_now():
    regions = [reserve(LENGTH, "none")]

    def drop_and_look() -> None:
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
        fixed = 0x10
        address = regions[0].address
        there = libc.mmap(address, LENGTH, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | fixed, -1, 0)
        regions.clear()
        gc.collect()
        os._exit(there != address or not is_mapped(address))

    assert in_a_child(drop_and_look) == 0


@pytest.mark.parametrize("size", [1, 5000, 3 << 20])
def test_aligned_arrays_are_exact_zero_and_page_aligned(size):
    array = aligned_array(size)
    assert array.shape == (size,)
    assert array.dtype == np.uint8
    assert array.ctypes.data % PAGE_BYTES == 0
    assert not array.any()
    array[-1] = 1
