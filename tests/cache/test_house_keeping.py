"""Laws checked: a job of house-keeping that keeps failing holds up no other one, and its log grows with the logarithm of time; pages that
should be written through and find their link full, or no slot below, are written through later."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from kvtier.residency import housekeeping
from kvtier.residency.housekeeping import MOST_REST_ROUNDS, RecurringJob
from tests.cache.rig import DEVICE, HOST, PAGE, counters, hold, make_cache, put, run, tiers_of


def test_what_stays_broken_is_tried_ever_less_often_and_traced_once(caplog):
    tried = []

    async def broken() -> None:
        tried.append(len(rounds))
        raise OSError(f"no {'memory' if len(tried) < 30 else 'room'}")

    job, rounds = RecurringJob("moving", broken), []

    async def go() -> None:
        for _ in range(36000):  # ten hours
            await job.round()
            rounds.append(1)

    with caplog.at_level(logging.ERROR):
        asyncio.run(go())
    assert tried[:5] == [0, 2, 6, 14, 30]
    assert len(caplog.records) == len(tried) < 36000 / MOST_REST_ROUNDS + 12
    assert [bool(record.exc_info) for record in caplog.records].count(True) == 2, "a trace for each new failure, not for each failure"


def test_what_works_again_is_done_every_round_and_said(caplog):
    broken, done = [True], []

    async def work() -> None:
        if broken:
            broken.pop()
            raise OSError("once")
        done.append(1)

    async def go() -> None:
        job = RecurringJob("moving", work)
        for _ in range(5):
            await job.round()

    with caplog.at_level(logging.WARNING):
        asyncio.run(go())
    assert len(done) == 3
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]


def test_a_disk_that_cannot_be_tidied_keeps_nothing_else_from_going_on(tmp_path, monkeypatch):
    """Before, the thresholds were not looked at any more while tidying or moving failed."""
    monkeypatch.setattr(housekeeping, "TIDY_EVERY_S", 0.01)
    with make_cache(tmp_path / "d", device_pages=8, host_pages=8, policy__cleanup_interval=0.001) as cache:
        put(cache, run(1, 4))
        cleaned = asyncio.Event()

        def fail() -> None:
            raise OSError("the disk is gone")

        async def clean_up() -> None:
            cleaned.set()

        monkeypatch.setattr(cache._residency.tiers[-1], "tidy", fail)
        monkeypatch.setattr(cache._residency.house, "clean_up", clean_up)
        assert cache._residency.mover.spawn(asyncio.wait_for(cleaned.wait(), 20)).result(30)
        monkeypatch.undo()


def test_pages_that_find_their_link_full_are_written_through_once_it_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(housekeeping, "TIDY_EVERY_S", 0.01)
    narrow: dict[str, Any] = {"mover__workers": 1, "mover__staging_bytes": 1, "mover__queue_bytes": 1}
    through: dict[str, Any] = {"host__write_policy": "write_through", "disk__write_policy": "write_through"}
    with make_cache(tmp_path / "d", device_pages=16, host_pages=16, disk_pages=16, **narrow, **through) as cache:
        put(cache, run(1, 12))
        until = time.monotonic() + 20
        while tiers_of(cache, run(1, 12)) != [{0, 1, 2}] * 12 and time.monotonic() < until:
            time.sleep(0.01)
        assert tiers_of(cache, run(1, 12)) == [{0, 1, 2}] * 12, "nobody used them again"
        assert counters(cache)["links"]["device->host"]["turned_away"] > 0
        cache.settle(20)
        cache.check_integrity()


def only_pinned_pages_in_host_memory(cache, tokens):
    """Put a sequence that fills the host tier and may not leave it: it is nowhere else, and pinned."""
    residency = cache._residency
    put(cache, tokens)
    cache.settle(20)
    with residency.lock:
        residency.eviction.clear(residency.table.rows_of(cache.lookup(tokens).keys), DEVICE)
    cache.pin(cache.lookup(tokens), tier="host")
    assert tiers_of(cache, tokens) == [{HOST}] * (len(tokens) // PAGE)


def test_pages_that_find_no_slot_are_counted_once_and_written_through_as_far_as_slots_become_free(tmp_path, monkeypatch):
    monkeypatch.setattr(housekeeping, "TIDY_EVERY_S", 0.01)
    with make_cache(tmp_path / "d", device_pages=16, host_pages=4, host__write_policy="write_through") as cache:
        residency = cache._residency

        def refused() -> dict[str, int]:
            return dict(counters(cache)["tiers"]["host"]["refused"])

        def after_some_time(wanted: list[set[int]]) -> list[set[int]]:
            end = time.monotonic() + 20
            while tiers_of(cache, run(2, 4)) != wanted and time.monotonic() < end:
                time.sleep(0.01)
            cache.settle(20)
            return tiers_of(cache, run(2, 4))

        only_pinned_pages_in_host_memory(cache, run(1, 4))
        put(cache, run(2, 4))
        cache.settle(20)
        assert tiers_of(cache, run(2, 4)) == [{DEVICE}] * 4
        assert refused() == {"no slot": 4}
        hold(cache, run(2, 4)).release()
        cache.settle(20)
        assert refused() == {"no slot": 4}, "the same pages, which ask again"

        pinned = residency.table.rows_of(cache.lookup(run(1, 4)).keys)
        cache.unpin(cache.lookup(run(1, 4)))
        for stay, come in ((2, 2), (0, 4)):
            with residency.lock:
                residency.eviction.clear(pinned[stay : stay + 2], HOST)
            wanted = [{DEVICE, HOST}] * come + [{DEVICE}] * (4 - come)
            assert after_some_time(wanted) == wanted, "as many as there is room for, prefixes first, and nobody used them again"
        assert refused() == {"no slot": 4}
        assert not residency.house._without_slot[DEVICE]
        cache.check_integrity()


def test_pages_that_wait_for_a_slot_and_leave_are_forgotten(monkeypatch):
    monkeypatch.setattr(housekeeping, "TIDY_EVERY_S", 0.01)
    with make_cache(device_pages=8, host_pages=4, host__write_policy="write_through") as cache:
        only_pinned_pages_in_host_memory(cache, run(1, 4))
        put(cache, run(2, 4))
        cache.settle(20)
        put(cache, run(3, 8))
        cache.settle(20)
        assert tiers_of(cache, run(2, 4)) == [set()] * 4, "out of the device for the next ones"
        waiting, end = cache._residency.house._without_slot[DEVICE], time.monotonic() + 20
        assert waiting
        cache.unpin(cache.lookup(run(1, 4)))
        cache.clear()
        while waiting and time.monotonic() < end:
            time.sleep(0.01)
        assert not waiting
        assert counters(cache)["tiers"]["host"]["pages_in"] == 4
        cache.check_integrity()
