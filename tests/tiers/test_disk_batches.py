"""The disk tier's batches: shared I/Os, reading ahead, early ends, failures inside a batch, memory of any alignment, every engine."""

from __future__ import annotations

import errno
import logging
import os
import threading
from itertools import permutations
from typing import Any

import numpy as np
import pytest

from kvtier.errors import ConfigError, IntegrityError, LayoutError, StoreError
from kvtier.io.buffered import BufferedEngine
from kvtier.io.files import page_aligned
from kvtier.testing.engines import ended, threads
from kvtier.testing.tiers import get, holds, page_id, payload, put, staging
from kvtier.tiers.base import Refused
from kvtier.tiers.disk import batches, plan
from tests.io.refusals import refuse_direct
from tests.tiers.disk import SLOT, DiskContract, open_disk
from tests.tiers.faults import FaultyEngine


class TestDiskBuffered(DiskContract):
    def make_options(self) -> dict[str, Any]:
        return {"engine": "buffered", "depth": 1}


class TestDiskOnAsyncFiles(DiskContract):
    def make_options(self) -> dict[str, Any]:
        return {"engine": "aiofiles", "depth": 3}


class RecordingEngine(BufferedEngine):
    """Notes the calls; reads beyond the file's first slot wait at `gate`, writes that touch byte `bad` fail."""

    native = False

    def __init__(self) -> None:
        super().__init__(depth=4)
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.stuck = threading.Event()
        self.bad: int | None = None

    def _pread(self, file, offset, buffer):
        self.reads.append((offset, buffer.nbytes))
        if offset and not self.gate.is_set():
            self.stuck.set()
            self.gate.wait(20)
        return super()._pread(file, offset, buffer)

    def _pwrite(self, file, offset, data):
        self.writes.append((offset, data.nbytes))
        if self.bad is not None and offset <= self.bad < offset + data.nbytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super()._pwrite(file, offset, data)


@pytest.fixture
def recording(tmp_path):
    engine = RecordingEngine()
    tier = open_disk(tmp_path / "store", engine=engine)
    engine.reads.clear()
    engine.writes.clear()
    yield tier, engine
    engine.gate.set()
    tier.close()


@pytest.fixture
def small_chunks(monkeypatch):
    """Two slots at most share an I/O."""
    monkeypatch.setattr(plan, "LEAST_CHUNK_BYTES", 2 * SLOT)
    monkeypatch.setattr(plan, "MOST_CHUNK_BYTES", 2 * SLOT)
    monkeypatch.setattr(batches, "READ_BYTES", 2 * SLOT)


def keys(numbers):
    return [page_id(n).key for n in numbers]


def test_neighbours_share_an_io(recording, monkeypatch):
    tier, engine = recording
    slots = put(tier, range(16))
    assert engine.writes == [(0, 16 * SLOT)]
    tier.load(slots, keys(range(16)), staging(tier, 16))
    assert engine.reads == [(0, 16 * SLOT)]
    engine.reads.clear()
    tier.load(slots[4:6] + slots[9:10], keys([4, 5, 9]), staging(tier, 3))
    assert sorted(engine.reads) == [(4 * SLOT, 2 * SLOT), (9 * SLOT, SLOT)]


@pytest.mark.usefixtures("small_chunks")
def test_the_first_page_is_given_while_the_others_are_being_read(recording):
    tier, engine = recording
    slots = put(tier, range(8))
    engine.gate.clear()
    each = tier.load_each(slots, keys(range(8)), staging(tier, 8))
    first = dict([next(each), next(each)])
    assert sorted(first) == [0, 1]
    engine.gate.set()
    assert sorted(first | dict(each)) == list(range(8))


@pytest.mark.usefixtures("small_chunks")
def test_law_4_leaving_early_waits_until_nobody_writes_into_the_staging(recording):
    tier, engine = recording
    slots = put(tier, range(16))
    rows = staging(tier, 16)
    engine.gate.clear()
    each = tier.load_each(slots, keys(range(16)), rows)
    next(each)
    assert engine.stuck.wait(20)
    leaving = threading.Thread(target=each.close)
    leaving.start()
    leaving.join(0.2)
    assert leaving.is_alive(), "reads are under way"
    engine.gate.set()
    leaving.join(20)
    rows[:] = 0xEE
    assert holds(tier, slots[0], 0)
    assert (rows == 0xEE).all()
    assert len(engine.reads) <= 1 + 8, "what was not begun is not read any more"


@pytest.mark.usefixtures("small_chunks")
def test_close_waits_for_who_is_still_loading(recording):
    tier, _ = recording
    slots = put(tier, range(8))
    each = tier.load_each(slots, keys(range(8)), staging(tier, 8))
    next(each)
    closing = threading.Thread(target=tier.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    assert sum(not isinstance(found, Refused) for _, found in each) == 7
    closing.join(20)
    assert not closing.is_alive()


def test_law_2_of_a_failed_io_only_the_records_that_fail_alone_are_refused(recording):
    tier, engine = recording
    slots = tier.reserve(6)
    assert slots is not None
    engine.bad = slots[3] * SLOT + 100
    results = tier.store(slots, [page_id(n) for n in range(6)], [payload(tier, n) for n in range(6)])
    assert results == [None] * 3 + [Refused(f"io: {os.strerror(errno.EIO)}")] + [None] * 2
    assert [holds(tier, slot, n) for n, slot in enumerate(slots)] == [True] * 3 + [False] + [True] * 2
    tier.check_integrity()
    engine.bad = None
    assert tier.store(slots[3:4], [page_id(3)], [payload(tier, 3)]) == [None]


def test_law_6_a_store_of_any_size_goes_through_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("kvtier.tiers.disk.writer._SCRATCH_BYTES", 6 * SLOT)
    engine = FaultyEngine()
    tier = open_disk(tmp_path, engine=engine)
    slots = tier.reserve(10)
    assert slots is not None
    engine.write_budget = 7 * SLOT + 5000
    results = tier.store(slots, [page_id(n) for n in range(10)], [payload(tier, n) for n in range(10)])
    assert results == [None] * 7 + [Refused("disk full")] * 3
    assert all(holds(tier, slot, n) for n, slot in enumerate(slots[:7]))
    assert engine.writes < 20
    tier.close()


def test_a_batch_with_a_slot_that_holds_a_copy_writes_nothing(recording):
    tier, engine = recording
    held = put(tier, [0])
    slots = tier.reserve(2)
    assert slots is not None
    engine.writes.clear()
    with pytest.raises(IntegrityError, match="already holds a copy"):
        tier.store([*slots, *held], [page_id(n) for n in (1, 2, 3)], [payload(tier, n) for n in (1, 2, 3)])
    assert engine.writes == []
    assert holds(tier, held[0], 0)
    tier.check_integrity()
    assert tier.store(slots, [page_id(1), page_id(2)], [payload(tier, n) for n in (1, 2)]) == [None, None]


def test_lists_of_different_lengths_are_refused_before_anything_is_written(recording):
    tier, engine = recording
    slots = tier.reserve(2)
    assert slots is not None
    with pytest.raises(ValueError, match="2 slots, 2 pages and 1 payloads"):
        tier.store(slots, [page_id(1), page_id(2)], [payload(tier, 1)])
    assert engine.writes == []


def test_slots_are_given_in_ascending_order_whatever_was_freed(tmp_path):
    tier = open_disk(tmp_path)
    slots = put(tier, range(16))
    tier.free(slots[3:9])
    assert tier.reserve(6) == slots[3:9]
    tier.close()


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.zeros((2, SLOT - 1), np.uint8),
        lambda: np.zeros((1, SLOT), np.uint8),
        lambda: np.zeros((2, SLOT), np.int8),
        lambda: np.zeros((2, 2 * SLOT), np.uint8)[:, ::2],
        lambda: np.zeros(2 * SLOT, np.uint8),
        lambda: np.frombuffer(bytes(2 * SLOT), np.uint8).reshape(2, SLOT),
    ],
    ids=["narrow", "short", "dtype", "strided", "flat", "read-only"],
)
def test_staging_that_cannot_be_read_into_is_refused_before_any_io(recording, make):
    tier, engine = recording
    slots = put(tier, range(2))
    with pytest.raises(LayoutError, match=rf"staging is .* expected writable uint8 \[2 or more, {SLOT} or more\]"):
        tier.load_each(slots, keys(range(2)), make())
    with pytest.raises(LayoutError):
        tier.load(slots, keys(range(2)), make())
    assert engine.reads == []


@pytest.mark.parametrize("shift", [0, 512, 8, 1])
def test_direct_io_serves_memory_of_any_alignment(tmp_path, shift, monkeypatch):
    monkeypatch.setattr("kvtier.tiers.disk.batches._BOUNCE_BYTES", 3 * SLOT)
    tier = open_disk(tmp_path)
    if tier.report()["engine"] != "direct":
        pytest.skip("no O_DIRECT here")
    slots = put(tier, range(16))
    rows = page_aligned(18 * SLOT)[shift : shift + 16 * SLOT].reshape(16, SLOT)
    for index, found in tier.load_each(slots, keys(range(16)), rows):
        assert not isinstance(found, Refused)
        assert np.shares_memory(found, rows[index])
        np.testing.assert_array_equal(found, payload(tier, index))
    each = tier.load_each(slots, keys(range(16)), rows)
    next(each)
    each.close()
    tier.close()


ENGINES = ("direct", "buffered", "aiofiles")


@pytest.mark.parametrize(("writer", "reader"), list(permutations(ENGINES, 2)))
def test_a_store_written_by_one_engine_opens_with_another(tmp_path, writer, reader):
    try:
        tier = open_disk(tmp_path, engine=writer)
        held = dict(zip(range(6), put(tier, range(6)), strict=True))
        tier.close()
        again = open_disk(tmp_path, engine=reader)
    except ConfigError as error:
        pytest.skip(str(error))
    assert {page.depth: slot for slot, page in again.recover()} == held
    held |= zip(range(6, 9), put(again, range(6, 9)), strict=True)
    assert all(holds(again, slot, n) for n, slot in held.items())
    again.close()


@pytest.fixture
def without_direct(monkeypatch):
    refuse_direct(monkeypatch)


@pytest.mark.usefixtures("without_direct")
def test_law_7_auto_degrades_says_so_once_and_in_the_report(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "kvtier"):
        tier = open_disk(tmp_path / "store")
    assert tier.report()["engine"] == "buffered"
    assert "Invalid argument" in str(tier.report()["engine_instead"])
    assert sum("buffered I/O engine" in record.message for record in caplog.records) == 1
    assert holds(tier, put(tier, [1])[0], 1)
    tier.close()


@pytest.mark.usefixtures("without_direct")
def test_law_7_an_engine_that_was_asked_for_and_is_refused_is_an_error_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match=r"disk\.io_engine is direct, but .* refuses it"):
        open_disk(tmp_path / "a" / "store", engine="direct")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("engine", ENGINES)
def test_law_6_close_leaves_no_thread(tmp_path, engine):
    before = threads()
    try:
        tier = open_disk(tmp_path, engine=engine, depth=3)
    except ConfigError as error:
        pytest.skip(str(error))
    slots = put(tier, range(16))
    tier.free(slots[1::2])
    assert holds(tier, slots[0], 0)
    tier.load(slots[::2], keys(range(0, 16, 2)), staging(tier, 8))
    assert 0 < len(threads() - before) <= 4
    tier.close()
    assert ended(before)


def test_a_store_that_could_not_be_opened_leaves_no_thread(tmp_path):
    before = threads()
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match="no disk store"):
        open_disk(tmp_path, engine="aiofiles")  # trying it starts its loop
    assert ended(before)


def test_refusals_of_a_batch_are_each_their_own(tmp_path):
    tier = open_disk(tmp_path)
    slots = put(tier, range(4))
    tier.free(slots[2:3])
    found = tier.load([*slots, 10**6], keys([0, 9, 2, 3, 4]), staging(tier, 5))
    assert [type(f) is Refused for f in found] == [False, True, True, False, True]
    assert tier.counters["refused: key"] == 3
    assert isinstance(get(tier, slots[2], page_id(2).key), Refused)
    np.testing.assert_array_equal(found[3], payload(tier, 3))
    tier.close()
