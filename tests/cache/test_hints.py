"""Asking ahead: what fits, what tenants see of each other, and prefetches."""

from __future__ import annotations

import gc
import threading
import time
import weakref

from kvtier.mover.transfer import Priority
from tests.cache.rig import (
    HOST,
    LAYOUT,
    PAGE,
    Gate,
    assert_right,
    counters,
    hold,
    kv_of,
    make_cache,
    push_out,
    put,
    run,
)


def test_fits_counts_shared_prefixes_once_and_leased_pages_as_taken():
    with make_cache(device_pages=8) as cache:
        assert cache.fits([run(1, 4), run(2, 4)]) == 2
        assert cache.fits([run(1, 4), run(2, 5)]) == 1
        assert cache.fits([run(1, 9)]) == 0
        assert cache.fits([run(1, 4), [*run(1, 4), *run(2, 4)], run(1, 4)]) == 3, "a shared prefix takes room once"
        assert cache.fits([run(1, 3), run(2, 3)], new_tokens=4) == 2
        assert cache.fits([run(1, 3), run(2, 3)], new_tokens=5) == 1
        assert cache.fits([run(1, 3)[:-1]], new_tokens=1) == 1
        put(cache, run(1, 4))
        put(cache, run(2, 4))
        assert cache.fits([run(3, 8)]) == 1, "what nobody holds can make room"
        with hold(cache, run(1, 4)):
            assert cache.fits([run(3, 5)]) == 0
            assert cache.fits([run(3, 4)]) == 1
            assert cache.fits([[*run(1, 4), *run(3, 4)]]) == 1, "its prefix is held already"
            assert cache.fits([run(1, 4)], salt="b") == 1
            assert cache.fits([[*run(1, 4), *run(3, 1)]], salt="b") == 0


def test_fits_counts_a_leased_page_on_its_way_up_once(monkeypatch):
    with make_cache(device_pages=4) as cache:
        put(cache, run(1, 4))
        push_out(cache)
        gate = Gate(monkeypatch, cache._residency.tiers[HOST], "load")
        lease = cache.acquire(cache.lookup(run(1, 4)))
        assert gate.reached.wait(10)
        assert cache.fits([run(1, 4)]) == 1
        gate.open()
        lease.wait(20)
        lease.release()


def test_tenants_share_nothing(tmp_path):
    with make_cache(tmp_path / "store") as cache:
        put(cache, run(1, 2), "a")
        assert cache.lookup(run(1, 2)).tokens == cache.lookup(run(1, 2), "b").tokens == 0
        put(cache, run(1, 2), "b")
        for salt in ("a", "b"):
            with hold(cache, run(1, 2), salt) as lease:
                assert_right(lease, run(1, 2), salt)
                assert lease.tokens == 8


def test_a_prefetch_keeps_to_its_budget_and_is_counted():
    with make_cache(mover__prefetch_budget_bytes=2 * LAYOUT.page_bytes) as cache:
        put(cache, run(1, 4))
        push_out(cache)
        hint = cache.prefetch(run(1, 4))
        assert hint.wait(20)
        cache.settle(20)
        assert hint.pages == 2
        assert cache.lookup(run(1, 4)).pages_by_tier["device"] == 2
        expected = {"issued": 2, "in_time": 0, "late": 0, "wasted": 0, "over_budget": 2, "outranked": 0}
        assert counters(cache)["prefetch"] == expected
        again = cache.prefetch(run(1, 4))
        assert again.wait(20)
        assert again.pages == 0, "the budget is used up until the pages are"
        with hold(cache, run(1, 4)) as lease:
            assert_right(lease, run(1, 4))
        assert counters(cache)["prefetch"] == expected | {"in_time": 2, "over_budget": 4, "outranked": 0}
        assert counters(cache)["tiers"]["host"]["pages_served"] == 4, "prefetched pages count for the tier they came from"
        assert cache._residency.hinted.room == 2


def test_a_prefetch_that_is_late_or_wasted_is_counted_and_pays_its_budget_back(monkeypatch):
    with make_cache(mover__prefetch_budget_bytes=4 * LAYOUT.page_bytes) as cache:
        put(cache, run(1, 2))
        put(cache, run(2, 2))
        push_out(cache)
        gate = Gate(monkeypatch, cache._residency.tiers[HOST], "load")
        hint = cache.prefetch(run(1, 2))
        assert gate.reached.wait(10)
        lease = cache.acquire(cache.lookup(run(1, 2)))
        gate.open()
        assert hint.wait(20)
        lease.wait(20)
        assert_right(lease, run(1, 2))
        lease.release()
        assert counters(cache)["prefetch"] == {"issued": 2, "in_time": 0, "late": 2, "wasted": 0, "over_budget": 0, "outranked": 0}
        assert cache.prefetch(run(2, 2)).wait(20)
        push_out(cache, 700)
        push_out(cache, 600)
        assert counters(cache)["prefetch"] == {"issued": 4, "in_time": 0, "late": 2, "wasted": 2, "over_budget": 0, "outranked": 0}
        assert cache._residency.hinted.room == 4


def test_a_prefetch_past_its_deadline_or_cancelled_gives_up_and_a_request_still_gets_the_pages(monkeypatch):
    with make_cache(mover__workers=1, mover__staging_bytes=1) as cache:
        put(cache, run(1, 4))
        push_out(cache)
        gate = Gate(monkeypatch, cache._residency.tiers[HOST], "load")
        hint = cache.prefetch(run(1, 4), deadline=0.05)
        assert gate.reached.wait(10)
        time.sleep(0.2)
        hint.cancel()
        gate.open()
        assert hint.wait(20)
        cache.settle(20)
        assert cache.lookup(run(1, 4)).pages_by_tier["device"] == 1, "one had started"
        assert counters(cache)["prefetch"]["wasted"] == 3
        with hold(cache, run(1, 4)) as lease:
            assert lease.tokens == 16
            assert_right(lease, run(1, 4))
        assert cache._residency.hinted.room * LAYOUT.page_bytes == cache.config.mover.prefetch_budget_bytes


def test_a_request_is_not_hurt_by_a_hint_taken_back_at_the_same_time():
    with make_cache(host_pages=40, mover__workers=1, mover__staging_bytes=1) as cache:
        for _ in range(20):
            put(cache, run(1, 4))
            push_out(cache)
            push_out(cache, 700)
            hint = cache.prefetch(run(1, 4))
            canceller = threading.Thread(target=hint.cancel)
            canceller.start()
            with hold(cache, run(1, 4)) as lease:
                assert lease.tokens == 16
                assert_right(lease, run(1, 4))
            canceller.join(20)


def test_a_full_link_turns_transfers_away_visibly_and_loses_no_page():
    """Making room for a hint, or for a threshold, is never worth the last copy of a page."""
    with make_cache(device_pages=6, mover__workers=1, mover__staging_bytes=1, mover__queue_bytes=1) as cache:
        put(cache, run(1, 3))
        put(cache, run(2, 3))
        put(cache, run(3, 6))
        cache.settle(20)
        hint = cache.prefetch(run(1, 3))
        assert hint.wait(20)
        cache.settle(20)
        cache.check_integrity()
        for start, pages in ((1, 3), (2, 3), (3, 6)):
            assert cache.lookup(run(start, pages)).tokens == pages * PAGE
        assert counters(cache)["links"]["device->host"]["turned_away"] > 0


def test_priorities_are_in_the_order_of_their_numbers():
    assert sorted(Priority) == [Priority.DEMAND, Priority.PREFETCH, Priority.DEMOTION]


def test_fits_leaves_out_what_is_pinned_to_the_device():
    with make_cache(device_pages=4) as cache:
        put(cache, run(1, 4))
        assert cache.fits([run(500, 2)]) == 1
        cache.pin(cache.lookup(run(1, 4)), tier="device")
        assert cache.fits([run(500, 2)]) == 0
        assert cache.fits([run(1, 4)]) == 1


def test_a_hint_that_finds_no_room_goes_on_when_a_request_lets_go_of_its_pages():
    with make_cache(device_pages=8, host_pages=40) as cache:
        put(cache, run(1, 6))
        push_out(cache)
        with hold(cache, []) as lease:
            cache.append(lease, run(2, 6), kv_of(run(2, 6)))
            hint = cache.prefetch(run(1, 6))
            assert hint.wait(20)
            cache.settle(20)
            assert hint.pages == cache.lookup(run(1, 6)).pages_by_tier["device"] == 2, "what the lease leaves"
            assert counters(cache)["prefetch"]["outranked"] == 4
        cache.settle(20)
        assert hint.pages == cache.lookup(run(1, 6)).pages_by_tier["device"] == 6
        assert counters(cache)["prefetch"]["outranked"] == 0
        with hold(cache, run(1, 6)) as lease:
            assert_right(lease, run(1, 6))
        assert counters(cache)["prefetch"]["in_time"] == 6


def test_a_waiting_hint_gives_up_when_it_is_cancelled_at_its_deadline_or_for_newer_ones(monkeypatch):
    monkeypatch.setattr("kvtier.residency.hinted.MOST_WAITING", 2)
    with make_cache(device_pages=8, host_pages=40) as cache:
        for start in (1, 2, 3, 4):
            put(cache, run(start, 2))
        push_out(cache)
        with hold(cache, []) as lease:
            cache.append(lease, run(5, 8), kv_of(run(5, 8)))
            hints = [cache.prefetch(run(start, 2), deadline) for start, deadline in ((1, None), (2, 0.05), (3, None), (4, None))]
            assert all(hint.wait(20) for hint in hints)
            time.sleep(0.1)
            hints[3].cancel()
        cache.settle(20)
        assert [hint.pages for hint in hints] == [0, 0, 2, 0]


def test_a_hint_that_waits_for_room_beyond_its_deadline_brings_nothing():
    with make_cache(device_pages=8, host_pages=40) as cache:
        put(cache, run(1, 2))
        push_out(cache)
        with hold(cache, []) as lease:
            cache.append(lease, run(5, 8), kv_of(run(5, 8)))
            hint = cache.prefetch(run(1, 2), deadline=0.05)
            assert hint.wait(20)
            time.sleep(0.1)
        cache.settle(20)
        assert hint.pages == 0


def test_hints_that_are_too_late_give_their_places_to_those_that_are_not(monkeypatch):
    monkeypatch.setattr("kvtier.residency.hinted.MOST_WAITING", 2)
    with make_cache(device_pages=8, host_pages=40) as cache:
        for start in range(1, 7):
            put(cache, run(start, 2))
        push_out(cache)
        with hold(cache, []) as lease:
            cache.append(lease, run(9, 8), kv_of(run(9, 8)))
            patient = cache.prefetch(run(1, 2))
            assert patient.wait(20)
            for start in range(2, 7):
                assert cache.prefetch(run(start, 2), deadline=0.01).wait(20)
                time.sleep(0.03)
        cache.settle(20)
        assert patient.pages == 2


def test_a_hint_that_ended_is_remembered_by_nobody():
    with make_cache() as cache:
        hints = [weakref.ref(cache.prefetch(run(start, 3), deadline=3600.0)) for start in range(20)]
        cache.settle(20)
        gc.collect()
        assert [hint() for hint in hints] == [None] * 20


def test_a_hint_that_waits_does_not_keep_a_cache_from_closing():
    cache = make_cache(device_pages=4, host_pages=40)
    put(cache, run(1, 4))
    push_out(cache)
    lease = cache.begin()
    cache.append(lease, run(2, 4), kv_of(run(2, 4)))
    assert cache.prefetch(run(1, 4)).wait(20)
    cache.close()
    lease.release()


def test_pages_of_a_hint_are_brought_once_however_often_requests_end():
    with make_cache(device_pages=4, host_pages=40, mover__prefetch_budget_bytes=3 * LAYOUT.page_bytes) as cache:
        put(cache, run(1, 4))
        push_out(cache)
        hint = cache.prefetch(run(1, 4))
        assert hint.wait(20)
        assert hint.pages == 3
        for start in (600, 700, 800):
            push_out(cache, start)
        assert hint.pages == 4, "the last one came when the first three had left again"


def test_a_hint_goes_on_past_what_it_brought_itself():
    """What it brought first is by then the coldest on the device: it stays, and what the request left behind gives the room."""
    with make_cache(device_pages=8, host_pages=40) as cache:
        put(cache, run(1, 7))
        push_out(cache)
        with hold(cache, []) as lease:
            cache.append(lease, run(2, 4), kv_of(run(2, 4)))
            hint = cache.prefetch(run(1, 7))
            assert hint.wait(20)
            cache.settle(20)
            assert hint.pages == 4
            with hold(cache, run(2, 4)):
                pass
        cache.settle(20)
        assert hint.pages == cache.lookup(run(1, 7)).pages_by_tier["device"] == 7
        assert counters(cache)["prefetch"]["wasted"] == 0
