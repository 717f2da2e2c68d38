"""The disk tier on media that are full or fail: refusals that say why, and nothing lost."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.errors import ConfigError
from kvtier.testing.tiers import get, holds, page_id, payload, put
from kvtier.tiers.base import Refused
from kvtier.tiers.disk import DiskTier
from tests.tiers.disk import CAPACITY, SLOT, VARIABLE, image_of, open_disk
from tests.tiers.faults import FaultyEngine


@settings(max_examples=25)
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


def test_a_medium_that_cannot_erase_is_asked_a_few_times_a_pass_which_is_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("kvtier.tiers.disk.tidying.MOST_FAILURES", 2)
    engine = FaultyEngine()
    tier = open_disk(tmp_path, engine=engine)
    freed = put(tier, [1, 2, 3, 4, 5])
    tier.free(freed)
    asked: list[int] = []
    erase = tier._segments.erase

    def noted(slot):
        asked.append(slot)
        erase(slot)

    monkeypatch.setattr(tier._segments, "erase", noted)
    engine.punch_errno = errno.EROFS
    assert tier.tidy() == tier.tidy() == 0
    assert asked == freed[:4], "others have their turn"
    assert caplog.text.count(os.strerror(errno.EROFS)) == 1
    engine.punch_errno = 0
    assert tier.tidy() == 5
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


def fill(disk: Path) -> None:
    """Somebody else takes all that is free."""
    with (disk / "somebody elses").open("wb", buffering=0) as other, contextlib.suppress(OSError):
        while other.write(bytes(4096)):
            pass
    assert os.statvfs(disk).f_bavail == 0


def evict_and_store(tier: DiskTier, held: dict[int, int], numbers: Iterable[int]) -> None:
    """Evicting makes room, one for one."""
    for number in numbers:
        tier.free([held.pop(min(held))])
        held[number] = put(tier, [number])[0]
    assert all(holds(tier, slot, n) for n, slot in held.items())
    tier.check_integrity()


def test_a_really_full_disk_serves_evicts_closes_and_reopens(small_disk, caplog):
    path = small_disk / "store"
    tier = open_disk(path, capacity=64 * SLOT)
    held = dict(zip(range(20), put(tier, range(20)), strict=True))
    fill(small_disk)
    (slot,) = tier.reserve(1) or [-1]
    assert tier.store([slot], [page_id(99)], [payload(tier, 99)]) == [Refused("disk full")]
    tier.free([slot])
    assert tier.reserve(1) is None
    evict_and_store(tier, held, range(30, 40))
    tier.close()
    for capacity in (20 * SLOT, 20 * SLOT):
        again = open_disk(path, capacity=capacity)
        assert {page.depth: slot for slot, page in again.recover()} == held
        assert all(holds(again, slot, n) for n, slot in held.items())
        again.close()
    assert "free " not in caplog.text


def test_a_store_is_opened_again_whoever_filled_the_disk_meanwhile(small_disk, caplog):
    path = small_disk / "store"
    tier = open_disk(path, capacity=64 * SLOT)
    held = dict(zip(range(20), put(tier, range(20)), strict=True))
    tier.close()
    fill(small_disk)
    again = open_disk(path, capacity=64 * SLOT)
    assert f"{20 * SLOT} bytes are available (0 free, {20 * SLOT} held by the store) of disk.capacity_bytes {64 * SLOT}" in caplog.text
    assert f"free {44 * SLOT} bytes for all of it" in caplog.text
    assert {page.depth: slot for slot, page in again.recover()} == held
    (slot,) = again.reserve(1) or [-1]
    assert again.store([slot], [page_id(99)], [payload(again, 99)]) == [Refused("disk full")]
    again.free([slot])
    evict_and_store(again, held, range(30, 40))
    again.close()
    with pytest.raises(ConfigError, match=rf"is {65 * SLOT}, but .*; lower it, or free {45 * SLOT} bytes there"):
        open_disk(path, capacity=65 * SLOT)
    (small_disk / "somebody elses").unlink()
    caplog.clear()
    roomy = open_disk(path, capacity=64 * SLOT)
    assert {page.depth: slot for slot, page in roomy.recover()} == held
    assert not caplog.text
    roomy.close()


def test_a_full_disk_is_not_taken_for_one_without_holes(small_disk):
    """On such a one there are only as many slots as whole ones fit: small copies in slots beyond would be cut off."""
    tier = open_disk(small_disk / "store", format=VARIABLE, capacity=64 * SLOT)
    small = np.arange(100, dtype=np.uint8)
    for number in range(100):
        assert tier.store(tier.reserve(1) or [], [page_id(number)], [small]) == [None]
    tier.close()
    fill(small_disk)
    again = open_disk(small_disk / "store", format=VARIABLE, capacity=64 * SLOT)
    assert again.report()["punch_holes"]
    assert len(list(again.recover())) == 100
    again.close()
