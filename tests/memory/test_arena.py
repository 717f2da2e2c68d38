"""Laws checked: exact size, aligned, whole from the start; "auto" degrades and says so, "on" is met or refused; nothing stays behind."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvtier.errors import ConfigError, KVTierError
from kvtier.memory import arena as module
from kvtier.memory import region as region_module
from kvtier.memory.arena import Arena
from kvtier.memory.limits import Room
from kvtier.memory.region import HUGE_PAGE_BYTES, PageKind, Region
from tests.memory.kernel import is_mapped, locked_bytes, pool_of, resident

SIZE = 3 * HUGE_PAGE_BYTES + 12345
NO_SIGN = "/sys/kernel/mm/transparent_hugepage/enabled"


def region_of(arena: Arena) -> Region:
    assert arena._region is not None
    return arena._region


@pytest.fixture
def made(monkeypatch) -> list[Region]:
    """Every region that arenas reserve, as they do."""
    regions: list[Region] = []

    def reserve(size_bytes: int, pages: PageKind) -> Region:
        regions.append(region_module.reserve(size_bytes, pages))
        return regions[-1]

    monkeypatch.setattr(module, "reserve", reserve)
    return regions


@pytest.fixture
def huge_pool() -> Iterator[None]:
    with pool_of(8) as there:
        if not there:
            pytest.skip("the pool of huge pages cannot be raised here")
        yield


@pytest.mark.parametrize("size", [1, 64, 4097, HUGE_PAGE_BYTES, SIZE])
@pytest.mark.parametrize("huge_pages", ["auto", "off"])
def test_the_size_is_exact_the_start_aligned_and_every_byte_there(size, huge_pages):
    arena = Arena(size, huge_pages)
    assert arena.bytes.shape == (size,)
    assert arena.report()["arena_bytes"] == size
    assert arena.bytes.ctypes.data % (HUGE_PAGE_BYTES if huge_pages == "auto" and size >= HUGE_PAGE_BYTES else 4096) == 0
    assert resident(region_of(arena)).all()
    assert not arena.bytes.any()
    arena.bytes[:] = 255
    arena.close()


def test_what_is_mapped_beyond_the_size_is_less_than_one_page():
    for size, huge_pages, page in ((SIZE, "auto", HUGE_PAGE_BYTES), (SIZE, "off", 4096), (100, "auto", 4096)):
        arena = Arena(size, huge_pages)  # type: ignore[arg-type]
        mapped = arena.report()["mapped_bytes"]
        assert isinstance(mapped, int)
        assert 0 <= mapped - size < page
        arena.close()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_fills_it_whole(monkeypatch, threads):
    monkeypatch.setattr(region_module, "_CHUNK_BYTES", HUGE_PAGE_BYTES)
    arena = Arena(SIZE, "off", threads=threads)
    assert resident(region_of(arena)).all()
    assert arena.report()["fill_threads"] == threads
    arena.close()


@pytest.mark.skipif("[never]" in Path(NO_SIGN).read_text(), reason="this kernel gives no transparent huge pages")
@pytest.mark.usefixtures("no_pool")
def test_auto_takes_transparent_huge_pages_and_logs_once_that_they_are_not_explicit(caplog):
    with caplog.at_level(logging.INFO, "kvtier.memory"):
        arena = Arena(SIZE, mlock="off")
    report = arena.report()
    assert report["huge_pages"] in ("transparent", "none")
    assert (report["huge_pages"] == "transparent") == (report["huge_page_bytes"] != 0)
    assert sum("transparent huge pages" in record.message and "in the pool" in record.message for record in caplog.records) == 1
    arena.close()


def test_off_takes_no_huge_pages():
    arena = Arena(SIZE, "off")
    assert (arena.report()["huge_pages"], arena.report()["huge_page_bytes"]) == ("none", 0)
    arena.close()


@pytest.fixture
def no_pool(monkeypatch) -> None:
    """A system whose pool of explicit huge pages is empty."""

    def refuse(size_bytes: int, pages: PageKind) -> Region:
        if pages == "explicit":
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return region_module.reserve(size_bytes, pages)

    monkeypatch.setattr(module, "reserve", refuse)


@pytest.mark.usefixtures("no_pool")
def test_huge_pages_on_without_a_pool_is_an_error_that_says_how_many_are_needed():
    with pytest.raises(
        ConfigError, match=r"host\.huge_pages is on, but .* 4 pages .*`sysctl vm\.nr_hugepages=4`.*host\.huge_pages to auto"
    ):
        Arena(SIZE, "on")


@pytest.mark.usefixtures("huge_pool")
@pytest.mark.parametrize("huge_pages", ["auto", "on"])
def test_explicit_huge_pages_are_taken_where_the_pool_has_enough(huge_pages):
    arena = Arena(SIZE, huge_pages, mlock="on")
    report = arena.report()
    assert (report["huge_pages"], report["huge_page_bytes"], report["mlock"]) == ("explicit", 4 * HUGE_PAGE_BYTES, True)
    assert arena.bytes.ctypes.data % HUGE_PAGE_BYTES == 0
    assert arena.bytes.nbytes == SIZE
    with pytest.raises(ConfigError, match="huge_pages is on"):
        Arena(5 * HUGE_PAGE_BYTES, "on")  # 4 of 8 are left
    address = region_of(arena).address
    arena.close()
    assert not is_mapped(address)
    Arena(8 * HUGE_PAGE_BYTES, "on").close()


@pytest.mark.usefixtures("huge_pool")
def test_explicit_huge_pages_that_cannot_be_filled_are_given_back_and_others_taken(monkeypatch, made):
    fill = Region.fill

    def refuse_first(self: Region, threads: int) -> None:
        if len(made) == 1:
            raise OSError(errno.EFAULT, "over the limit of the control group")
        fill(self, threads)

    monkeypatch.setattr(Region, "fill", refuse_first)
    arena = Arena(SIZE)
    assert arena.report()["huge_pages"] != "explicit"
    assert made[0].mapping.closed
    arena.close()
    made.clear()
    with pytest.raises(ConfigError, match="over the limit of the control group"):
        Arena(SIZE, "on")
    assert not is_mapped(made[0].address)


def test_more_than_can_be_had_is_refused_before_anything_is_reserved(monkeypatch, made):
    monkeypatch.setattr(module, "available_memory", lambda: Room(SIZE - 1, "the group allows no more"))
    with pytest.raises(ConfigError, match=rf"disk2\.capacity_bytes is {SIZE}, but only {SIZE - 1} bytes .* the group allows no more"):
        Arena(SIZE, "off", section="disk2")
    assert made == []


def test_more_than_the_machine_has_is_refused():
    with pytest.raises(ConfigError, match=r"host\.capacity_bytes is \d+, but only \d+ bytes"):
        Arena(1 << 50)


@pytest.mark.parametrize("size", [0, -1])
def test_nothing_at_all_is_refused(size):
    with pytest.raises(ConfigError, match="at least 1"):
        Arena(size)


def test_locked_memory_is_locked_and_unlocked_with_close():
    before = locked_bytes()
    arena = Arena(SIZE, "off")
    assert (locked_bytes() - before >= SIZE) == arena.locked == arena.report()["mlock"]
    arena.close()
    assert locked_bytes() == before
    assert arena.locked is False


@pytest.fixture
def no_mlock(monkeypatch) -> None:
    def refuse(self: Region) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(Region, "lock", refuse)


@pytest.mark.usefixtures("no_mlock")
def test_mlock_auto_degrades_with_one_log_line(caplog):
    with caplog.at_level(logging.INFO, "kvtier.memory"):
        arena = Arena(SIZE, "off")
    assert arena.report()["mlock"] is False
    assert sum("not locked" in record.message and "RLIMIT_MEMLOCK" in record.message for record in caplog.records) == 1
    assert resident(region_of(arena)).all()
    arena.close()


@pytest.mark.usefixtures("no_mlock", "huge_pool")
def test_explicit_huge_pages_are_never_swapped_and_need_no_leave_to_be_locked():
    arena = Arena(SIZE, "on", mlock="on")
    assert arena.locked
    arena.close()


@pytest.mark.usefixtures("no_mlock")
def test_mlock_on_that_cannot_be_met_is_an_error_and_leaves_nothing_mapped(made):
    with pytest.raises(ConfigError, match=r"host\.mlock is on.*RLIMIT_MEMLOCK"):
        Arena(SIZE, "off", mlock="on")
    assert not is_mapped(made[0].address)


def test_place_is_called_between_reserving_and_touching(made):
    calls = []

    def place(address: int, length: int) -> None:
        calls.append((address, length, bool(resident(made[-1]).any())))

    arena = Arena(SIZE, "off", place=place)
    assert calls == [(region_of(arena).address, region_of(arena).length_bytes, False)]
    arena.close()


def test_place_that_refuses_stops_and_leaves_nothing_mapped(made):
    def place(address: int, length: int) -> None:
        raise KVTierError("no such node")

    with pytest.raises(KVTierError, match="no such node"):
        Arena(SIZE, place=place)
    assert not is_mapped(made[-1].address)


def test_close_gives_the_memory_back_and_may_be_called_twice():
    arena = Arena(SIZE)
    address = region_of(arena).address
    assert is_mapped(address)
    arena.close()
    assert not is_mapped(address)
    arena.close()
    assert arena.report()["arena_bytes"] == arena.report()["huge_page_bytes"] == arena.report()["mapped_bytes"] == 0


def test_views_outlive_close():
    arena = Arena(SIZE)
    arena.bytes[:] = np.arange(SIZE) % 251
    view, address = arena.bytes[4096:], region_of(arena).address
    arena.close()
    np.testing.assert_array_equal(view, np.arange(4096, SIZE) % 251)
    del view
    assert not is_mapped(address)
