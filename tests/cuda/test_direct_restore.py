"""Pages read from disk straight into a stand-in GPU: the same pages as through host memory, and never a wrong one; what cannot be proven
there takes the ordinary way, which says why.

The stand-in reads as late as it may and digests nothing before it must, so a missing wait shows as a wrong page.
"""

from __future__ import annotations

import errno
import os
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtier.cache import TieredKVCache
from kvtier.errors import DeviceError
from kvtier.formats import checksums
from kvtier.formats.triton import triton_version
from kvtier.testing.direct import LateFile, LateReader, LateReading
from kvtier.tiers.disk.direct import DirectRecords
from kvtier.tiers.disk.record import HEADER_BYTES
from tests.cache.rig import LAYOUT, PAGE, flip_on_disk, hold, kv_of, put, run
from tests.cuda.rig import Engine, direct_cache, gpu_of

PAGES = 6


def on_disk(cache: TieredKVCache, number: int = 1, pages: int = PAGES) -> list[int]:
    """Tokens of a sequence that is on disk only. What is on the device is on disk too: nothing has to be written to make room."""
    for tokens in (run(number, pages), run(900, cache._residency.device.capacity_slots)):
        put(cache, tokens)
        cache.flush()
    return run(number, pages)


def row_of(cache: TieredKVCache, tokens: list[int], page: int) -> int:
    return cache._residency.table.row(cache.lookup(tokens).keys[page])


def counts(cache: TieredKVCache) -> dict[str, int]:
    report: Any = cache._residency.tiers[-1].report()
    return {name: count for name, count in report["counters"].items() if "direct" in name or "refused" in name}


def read(cache: TieredKVCache, tokens: list[int]) -> int:
    """Bring a sequence back and check every page that came; how many tokens that were."""
    with hold(cache, tokens) as lease:
        engine = Engine(cache)
        engine.assert_found(engine.read(lease), tokens[: lease.tokens])
        return lease.tokens


def all_is_given_back(cache: TieredKVCache) -> None:
    cache.settle(20)
    cache.check_integrity()
    gpu = gpu_of(cache)
    assert gpu.files.under_way == 0
    cache.close()
    assert gpu.files.open_files == 0
    assert gpu.registered == {}


@pytest.mark.parametrize("total_bytes", [1 << 22, 1 << 26])
@pytest.mark.parametrize("name", ["raw", "q8", "q8/q4"])
def test_pages_come_back_equal_and_no_byte_of_them_through_host_memory(monkeypatch, tmp_path, name, total_bytes):
    cache = direct_cache(monkeypatch, tmp_path, {"total_bytes": total_bytes}, disk__format=name)
    tokens = on_disk(cache)
    disk: Any = cache._residency.tiers[-1]
    monkeypatch.setattr(disk._segments.engine, "read_some", lambda requests: pytest.fail("read into host memory"))
    with hold(cache, tokens) as lease:
        engine = Engine(cache)
        found = engine.finish(engine.read(lease))
        assert lease.tokens == PAGES * PAGE
    wanted = kv_of(tokens)
    assert torch.equal(found, wanted) or name != "raw"
    assert float((found - wanted).norm() / wanted.norm()) < 0.2
    assert counts(cache) == {"read directly": PAGES}
    assert gpu_of(cache).files.depth == disk.report()["io_depth"]
    all_is_given_back(cache)


def test_they_are_the_pages_that_the_ordinary_way_gives(monkeypatch, tmp_path):
    found = []
    for engine in ("gds", "direct"):
        with direct_cache(monkeypatch, tmp_path / engine, disk__format="q8", disk__io_engine=engine) as cache:
            tokens = on_disk(cache)
            with hold(cache, tokens) as lease:
                reader = Engine(cache)
                found.append(reader.finish(reader.read(lease)))
    assert torch.equal(*found)


@pytest.mark.skipif(triton_version() is None or torch.cuda.is_available(), reason="needs Triton's interpreter")
def test_a_whole_cache_reads_pages_that_the_kernels_digested(monkeypatch, tmp_path):
    digested = []

    def by_kernels(ranges, out):
        digested.append(len(ranges))
        checksums.launch(ranges, out)

    monkeypatch.setattr("kvtier.mover.direct.xxh3_128", by_kernels)
    cache = direct_cache(monkeypatch, tmp_path, {"total_bytes": 1 << 26})
    tokens = on_disk(cache)
    assert read(cache, tokens) == PAGES * PAGE
    assert sum(digested) == PAGES
    assert counts(cache) == {"read directly": PAGES}
    all_is_given_back(cache)


@pytest.mark.parametrize("byte", [40, HEADER_BYTES + 5, HEADER_BYTES + LAYOUT.page_bytes - 1])
@pytest.mark.parametrize("total_bytes", [1 << 22, 1 << 26])
def test_a_flipped_bit_loses_its_page_and_no_other(monkeypatch, tmp_path, byte, total_bytes):
    cache = direct_cache(monkeypatch, tmp_path, {"total_bytes": total_bytes})
    tokens = on_disk(cache)
    flip_on_disk(cache, row_of(cache, tokens, 3), byte)
    assert read(cache, tokens) == 3 * PAGE
    assert counts(cache) == {"read directly": PAGES - 1, "not proven directly": 1, "refused: checksum": 1}
    assert cache.stats()["tiers"]["disk"]["refused"] == {"checksum": 1}
    assert read(cache, tokens) == 3 * PAGE, "the others are on the device, the lost one is gone"
    all_is_given_back(cache)


def test_a_record_of_another_page_is_refused_though_its_checksums_are_right(monkeypatch, tmp_path):
    cache = direct_cache(monkeypatch, tmp_path)
    tokens = on_disk(cache)
    disk: Any = cache._residency.tiers[-1]
    slots = [int(cache._residency.table.slot[-1, row_of(cache, tokens, page)]) for page in (2, 4)]
    path = disk._directory.segment_path(0)
    with path.open("r+b") as file:
        file.seek(slots[0] * disk.slot_bytes)
        record = file.read(disk.slot_bytes)
        file.seek(slots[1] * disk.slot_bytes)
        file.write(record)
    assert read(cache, tokens) == 4 * PAGE
    assert counts(cache) == {"read directly": PAGES - 1, "not proven directly": 1, "refused: key": 1}
    all_is_given_back(cache)


@pytest.mark.parametrize("total_bytes", [1 << 22, 1 << 26])
def test_where_the_file_ends_early_only_what_is_missing_is_lost(monkeypatch, tmp_path, total_bytes):
    cache = direct_cache(monkeypatch, tmp_path, {"total_bytes": total_bytes})
    tokens = on_disk(cache)
    disk: Any = cache._residency.tiers[-1]
    slots = [int(cache._residency.table.slot[-1, row_of(cache, tokens, page)]) for page in range(PAGES)]
    last = slots.index(max(slots))
    os.truncate(disk._directory.segment_path(0), max(slots) * disk.slot_bytes + 512)
    assert read(cache, tokens) == last * PAGE
    assert counts(cache)["refused: truncated"] == 1
    assert cache.stats()["tiers"]["disk"]["refused"] == {"truncated": 1}
    all_is_given_back(cache)


@pytest.mark.parametrize("total_bytes", [1 << 22, 1 << 26])
def test_a_direct_read_that_fails_is_made_again_through_host_memory(monkeypatch, tmp_path, total_bytes, caplog):
    cache = direct_cache(monkeypatch, tmp_path, {"total_bytes": total_bytes})
    tokens = on_disk(cache)
    ray = OSError(errno.EIO, "a cosmic ray")
    gpu_of(cache).files.failures = [ray] if gpu_of(cache).total_bytes > 1 << 22 else [None, ray]
    assert read(cache, tokens) == PAGES * PAGE
    assert "a cosmic ray" in caplog.text
    left = counts(cache)["not proven directly"]
    assert left >= 1
    assert counts(cache)["read directly"] == PAGES - left
    all_is_given_back(cache)


def test_where_host_memory_cannot_be_read_into_either_the_page_is_lost_and_no_slot_leaks(monkeypatch, tmp_path):
    cache = direct_cache(monkeypatch, tmp_path)
    tokens = on_disk(cache)
    disk: Any = cache._residency.tiers[-1]
    gpu_of(cache).files.failures = [None, None, OSError(errno.EIO, "a cosmic ray")]

    def broken(requests):
        for index, _ in enumerate(requests):
            yield [(index, OSError(errno.EIO, "Input/output error"))]

    monkeypatch.setattr(disk._segments.engine, "read_some", broken)
    assert read(cache, tokens) == 2 * PAGE
    assert counts(cache) == {"read directly": PAGES - 1, "not proven directly": 1, "refused: io: Input/output error": 1}
    all_is_given_back(cache)


def test_a_file_that_cannot_be_opened_directly_is_read_through_host_memory(monkeypatch, tmp_path):
    cache = direct_cache(monkeypatch, tmp_path)
    tokens = on_disk(cache)

    def refuse(path):
        raise OSError(errno.EINVAL, "no")

    monkeypatch.setattr(gpu_of(cache).files, "open", refuse)
    assert read(cache, tokens) == PAGES * PAGE
    assert counts(cache)["not proven directly"] == PAGES
    all_is_given_back(cache)


@pytest.mark.parametrize("when", ["fail_at_launch", "fail_in_stream"])
def test_a_gpu_that_fails_meanwhile_fails_the_transfer_and_leaves_no_read_on_its_way(monkeypatch, tmp_path, when):
    cache = direct_cache(monkeypatch, tmp_path)
    tokens = on_disk(cache)
    gpu = gpu_of(cache)
    setattr(gpu, when, DeviceError("a cosmic ray"))
    with hold(cache, tokens) as lease:
        assert lease.tokens == 0
    assert gpu.files.under_way == 0
    assert cache.stats()["tiers"]["device"]["refused"] == {"gpu": PAGES}
    assert read(cache, tokens) == PAGES * PAGE, "the copies on disk are as good as before"
    all_is_given_back(cache)


def test_nothing_is_read_into_room_that_is_still_decoded_from(monkeypatch, tmp_path):
    """The stand-in overwrites memory as soon as a read into it begins, and decodes only when somebody waits."""
    cache = direct_cache(monkeypatch, tmp_path, device_pages=12)
    tokens = on_disk(cache, pages=9)
    assert cache._residency.mover.staging._direct[0].rows == 1
    assert read(cache, tokens) == 9 * PAGE
    assert gpu_of(cache).files.begun >= 9
    all_is_given_back(cache)


def test_pages_that_an_engine_has_yet_to_read_are_not_overwritten(monkeypatch, tmp_path):
    """The engine lets go of pages that it will read later on its stream; their slots are filled from disk before it does."""
    cache = direct_cache(monkeypatch, tmp_path)
    tokens, later = on_disk(cache), run(900, cache._residency.device.capacity_slots)
    gpu = gpu_of(cache)
    gpu.engine = gpu.new_stream()
    engine = Engine(cache, gpu.engine)
    with hold(cache, later) as lease:
        assert lease.tokens == len(later)
        number = engine.read(lease)
    assert gpu.engine.pending, "the engine has not read yet"
    gpu.engine = gpu.new_stream()
    with hold(cache, tokens) as lease:
        assert lease.tokens == PAGES * PAGE
    engine.assert_found(number, later)
    all_is_given_back(cache)


def test_the_next_records_are_being_read_while_the_last_are_judged(monkeypatch, tmp_path):
    cache = direct_cache(monkeypatch, tmp_path)
    tokens = on_disk(cache)
    under_way: list[int] = []
    digest = checksums.xxh3_128

    def noting(ranges, out):
        under_way.append(gpu_of(cache).files.under_way)
        digest(ranges, out)

    monkeypatch.setattr("kvtier.mover.direct.xxh3_128", noting)
    assert read(cache, tokens) == PAGES * PAGE
    assert under_way == [1] * (PAGES - 1) + [0]
    all_is_given_back(cache)


def test_layers_are_announced_when_all_pages_are_judged(monkeypatch, tmp_path):
    cache = direct_cache(monkeypatch, tmp_path)
    tokens = on_disk(cache)
    go_on, finish = threading.Event(), LateReading.finish
    left = [PAGES]

    def held_before_the_last(reading):
        left[0] -= 1
        assert left[0] or go_on.wait(20)
        return finish(reading)

    monkeypatch.setattr(LateReading, "finish", held_before_the_last)
    with cache.acquire(cache.lookup(tokens)) as lease:
        with pytest.raises(TimeoutError):
            lease.layer(0, timeout=0.1)
        go_on.set()
        engine = Engine(cache)
        engine.assert_found(engine.read(lease), tokens)
    all_is_given_back(cache)


def test_what_was_written_before_a_restart_is_read_directly_after_it(monkeypatch, tmp_path):
    cache = direct_cache(monkeypatch, tmp_path)
    tokens = on_disk(cache)
    cache.close()
    again = direct_cache(monkeypatch, tmp_path)
    assert read(again, tokens) == PAGES * PAGE
    assert counts(again)["read directly"] == PAGES
    all_is_given_back(again)


# -- whatever happens -------------------------------------------------------------------------------------------------------------

DAMAGE = st.sampled_from(["none", "none", "payload", "header", "zeros", "other", "read fails"])


@pytest.mark.slow
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    damage=st.lists(DAMAGE, min_size=PAGES, max_size=PAGES),
    rows=st.sampled_from([1, 2, 3, PAGES]),
    byte=st.integers(0, LAYOUT.page_bytes - 1),
)
def test_whatever_happens_to_records_no_page_is_wrong_and_only_damaged_ones_are_lost(monkeypatch, tmp_path_factory, damage, rows, byte):
    slot_bytes = 4096
    gpu = {"total_bytes": max(1 << 22, 1024 * 2 * rows * slot_bytes)}
    cache = direct_cache(monkeypatch, tmp_path_factory.mktemp("store"), gpu)
    tokens = on_disk(cache)
    disk: Any = cache._residency.tiers[-1]
    assert (disk.slot_bytes, cache._residency.mover.staging._direct[0].rows) == (slot_bytes, rows)
    slots = [int(cache._residency.table.slot[-1, row_of(cache, tokens, page)]) for page in range(PAGES)]
    with disk._directory.segment_path(0).open("r+b") as file:
        whole = [file.read(slot_bytes) for slot in slots if file.seek(slot * slot_bytes) >= 0]
        for page, what in enumerate(damage):
            place = HEADER_BYTES + byte if what == "payload" else byte % HEADER_BYTES
            record = bytearray(whole[page - 1] if what == "other" else whole[page])
            if what in ("payload", "header"):
                record[place] ^= 0x10
            file.seek(slots[page] * slot_bytes)
            file.write(bytes(slot_bytes) if what == "zeros" else record)
    if "read fails" in damage:
        gpu_of(cache).files.failures = [OSError(errno.EIO, "a cosmic ray"), None, OSError(errno.EIO, "a cosmic ray")]
    lost = [page for page, what in enumerate(damage) if what not in ("none", "read fails")]
    assert read(cache, tokens) == min(lost, default=PAGES) * PAGE
    told = counts(cache)
    assert sum(count for name, count in told.items() if name.startswith("refused")) == len(lost)
    assert told["read directly"] + told.get("not proven directly", 0) == PAGES
    assert told["read directly"] <= PAGES - len(lost)
    all_is_given_back(cache)


def test_a_read_that_cannot_even_be_asked_for_leaves_none_that_was_begun_before_on_its_way(monkeypatch, tmp_path):
    """Whatever is raised: the memory is given to somebody else next."""
    (tmp_path / "segment").write_bytes(bytes(3 * 4096))
    directory: Any = SimpleNamespace(segment_path=lambda segment: tmp_path / "segment")
    reader = LateReader()
    records = DirectRecords(reader, directory, 8, 4096, 1)
    memory = torch.zeros(4 * 4096, dtype=torch.uint8)
    rows = memory[-memory.data_ptr() % 4096 :][: 3 * 4096].view(3, 4096)
    begin, slots = LateFile.begin, iter([0, 2])

    def second_fails(file, offset, place):
        if next(slots):
            raise ValueError("no such thing")
        return begin(file, offset, place)

    monkeypatch.setattr(LateFile, "begin", second_fails)
    with pytest.raises(ValueError, match="no such thing"):
        records.begin([0, 2], [4096, 4096], rows)
    assert reader.under_way == 0
    records.close()
