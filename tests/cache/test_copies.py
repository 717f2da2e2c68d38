"""When copies are written to colder tiers and when they go, by write policy, threshold, flush and clear."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from kvtier.formats.economy import StageEconomy
from tests.cache.rig import (
    DEVICE,
    DISK,
    HOST,
    LAYOUT,
    Clock,
    Gate,
    assert_right,
    clean_up,
    counters,
    hold,
    kv_of,
    make_cache,
    push_out,
    put,
    run,
    tiers_of,
)


def test_write_through_copies_at_commit(tmp_path):
    with make_cache(tmp_path / "store", host__write_policy="write_through", disk__write_policy="write_through") as cache:
        put(cache, run(1, 3))
        cache.settle(20)
        assert tiers_of(cache, run(1, 3)) == [{DEVICE, HOST, DISK}] * 3


def test_write_back_copies_at_eviction():
    with make_cache() as cache:
        put(cache, run(1, 8))
        cache.settle(20)
        assert tiers_of(cache, run(1, 8)) == [{DEVICE}] * 8
        put(cache, run(2, 2))
        assert tiers_of(cache, run(1, 8)) == [{DEVICE}] * 6 + [{HOST}] * 2


def test_write_back_cleans_ahead_above_clean_pressure():
    with make_cache(mover__clean_pressure=0.5) as cache:
        put(cache, run(1, 4))
        cache.settle(20)
        assert tiers_of(cache, run(1, 4)) == [{DEVICE}] * 4
        put(cache, run(2, 2))
        cache.settle(20)
        assert tiers_of(cache, run(1, 4)) == [{DEVICE}] * 2 + [{DEVICE, HOST}] * 2
        evicted = counters(cache)["tiers"]["device"]["evicted"]
        assert evicted == {}


def test_selective_copies_at_the_use_asked_for_and_drops_below_it():
    with make_cache(host__write_policy="write_through_selective", host__selective_uses=3) as cache:
        put(cache, run(1, 2))
        put(cache, run(2, 2))
        hold(cache, run(1, 2)).release()
        cache.settle(20)
        assert tiers_of(cache, run(1, 2)) == [{DEVICE}] * 2
        hold(cache, run(1, 2)).release()
        cache.settle(20)
        assert tiers_of(cache, run(1, 2)) == [{DEVICE, HOST}] * 2
        hold(cache, run(2, 2)).release()
        push_out(cache)
        assert tiers_of(cache, run(1, 2)) == [{HOST}] * 2
        assert tiers_of(cache, run(2, 2)) == [set()] * 2
        assert counters(cache)["tiers"]["device"]["evicted"]["not admitted below"] == 2


def test_selective_on_disk_copies_at_the_use_asked_for_also_from_the_host(tmp_path):
    with make_cache(tmp_path / "store", disk__write_policy="write_through_selective", disk__selective_uses=2) as cache:
        put(cache, run(1, 2))
        push_out(cache)
        assert tiers_of(cache, run(1, 2)) == [{HOST}] * 2
        hold(cache, run(1, 2)).release()
        cache.settle(20)
        assert tiers_of(cache, run(1, 2)) == [{DEVICE, HOST, DISK}] * 2


def test_selective_lets_pinned_pages_in():
    with make_cache(host__write_policy="write_through_selective", host__selective_uses=9) as cache:
        put(cache, run(1, 2))
        cache.pin(cache.lookup(run(1, 2)))
        push_out(cache)
        assert tiers_of(cache, run(1, 2)) == [{HOST}] * 2


def test_the_threshold_moves_cold_pages_down_but_drops_no_last_copy_while_there_is_room(tmp_path):
    clock = Clock()
    with make_cache(tmp_path / "store", clock=clock, policy__name="a2cr-classic", policy__attention_weight=0.0) as cache:
        put(cache, run(1, 4))
        clean_up(cache)
        assert tiers_of(cache, run(1, 4)) == [{DEVICE}] * 4, "fresh pages score high"
        for _ in range(6):
            clock.now += 1000
            clean_up(cache)
        assert tiers_of(cache, run(1, 4)) == [{DISK}] * 4
        with hold(cache, run(1, 4)) as lease:
            assert_right(lease, run(1, 4))
        cache.check_integrity()


def test_the_threshold_drops_no_page_that_the_tier_below_does_not_admit_while_there_is_room():
    clock = Clock()
    lowly: dict[str, Any] = {"policy__name": "a2cr-classic", "policy__attention_weight": 0.0}
    selective: dict[str, Any] = {"host__write_policy": "write_through_selective", "host__selective_uses": 9}
    with make_cache(clock=clock, mover__clean_pressure=0.7, **lowly, **selective) as cache:
        put(cache, run(1, 4))
        clock.now += 1000
        clean_up(cache)
        assert tiers_of(cache, run(1, 4)) == [{DEVICE}] * 4
        put(cache, run(2, 4))
        clock.now += 1000
        for _ in range(9):
            clean_up(cache)
        assert counters(cache)["tiers"]["device"]["pages"] < 8, "without room they go"
        cache.check_integrity()


def test_the_threshold_loses_nothing_to_a_full_queue():
    clock = Clock()
    lowly: dict[str, Any] = {"policy__name": "a2cr-classic", "policy__attention_weight": 0.0}
    with make_cache(clock=clock, **lowly, mover__workers=1, mover__staging_bytes=1, mover__queue_bytes=1) as cache:
        put(cache, run(1, 6))
        clock.now += 1000
        clean_up(cache)
        cache.check_integrity()
        assert cache.lookup(run(1, 6)).tokens == 24


def test_flush_waits_for_copies_that_others_are_writing(tmp_path, pool, monkeypatch):
    with make_cache(tmp_path / "store", host_pages=None, disk__write_policy="write_through") as cache:
        gate = Gate(monkeypatch, cache._residency.tiers[1], "store")
        put(cache, run(1, 2))
        assert gate.reached.wait(10)
        flushed = pool.submit(cache.flush)
        time.sleep(0.1)
        assert not flushed.done()
        gate.open()
        flushed.result(20)
        assert tiers_of(cache, run(1, 2)) == [{0, 1}] * 2


def test_close_writes_what_is_still_queued(tmp_path, pool, monkeypatch):
    more: dict[str, Any] = {"host_pages": None, "disk__write_policy": "write_through", "mover__workers": 1, "mover__staging_bytes": 1}
    cache = make_cache(tmp_path / "store", **more)
    gate = Gate(monkeypatch, cache._residency.tiers[1], "store")
    put(cache, run(1, 6))
    assert gate.reached.wait(10)
    closed = pool.submit(cache.close)
    time.sleep(0.1)
    gate.open()
    closed.result(20)
    with make_cache(tmp_path / "store", **more) as cache, hold(cache, run(1, 6)) as lease:
        assert lease.tokens == 24
        assert_right(lease, run(1, 6))


def test_clear_drops_everything_nobody_holds_on_disk_too(tmp_path):
    with make_cache(tmp_path / "store", host__write_policy="write_through", disk__write_policy="write_through") as cache:
        put(cache, run(1, 2))
        put(cache, run(2, 2))
        lease = hold(cache, run(2, 1))
        cache.clear()
        assert cache.lookup(run(1, 2)).tokens == 0
        assert cache.lookup(run(2, 2)).tokens == 4
        assert_right(lease, run(2, 1))
        lease.release()
        assert cache.clear() > 0
        cache.check_integrity()
        assert counters(cache)["pages"] == 0
    with make_cache(tmp_path / "store") as cache:
        assert counters(cache)["pages"] == 0


@pytest.mark.parametrize(("compress", "smaller"), [("always", True), ("auto", False)])
def test_the_byte_stage_of_the_disk_rests_when_it_may_and_does_not_pay(tmp_path, monkeypatch, compress, smaller):
    monkeypatch.setattr(StageEconomy, "compress_next", property(lambda economy: False))
    with make_cache(tmp_path / "store", host_pages=None, disk__write_policy="write_through", disk__compress=compress) as cache:
        with cache.begin() as lease:
            cache.append(lease, run(1, 4), torch.zeros(kv_of(run(1, 4)).shape))
        cache.settle(20)
        moved = counters(cache)["links"]["device->disk"]["bytes"]
        assert (moved < LAYOUT.page_bytes) is smaller
