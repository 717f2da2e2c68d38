"""Laws checked: pages stored by key come back by key, bit for bit, up to the first that is missing; changes say what is where."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from kvtier.cache import TieredKVCache
from kvtier.config import load_config
from kvtier.io import probe
from kvtier.layout import PageLayout
from kvtier.leases import handing
from kvtier.tiers.host import HostTier
from tests.cache.rig import until
from tests.tiers.faults import StuckEngine

LAYOUT = PageLayout(layers=2, planes=2, page_tokens=4, kv_heads=2, head_dim=32, dtype="fp32")
KEYS = [bytes([index]) * 32 for index in range(40)]
ROOT = bytes([255]) * 32


def config(tmp_path, device=16, host=None, disk=None, disk_policy="write_back"):
    overrides = {"model.name": "m", "pages.page_tokens": 4, "device.capacity_bytes": device * LAYOUT.page_bytes, "device.place": "cpu"}
    overrides |= {"host": None} if host is None else {"host.capacity_bytes": host * LAYOUT.page_bytes, "host.format": "raw"}
    if host is not None:
        overrides["host.write_policy"] = "write_through"
    if disk is not None:
        overrides |= {"disk.path": str(tmp_path / "kv"), "disk.capacity_bytes": disk * 2 * LAYOUT.page_bytes, "disk.format": "raw"}
        overrides["disk.write_policy"] = disk_policy
    return load_config(overrides=overrides, env={})


def page(index):
    return torch.full(LAYOUT.shape, float(index))


class Engine:
    """An engine's blocks: what it would store, and what it got back."""

    def __init__(self, cache):
        self.pages = cache.by_key()
        self.got: dict[int, torch.Tensor] = {}

    def store(self, first, count, enough=None):
        def fill(positions, slots):
            for position, slot in zip(positions, slots, strict=True):
                self.pages.slot(slot)[:] = page(first + position)

        return self.pages.store(KEYS[first : first + count], KEYS[first - 1] if first else ROOT, first, fill, enough)

    def restore(self, count):
        self.got = {}

        def hand_out(positions, pages, layers):
            for position, part in zip(positions, pages, strict=True):
                self.got.setdefault(position, torch.full(LAYOUT.shape, float("nan")))[layers] = part

        came = self.pages.restore(KEYS[:count], hand_out)
        assert sorted(self.got) == list(range(came))
        assert all(torch.equal(content, page(index)) for index, content in self.got.items())
        return came


def test_pages_come_back_though_the_staging_area_is_far_smaller(tmp_path):
    with TieredKVCache(config(tmp_path, device=16, host=64), LAYOUT) as cache:
        engine = Engine(cache)
        assert engine.restore(0) == 0
        assert engine.store(0, 40) == 40
        assert engine.restore(40) == 40
        cache.check_integrity()


def test_a_restore_ends_at_the_first_page_that_is_missing(tmp_path):
    with TieredKVCache(config(tmp_path, host=64), LAYOUT) as cache:
        engine = Engine(cache)
        engine.store(0, 5)
        engine.store(6, 5)
        assert engine.restore(11) == 5
        engine.store(5, 1)
        assert engine.restore(11) == 11
        cache.check_integrity()


def test_a_new_process_finds_what_the_disk_has(tmp_path):
    with TieredKVCache(config(tmp_path, host=64, disk=64), LAYOUT) as cache:
        Engine(cache).store(0, 20)
    with TieredKVCache(config(tmp_path, host=64, disk=64), LAYOUT) as cache:
        engine = Engine(cache)
        assert engine.pages.changes() == dict.fromkeys(KEYS[:20], 0b100)
        assert engine.restore(20) == 20


@pytest.mark.parametrize("at_once", [1, 2])
def test_what_is_in_memory_is_handed_out_from_there_and_takes_no_room_of_the_staging_area(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(handing, "layers_per_decode", lambda layers, page_bytes: at_once)
    with TieredKVCache(config(tmp_path, device=16, host=64), LAYOUT) as cache:
        engine = Engine(cache)
        engine.store(0, 30)
        cache.settle()
        before = cache.stats()
        assert engine.restore(30) == 30
        after = cache.stats()
        assert after["tiers"]["device"]["pages_in"] == before["tiers"]["device"]["pages_in"]
        assert after["tiers"]["host"]["pages_served"] >= before["tiers"]["host"]["pages_served"] + 14
        assert after["links"]["host->device"]["pages"] >= 14
        cache.check_integrity()


@pytest.mark.parametrize(("disk_policy", "came"), [("write_through", 30), ("write_back", 3)])
def test_a_damaged_copy_in_memory_is_not_handed_out_but_another_one_is(tmp_path, disk_policy, came):
    with TieredKVCache(config(tmp_path, host=64, disk=64, disk_policy=disk_policy), LAYOUT) as cache:
        engine, residency = Engine(cache), cache._residency
        engine.store(0, 30)
        cache.settle()
        with residency.lock:
            residency.eviction.vacate(residency.table.ready(0))
            slot = int(residency.table.slot[1, residency.table.row(KEYS[3])])
        host = residency.tiers[1]
        assert isinstance(host, HostTier)
        host._bytes[slot, 7] ^= 1
        assert engine.restore(30) == came
        assert cache.stats()["tiers"]["host"]["refused"] == {"checksum": 1}
        cache.settle()
        assert not engine.pages.changes()[KEYS[3]] & 0b10
        cache.check_integrity()


def test_a_restore_that_is_late_hands_nothing_out(tmp_path):
    with TieredKVCache(config(tmp_path, host=64), LAYOUT) as cache:
        engine = Engine(cache)
        engine.store(0, 8)
        handed: list[int] = []
        assert engine.pages.restore(KEYS[:8], lambda positions, pages, layers: handed.extend(positions), time.monotonic()) == 0
        assert handed == []
        assert engine.restore(8) == 8
        cache.check_integrity()


def test_changes_say_what_is_where_until_it_is_gone(tmp_path):
    with TieredKVCache(config(tmp_path, host=8), LAYOUT) as cache:
        engine = Engine(cache)
        engine.store(0, 4)
        cache.settle()
        assert engine.pages.changes() == dict.fromkeys(KEYS[:4], 0b11)
        assert engine.pages.changes() == {}
        engine.store(4, 30)
        cache.settle()
        seen = engine.pages.changes()
        held = {key for key, mask in seen.items() if mask}
        assert len(held) <= 24
        cache.clear()
        assert set(engine.pages.changes().values()) == {0}


def test_a_page_that_is_there_is_not_written_again(tmp_path):
    with TieredKVCache(config(tmp_path, host=64), LAYOUT) as cache:
        engine = Engine(cache)
        engine.store(0, 4)
        written = []
        kept = engine.pages.store(KEYS[:6], ROOT, 0, lambda positions, slots: written.extend(positions))
        assert kept == 6
        assert written == [4, 5]


def test_without_waiting_only_what_there_is_room_for_is_kept(tmp_path):
    with TieredKVCache(config(tmp_path, device=16, host=64), LAYOUT) as cache:
        engine = Engine(cache)
        leases = [engine.pages._acquire(KEYS[start : start + 2]) for start in range(0, 16, 2) if engine.store(start, 2) == 2]
        at_once: Future[None] = Future()
        at_once.set_result(None)
        kept = engine.store(16, 8, at_once)
        assert kept == 0
        for lease in leases:
            lease.release()
        cache.settle()
        assert engine.store(16, 8, at_once) == 8
        cache.check_integrity()


@pytest.fixture
def stuck(monkeypatch):
    """The disks' file engines, the last one opened at the end: they stop reading and writing while their gate is closed."""
    engines: list[StuckEngine] = []

    def make(depth):
        engines.append(StuckEngine())
        return engines[-1]

    monkeypatch.setitem(probe._CANDIDATES, "direct", (make,))
    return engines


@contextmanager
def closed(engine):
    """Its gate is closed, at most until the end."""
    engine.gate.clear()
    try:
        yield
    finally:
        engine.gate.set()


def test_whoever_waits_for_room_behind_a_disk_that_is_stuck_can_stop_waiting(tmp_path, stuck):
    with TieredKVCache(config(tmp_path, device=16, disk=64), LAYOUT) as cache, ThreadPoolExecutor(1) as thread, closed(stuck[-1]):
        engine, enough = Engine(cache), Future[None]()
        storing = thread.submit(engine.store, 0, 40, enough)
        assert stuck[-1].waiting.wait(60)
        while engine.pages._asked_for_room is None:  # the disk may be stuck before there is no more room
            assert not storing.done()
            time.sleep(0.001)
        enough.set_result(None)
        assert storing.result(60) < 40
        assert engine.store(0, 40) < 40, "one question for room at a time"
        stuck[-1].gate.set()
        assert engine.pages._asked_for_room is not None
        assert engine.pages._asked_for_room.result(60)
        cache.settle()
        assert engine.store(0, 40) == 40
        cache.settle()
        cache.check_integrity()


def test_pages_in_memory_come_up_while_stores_wait_for_a_disk_that_is_stuck(tmp_path, stuck):
    with TieredKVCache(config(tmp_path, host=20, disk=64), LAYOUT) as cache, ThreadPoolExecutor(1) as thread, closed(stuck[-1]):
        engine, enough = Engine(cache), Future[None]()
        host, masks = cache._residency.tiers[1], dict[bytes, int]()
        assert engine.store(0, 12) == 12
        until(lambda: masks.update(engine.pages.changes()) or all(masks[key] & 0b10 for key in KEYS[:12]))
        assert engine.restore(12) == 12
        storing = thread.submit(engine.store, 12, 28, enough)
        until(lambda: host.free_slots == 0 and engine.pages._asked_for_room is not None and not engine.pages._asked_for_room.done())
        masks |= engine.pages.changes()
        assert [masks[key] for key in KEYS[:12]] == [0b10] * 12, "in host memory alone"
        for _ in range(3):
            came = engine.pages.restore(KEYS[:12], lambda positions, pages, layers: None, time.monotonic() + 20)
            assert came == 12
        assert not storing.done()
        enough.set_result(None)
        assert storing.result(60) < 28


def test_pages_in_memory_come_up_while_others_wait_for_a_disk_that_is_stuck(tmp_path, stuck):
    with TieredKVCache(config(tmp_path, host=64, disk=128), LAYOUT) as cache:
        Engine(cache).store(0, 30)
    with TieredKVCache(config(tmp_path, host=64, disk=128), LAYOUT) as cache:
        engine = Engine(cache)
        engine.store(30, 10)
        cache.settle()
        assert engine.pages.restore(KEYS[30:], lambda positions, pages, layers: None) == 10
        with closed(stuck[-1]):
            for start in range(0, 30, 6):
                assert engine.pages.restore(KEYS[start : start + 6], lambda positions, pages, layers: None, time.monotonic() + 0.05) == 0
            assert stuck[-1].waiting.is_set()
            came = engine.pages.restore([*KEYS[30:], *KEYS[:2]], lambda positions, pages, layers: None, time.monotonic() + 20)
            assert came == 10, "and what is not does not keep it waiting"
        cache.settle()
        assert engine.restore(40) == 40
        cache.check_integrity()


def test_a_restore_that_waits_for_no_disk_stops_before_pages_that_went_there(tmp_path, stuck):
    with TieredKVCache(config(tmp_path, host=64, disk=128, disk_policy="write_through"), LAYOUT) as cache:
        engine, residency, masks, handed = Engine(cache), cache._residency, dict[bytes, int](), list[int]()
        assert engine.store(0, 10) == 10
        until(lambda: masks.update(engine.pages.changes()) or all(masks[key] & 0b110 == 0b110 for key in KEYS[:10]))
        cache.settle()
        with residency.lock:
            for tier in range(2):
                residency.eviction.clear(residency.table.rows_of(KEYS[6:10]), tier)

        def hand_out(positions, pages, layers):
            handed.extend(positions)

        with closed(stuck[-1]):
            assert engine.pages.restore(KEYS[:10], hand_out, time.monotonic() + 60, only_near=True) == 6
        assert handed == list(range(6))
        assert engine.pages.any_far(KEYS[6:10])
        assert engine.restore(10) == 10
        cache.check_integrity()


def test_a_restore_ends_in_time_though_the_disk_is_stuck(tmp_path, stuck):
    with TieredKVCache(config(tmp_path, disk=64), LAYOUT) as cache:
        Engine(cache).store(0, 8)
    with TieredKVCache(config(tmp_path, disk=64), LAYOUT) as cache:
        engine = Engine(cache)
        with closed(stuck[-1]):
            assert engine.pages.restore(KEYS[:8], lambda positions, pages, layers: None, time.monotonic() + 0.1) == 0
        assert engine.restore(8) == 8
        cache.check_integrity()


def test_a_copy_that_fails_leaves_nothing_behind(tmp_path):
    def fail(*_):
        raise OSError("no")

    with TieredKVCache(config(tmp_path, host=64), LAYOUT) as cache:
        engine = Engine(cache)
        with pytest.raises(OSError, match="no"):
            engine.pages.store(KEYS[:3], ROOT, 0, fail)
        engine.store(0, 3)
        with pytest.raises(OSError, match="no"):
            engine.pages.restore(KEYS[:3], fail)
        assert engine.restore(3) == 3
        cache.check_integrity()
