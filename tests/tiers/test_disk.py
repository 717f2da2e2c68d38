"""The disk tier while it is open: the contract, damaged records, failing media, and everything that keeps a store from opening."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.errors import ConfigError, LayoutError, StoreError, StoreLocked
from kvtier.formats import Format, get_format
from kvtier.layout import PageLayout
from kvtier.testing.tiers import LAYOUT, TierContract, get, holds, page_id, payload, put, staging
from kvtier.tiers.base import Refused
from kvtier.tiers.disk import DiskTier
from kvtier.tiers.disk.record import HEADER_BYTES
from tests.tiers.faults import FaultyEngine, GatedEngine, NoHolesEngine

RAW, VARIABLE = get_format("raw"), get_format("raw+lz4")
NAMESPACE = bytes(range(32))
SLOT = 8192  # of LAYOUT in RAW: 256 + 4096 bytes, padded
CAPACITY = 16 * SLOT


def open_disk(
    path: Path,
    *,
    layout: PageLayout = LAYOUT,
    format: Format = RAW,
    capacity: int = CAPACITY,
    namespace: bytes = NAMESPACE,
    **options: Any,
) -> DiskTier:
    return DiskTier(path, layout, format, capacity, namespace, **options)


def segment(tier_path: Path) -> Path:
    return tier_path / "segment-00000.kvt"


def flip(path: Path, offset: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


class DiskContract(TierContract):
    format = RAW

    def make_tier(self, tmp_path: Path, layout: PageLayout) -> DiskTier:
        return open_disk(tmp_path, layout=layout, format=self.format, **self.make_options())

    def make_options(self) -> dict[str, Any]:
        return {}

    def corrupt(self, tier, slot) -> None:
        flip(segment(tier._directory.path), slot * SLOT + HEADER_BYTES + 5)


class TestDisk(DiskContract):
    pass


class TestDiskVariableSize(DiskContract):
    format = VARIABLE

    def corrupt(self, tier, slot) -> None:
        flip(segment(tier._directory.path), slot * SLOT + HEADER_BYTES)


class TestDiskVariableSizeWithoutHoles(TestDiskVariableSize):
    def make_options(self) -> dict[str, Any]:
        return {"engine": NoHolesEngine()}


class TestDiskWithPowerDurability(DiskContract):
    def make_options(self) -> dict[str, Any]:
        return {"durability": "power"}


# -- damage -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A tier with page 1 in slot 0, as (tier, path of its segment)."""
    path = tmp_path_factory.mktemp("damage")
    tier = open_disk(path)
    assert put(tier, [1]) == [0]
    yield tier, segment(path)
    tier.close()


@settings(max_examples=300, deadline=None)
@given(offset=st.one_of(st.integers(0, HEADER_BYTES - 1), st.integers(0, SLOT - 1)), bit=st.integers(0, 7))
def test_law_1_a_flipped_bit_is_refused_and_padding_means_nothing(damaged, offset, bit):
    tier, path = damaged
    flip(path, offset, bit)
    try:
        found = get(tier, 0, page_id(1).key)
        assert isinstance(found, Refused) == (offset < HEADER_BYTES + RAW.payload_bytes(LAYOUT))
        if not isinstance(found, Refused):
            np.testing.assert_array_equal(found, payload(tier, 1))
    finally:
        flip(path, offset, bit)
    assert holds(tier, 0, 1)


@settings(max_examples=60, deadline=None)
@given(length=st.integers(0, SLOT))
def test_law_1_a_truncated_file_is_refused(damaged, length):
    tier, path = damaged
    whole = path.read_bytes()
    os.truncate(path, length)
    try:
        found = get(tier, 0, page_id(1).key)
        assert found == Refused("truncated") if length < SLOT else not isinstance(found, Refused)
    finally:
        path.write_bytes(whole)
    assert holds(tier, 0, 1)


def test_law_1_a_record_moved_to_another_slot_is_refused(tmp_path):
    tier = open_disk(tmp_path)
    first, second = put(tier, [1, 2])
    data = bytearray(segment(tmp_path).read_bytes())
    data[second * SLOT : (second + 1) * SLOT] = data[first * SLOT : (first + 1) * SLOT]
    segment(tmp_path).write_bytes(data)
    assert get(tier, second, page_id(2).key) == Refused("key")
    tier.close()


def test_law_1_a_record_of_another_layout_or_format_is_refused(tmp_path):
    theirs = open_disk(tmp_path / "theirs", layout=replace(LAYOUT, dtype="fp16"))
    ours = open_disk(tmp_path / "ours")
    put(theirs, [1])
    put(ours, [1])
    segment(tmp_path / "ours").write_bytes(segment(tmp_path / "theirs").read_bytes())
    assert get(ours, 0, page_id(1).key) == Refused("format")
    theirs.close()
    ours.close()


def test_deleted_files_give_right_bytes_or_none_and_are_not_found_again(tmp_path):
    tier = open_disk(tmp_path)
    slots = put(tier, [1, 2])
    segment(tmp_path).unlink()
    for number, slot in enumerate(slots, 1):
        assert holds(tier, slot, number) or isinstance(get(tier, slot, page_id(number).key), Refused)
    tier.close()
    again = open_disk(tmp_path)
    assert list(again.recover()) == []
    assert again.bytes_used == 0
    again.close()


def test_refusals_are_counted_by_reason(tmp_path):
    tier = open_disk(tmp_path)
    slots = put(tier, [1])
    get(tier, slots[0], page_id(2).key)
    flip(segment(tmp_path), HEADER_BYTES)
    get(tier, slots[0], page_id(1).key)
    assert tier.counters["refused: key"] == 1
    assert tier.counters["refused: checksum"] == 1
    tier.close()


# -- failing media ----------------------------------------------------------------------------------------------------------


def image_of(path: Path, image: Path) -> Path:
    """What a process that starts now would find: the files as they are, without the lock."""
    return Path(shutil.copytree(path, image, ignore=shutil.ignore_patterns("lock")))


@settings(max_examples=25, deadline=None)
@given(budget=st.integers(0, 3 * SLOT - 1))
def test_law_2_a_full_disk_refuses_and_loses_nothing(tmp_path_factory, budget):
    path = tmp_path_factory.mktemp("full") / "store"
    engine = FaultyEngine()
    tier = open_disk(path, engine=engine)
    held = dict(zip(range(4), put(tier, range(4)), strict=True))
    slots = tier.reserve(3)
    assert slots is not None
    engine.write_budget = budget
    results = tier.store(slots, [page_id(n) for n in (4, 5, 6)], [payload(tier, n) for n in (4, 5, 6)])
    assert results == [None] * (budget // SLOT) + [Refused("disk full")] * (3 - budget // SLOT)
    tier.check_integrity()
    held |= {n: slot for n, slot, result in zip((4, 5, 6), slots, results, strict=True) if result is None}
    assert all(holds(tier, slot, n) for n, slot in held.items())
    for n, slot, result in zip((4, 5, 6), slots, results, strict=True):
        if result is not None:
            assert get(tier, slot, page_id(n).key) == Refused("key")

    after_a_crash = open_disk(image_of(path, path.with_name("image")))
    assert {page.depth: slot for slot, page in after_a_crash.recover()} == held
    after_a_crash.close()
    tier.free([slot for slot in slots if slot not in held.values()])
    tier.check_integrity()
    tier.close()


def test_law_6_a_full_disk_makes_callers_evict_and_is_tried_again_after_30_s(tmp_path, caplog):
    now = [0.0]
    engine = FaultyEngine()
    tier = open_disk(tmp_path, engine=engine, clock=lambda: now[0])
    slots = put(tier, range(4))
    engine.write_budget = 100
    with caplog.at_level(logging.INFO, "kvtier.tiers.disk"):
        for _ in range(2):
            (slot,) = tier.reserve(1) or [-1]
            if slot >= 0:
                assert tier.store([slot], [page_id(9)], [payload(tier, 9)]) == [Refused("disk full")]
                tier.free([slot])
        assert tier.usable_bytes == 4 * SLOT
        assert tier.reserve(1) is None
        assert tier.capacity_bytes == CAPACITY
        now[0] = 29.9
        assert tier.free_slots == 0
        tier.free(slots[:1])
        assert tier.free_slots == 1
        now[0] = 30.0
        assert tier.usable_bytes == CAPACITY
        engine.write_budget = None
        put(tier, [5, 6])
    assert sum("disk full" in record.message for record in caplog.records) == 1
    assert sum("room again" in record.message for record in caplog.records) == 1
    tier.close()


def test_a_full_disk_is_asked_again_once_freed_copies_are_punched(tmp_path):
    engine = FaultyEngine()
    tier = open_disk(tmp_path, engine=engine)
    slots = put(tier, range(4))
    taken = tier.reserve(1)
    assert taken is not None
    tier.free(slots[:2])
    engine.write_budget = 10
    punch = engine.punch

    def punch_makes_room(file: int, offset: int, length: int) -> bool:
        engine.write_budget = None
        return punch(file, offset, length)

    engine.punch = punch_makes_room  # type: ignore[method-assign]
    assert tier.store(taken, [page_id(7)], [payload(tier, 7)]) == [None]
    assert holds(tier, taken[0], 7)
    tier.close()


@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS])
def test_other_write_errors_are_refusals_that_say_what_the_system_said(tmp_path, code):
    engine = FaultyEngine()
    tier = open_disk(tmp_path, engine=engine)
    slots = put(tier, [1]) + (tier.reserve(1) or [])
    engine.write_budget, engine.write_errno = 0, code
    assert tier.store(slots[1:], [page_id(2)], [payload(tier, 2)]) == [Refused(f"io: {os.strerror(code)}")]
    assert tier.usable_bytes == CAPACITY
    assert holds(tier, slots[0], 1)
    tier.check_integrity()
    engine.write_budget = None
    assert tier.store(slots[1:], [page_id(2)], [payload(tier, 2)]) == [None]
    tier.close()


def test_a_copy_that_cannot_be_erased_stays_pending_and_is_tried_again(tmp_path):
    engine = FaultyEngine()
    tier = open_disk(tmp_path, engine=engine)
    tier.free(put(tier, [1, 2]))
    engine.punch_errno = errno.EIO
    assert tier.tidy() == 0
    assert tier.report()["pending_slots"] == 2
    tier.check_integrity()
    engine.punch_errno = 0
    assert tier.tidy() == 2
    assert tier.report()["pending_slots"] == 0
    tier.close()


def test_power_durability_refuses_what_could_not_be_synced(tmp_path):
    engine = FaultyEngine()
    tier = open_disk(tmp_path / "store", engine=engine, durability="power")
    held = put(tier, [1])
    slots = tier.reserve(2)
    assert slots is not None
    engine.sync_errno = errno.EIO
    results = tier.store(slots, [page_id(2), page_id(3)], [payload(tier, 2), payload(tier, 3)])
    assert results == [Refused(f"io: {os.strerror(errno.EIO)}")] * 2
    assert isinstance(get(tier, slots[0], page_id(2).key), Refused)
    assert tier.checkpoint() is False
    tier.check_integrity()
    after_a_crash = open_disk(image_of(tmp_path / "store", tmp_path / "image"))
    assert [page for _, page in after_a_crash.recover()] == [page_id(1)]
    after_a_crash.close()
    engine.sync_errno = 0
    assert tier.checkpoint() is True
    assert holds(tier, held[0], 1)
    tier.close()


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 1 MiB."""
    point = tmp_path / "mount"
    point.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "kvtier-test", point], capture_output=True, check=False
    )
    if not mounted or mounted.returncode != 0:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield point
    subprocess.run(["umount", "-l", point], check=True)


def test_a_really_full_disk_serves_evicts_closes_and_reopens(small_disk):
    path = small_disk / "store"
    tier = open_disk(path, capacity=64 * SLOT)
    held = dict(zip(range(20), put(tier, range(20)), strict=True))
    with (small_disk / "somebody elses").open("wb", buffering=0) as other:
        while other.write(bytes(4096)) == 4096:
            if os.statvfs(small_disk).f_bavail == 0:
                break
    (slot,) = tier.reserve(1) or [-1]
    assert tier.store([slot], [page_id(99)], [payload(tier, 99)]) == [Refused("disk full")]
    tier.free([slot])
    assert tier.reserve(1) is None
    for number in range(30, 40):  # evicting makes room, one for one
        tier.free([held.pop(min(held))])
        held[number] = put(tier, [number])[0]
    assert all(holds(tier, slot, n) for n, slot in held.items())
    tier.check_integrity()
    tier.close()
    again = open_disk(path, capacity=20 * SLOT)
    assert {page.depth: slot for slot, page in again.recover()} == held
    assert all(holds(again, slot, n) for n, slot in held.items())
    again.close()


# -- threads ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gated(tmp_path):
    """A tier with page 0 stored and synced, whose next write or punch waits until its gate is opened."""
    engine = GatedEngine()
    tier = open_disk(tmp_path / "store", engine=engine)
    put(tier, [0])
    assert tier.checkpoint()
    with ThreadPoolExecutor(2) as pool:
        yield tier, engine, pool
        engine.gate.set()
    tier.close()


def test_a_checkpoint_does_not_vouch_for_a_store_in_progress(gated):
    tier, engine, pool = gated
    synced = tier.report()["synced_sequence"]
    engine.gate.clear()
    storing = pool.submit(put, tier, [1])
    engine.waiting.wait()
    assert tier.checkpoint()
    assert tier.report()["synced_sequence"] == synced
    engine.gate.set()
    storing.result()
    syncs = engine.syncs
    assert tier.checkpoint()
    assert tier.report()["synced_sequence"] == synced + 1
    assert engine.syncs == syncs + 1, "what was written after the first checkpoint began is synced by the second"


def test_close_waits_for_a_store_in_progress(gated):
    tier, engine, pool = gated
    engine.gate.clear()
    storing = pool.submit(put, tier, [1])
    engine.waiting.wait()
    closing = pool.submit(tier.close)
    with pytest.raises(TimeoutError):
        closing.result(timeout=0.2)
    engine.gate.set()
    storing.result()
    closing.result(timeout=10)
    again = open_disk(tier._directory.path)
    assert [page for _, page in again.recover()] == [page_id(0), page_id(1)]
    again.close()


def test_a_slot_being_tidied_is_nobody_elses(gated):
    tier, engine, pool = gated
    slots = put(tier, range(1, 5))
    tier.free(slots)
    engine.gate.clear()
    tidying = pool.submit(tier.tidy)
    engine.waiting.wait()
    tier.check_integrity()
    taken = tier.reserve(tier.free_slots)
    assert taken is not None
    assert slots[0] not in taken
    engine.gate.set()
    tidying.result()
    assert tier.store(taken, [page_id(n) for n in taken], [payload(tier, n) for n in taken]) == [None] * len(taken)
    tier.tidy()
    assert all(holds(tier, slot, slot) for slot in taken)


# -- space ------------------------------------------------------------------------------------------------------------------


def disk_bytes(path: Path) -> int:
    """Bytes of the segment files that are not holes. (`st_blocks` would count the file system's own extent blocks too.)"""
    total = 0
    for name in path.glob("segment-*.kvt"):
        with name.open("rb") as file:
            end = 0
            while end < name.stat().st_size:
                try:
                    start = os.lseek(file.fileno(), end, os.SEEK_DATA)
                except OSError:  # only a hole is left
                    break
                end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
                total += end - start
    return total


def test_variable_sizes_are_charged_what_they_take_and_the_disk_agrees(tmp_path):
    tier = open_disk(tmp_path, format=VARIABLE)
    slots = []
    while (taken := tier.reserve(1)) is not None:
        assert tier.store(taken, [page_id(taken[0])], [np.full(100, taken[0], dtype=np.uint8)]) == [None]
        slots += taken
    assert len(slots) == CAPACITY // 4096 - 1  # the last reservation would need a whole slot
    assert tier.bytes_used == len(slots) * 4096 == disk_bytes(tmp_path)
    tier.free(slots[:20])
    big = tier.reserve(10)
    assert big is not None
    full = np.random.default_rng(0).integers(0, 256, 4200, dtype=np.uint8)[: VARIABLE.payload_bytes(LAYOUT)]
    assert tier.store(big, [page_id(100 + n) for n in range(10)], [full] * 10) == [None] * 10
    assert disk_bytes(tmp_path) <= CAPACITY
    tier.tidy()
    assert disk_bytes(tmp_path) == tier.bytes_used == len(slots[20:]) * 4096 + 10 * SLOT
    tier.free(big)
    small = tier.reserve(10)
    assert small is not None
    assert tier.store(small, [page_id(n) for n in range(10)], [full[:10]] * 10) == [None] * 10
    tier.tidy()
    assert disk_bytes(tmp_path) == tier.bytes_used
    tier.check_integrity()
    tier.close()


def test_tidy_gives_the_disk_its_blocks_back(tmp_path):
    tier = open_disk(tmp_path)
    slots = put(tier, range(16))
    assert disk_bytes(tmp_path) == CAPACITY
    tier.free(slots[4:])
    assert tier.tidy() == 12
    assert disk_bytes(tmp_path) == 4 * SLOT
    tier.close()


def test_a_slot_that_is_reserved_again_before_tidy_is_not_punched(tmp_path):
    tier = open_disk(tmp_path)
    tier.free(put(tier, range(8)))
    slots = tier.reserve(4)
    assert slots is not None
    assert tier.store(slots[:2], [page_id(20), page_id(21)], [payload(tier, 20), payload(tier, 21)]) == [None] * 2
    assert tier.tidy() == 4
    assert tier.store(slots[2:], [page_id(22), page_id(23)], [payload(tier, 22), payload(tier, 23)]) == [None] * 2
    assert all(holds(tier, slot, n) for n, slot in enumerate(slots, 20))
    tier.close()


def test_segments_are_created_in_order_when_needed(tmp_path, monkeypatch):
    monkeypatch.setattr("kvtier.tiers.disk.store._SEGMENT_BYTES", 4 * SLOT)
    tier = open_disk(tmp_path)

    def names() -> list[str]:
        return sorted(path.name for path in tmp_path.glob("segment-*"))

    assert names() == []
    slots = put(tier, range(5))
    assert names() == ["segment-00000.kvt", "segment-00001.kvt"]
    put(tier, range(5, 16))
    assert len(names()) == 4
    assert all(holds(tier, slot, n) for n, slot in enumerate(slots))
    tier.close()
    again = open_disk(tmp_path)
    assert len(list(again.recover())) == 16
    again.close()


def test_report_is_plain_data(tmp_path):
    tier = open_disk(tmp_path)
    put(tier, [1])
    tier.load([0], [page_id(1).key], staging(tier, 1))
    report = tier.report()
    assert json.loads(json.dumps(report)) == report
    assert report["bytes_used"] == SLOT
    assert report["engine"] in ("direct", "buffered")
    tier.close()


# -- what keeps a store from opening ----------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path):
    """The path of a closed store with one page."""
    tier = open_disk(tmp_path / "store")
    put(tier, [1])
    tier.close()
    return tmp_path / "store"


def edit(store: Path, **fields) -> None:
    description = json.loads((store / "store.json").read_text())
    (store / "store.json").write_text(json.dumps(description | fields))


def test_a_second_store_object_is_refused_naming_path_and_process(store):
    tier = open_disk(store)
    with pytest.raises(StoreLocked, match=rf"{store}.*process {os.getpid()};"):
        open_disk(store)
    tier.close()
    open_disk(store).close()


def test_another_layout_is_refused_naming_both(store):
    other = replace(LAYOUT, layers=3)
    with pytest.raises(LayoutError) as caught:
        open_disk(store, layout=other, capacity=4 * CAPACITY)
    assert str(LAYOUT) in str(caught.value)
    assert str(other) in str(caught.value)


def test_another_format_is_refused(store):
    with pytest.raises(StoreError, match=r"another format: raw there, raw\+lz4 here; use another disk.path, or delete"):
        open_disk(store, format=VARIABLE)


def test_another_namespace_is_refused(store):
    with pytest.raises(StoreError, match=r"another model or revision.*use another disk.path, or delete"):
        open_disk(store, namespace=bytes(32))


@pytest.mark.parametrize("capacity", [1, SLOT - 1])
def test_capacity_below_one_record_is_refused_with_both_numbers(tmp_path, capacity):
    with pytest.raises(ConfigError, match=rf"disk\.capacity_bytes is {capacity}, .* {SLOT} bytes"):
        open_disk(tmp_path, capacity=capacity)
    assert list(tmp_path.iterdir()) == []


def test_capacity_beyond_the_file_system_is_refused_with_both_numbers(tmp_path):
    with pytest.raises(ConfigError, match=rf"disk\.capacity_bytes is {1 << 60}, .* \d+ bytes are available"):
        open_disk(tmp_path, capacity=1 << 60)


def test_what_the_store_holds_counts_as_available(small_disk):
    tier = open_disk(small_disk, capacity=100 * SLOT)
    put(tier, range(100))
    tier.close()
    again = open_disk(small_disk, capacity=100 * SLOT)
    assert len(list(again.recover())) == 100
    again.close()


def test_a_directory_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match=r"no disk store and not empty \(thesis.tex\)"):
        open_disk(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"magic": "x", "version": 1, "layout_fingerprint": ""}', "\x00" * 500])
def test_a_damaged_description_is_refused(store, text):
    (store / "store.json").write_text(text)
    with pytest.raises(StoreError, match=r"store\.json.*use another disk.path, or delete"):
        open_disk(store)


@pytest.mark.parametrize(
    "fields",
    [
        {"slot_bytes": -1},
        {"segment_slots": 0},
        {"capacity_bytes": "many"},
        {"clean": 1},
        {"synced_sequence": True},
        {"layout_fingerprint": "00"},
        {"layout": {"layers": 0}},
        {"layout": [1]},
        {"unknown": 1},
    ],
    ids=str,
)
def test_a_description_with_impossible_fields_is_refused(store, fields):
    edit(store, **fields)
    with pytest.raises(StoreError, match=r"store\.json"):
        open_disk(store)


def test_a_newer_store_is_refused(store):
    edit(store, version=2)
    with pytest.raises(StoreError, match="version 2, written by a newer kvtier"):
        open_disk(store)


def test_a_path_that_cannot_be_a_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/kvtier")):
        with pytest.raises(ConfigError, match=r"disk\.path .* cannot be created or written"):
            open_disk(path)


def test_an_unknown_durability_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"disk\.durability is 'eternal'"):
        open_disk(tmp_path, durability="eternal")


def without_room(path: Path) -> os.statvfs_result:
    """As a ramfs answers, which does not count its blocks."""
    return os.statvfs_result((4096, 4096, *[0] * 9))


def failing_description(*_: Any) -> None:
    raise OSError(errno.EIO, "as from a broken disk")


@pytest.mark.parametrize(
    ("broken", "with_", "error"),
    [("os.statvfs", without_room, ConfigError), ("kvtier.tiers.disk.directory.os.rename", failing_description, StoreError)],
)
def test_a_refused_opening_leaves_only_what_was_there_before(tmp_path, monkeypatch, broken, with_, error):
    (tmp_path / "there").mkdir()
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / "lock").write_text("of an earlier process")
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(broken, with_)
        for path in (tmp_path / "new" / "deep", tmp_path / "there", tmp_path / "there" / "below", tmp_path / "locked"):
            with pytest.raises(error):
                open_disk(path)
            assert sorted(tmp_path.rglob("*")) == before
    open_disk(tmp_path / "new" / "deep").close()
    open_disk(tmp_path / "locked").close()


def test_a_refused_opening_takes_nothing_of_a_store_that_was_there(store, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", without_room)
        with pytest.raises(ConfigError, match="lower it"):
            open_disk(store, capacity=1 << 40)
    tier = open_disk(store)
    assert [page for _, page in tier.recover()] == [page_id(1)]
    tier.close()


def test_a_lock_that_was_given_up_meanwhile_locks_nothing(tmp_path, monkeypatch):
    flock = fcntl.flock

    def late(file: int, operation: int) -> None:
        (tmp_path / "lock").unlink(missing_ok=True)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(StoreLocked, match="given up by somebody else, with its lock; try again"):
        open_disk(tmp_path)


def test_a_failed_opening_leaves_the_store_unlocked(store):
    with pytest.raises(StoreError):
        open_disk(store, namespace=bytes(32))
    tier = open_disk(store)
    assert [page for _, page in tier.recover()] == [page_id(1)]
    tier.close()
