"""What the public face promises, one promise a test. Copies are without loss, so every comparison is bit by bit."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from kvtier.errors import Closed, LayoutError, LeaseError, StoreLocked, TransferFailed
from kvtier.mover.transfer import Priority
from kvtier.policy import nothing_protected
from tests.cache.rig import (
    DEEP,
    DEVICE,
    DISK,
    HOST,
    LAYOUT,
    PAGE,
    Clock,
    Gate,
    assert_right,
    flip_in_host,
    grow,
    hold,
    kv_of,
    kvtier_threads,
    make_cache,
    push_out,
    put,
    run,
    tiers_of,
)


def counters(cache):
    """`stats()` without what depends on the machine."""
    stats = cache.stats()
    for tier in stats["tiers"].values():
        tier.pop("achieved")
    return stats


def clean_up(cache):
    asyncio.run_coroutine_threadsafe(cache._residency.house.clean_up(), cache._residency.mover.loop).result(20)
    cache.settle(20)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(4) as threads:
        yield threads


# Looking and acquiring


def test_lookup_has_no_side_effects(tmp_path):
    with make_cache(tmp_path / "store") as cache:
        put(cache, run(1, 4))
        push_out(cache)
        before = counters(cache)
        order = cache._residency.policies[HOST].peek(99, nothing_protected, 0.0, 0.5).tolist()
        for _ in range(3):
            assert cache.lookup(run(1, 4)).tokens == 16
            assert cache.lookup(run(2, 4)).tokens == 0
        assert counters(cache) == before
        assert cache._residency.policies[HOST].peek(99, nothing_protected, 0.0, 0.5).tolist() == order


def test_lookup_says_where_and_at_what_cost(tmp_path):
    with make_cache(tmp_path / "store") as cache:
        put(cache, run(1, 4))
        push_out(cache)
        match = cache.lookup(run(1, 4))
        assert match.pages_by_tier == {"device": 0, "host": 4, "disk": 0}
        assert match.restore_bytes == 4 * LAYOUT.page_bytes
        assert match.restore_s is None, "nothing was measured yet"
        hold(cache, run(1, 4)).release()
        push_out(cache, 700)
        seconds = cache.lookup(run(1, 4)).restore_s
        assert seconds is not None
        assert seconds > 0


def test_acquire_returns_at_once_and_wait_times_out_and_goes_on(monkeypatch):
    with make_cache() as cache:
        put(cache, run(1, 4))
        push_out(cache)
        gate = Gate(monkeypatch, cache._residency.tiers[HOST], "load")
        lease = cache.acquire(cache.lookup(run(1, 4)))
        with pytest.raises(LeaseError):
            _ = lease.block_table
        with pytest.raises(TimeoutError):
            lease.wait(0.05)
        with pytest.raises(TimeoutError):
            lease.layer(0, 0.05)
        gate.open()
        assert len(lease.wait(20)) == 4
        assert_right(lease, run(1, 4))
        lease.release()


def test_ready_awaits_and_a_waiter_that_gives_up_harms_nobody(monkeypatch):
    with make_cache() as cache:
        put(cache, run(1, 4))
        push_out(cache)
        gate = Gate(monkeypatch, cache._residency.tiers[HOST], "load")
        lease = cache.acquire(cache.lookup(run(1, 4)))

        async def engine():
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(lease.ready(), 0.05)
            gate.open()
            return await lease.ready()

        assert len(asyncio.run(engine())) == 4
        assert_right(lease, run(1, 4))
        lease.release()
        cache.check_integrity()


def test_a_device_smaller_than_the_prefix_gives_a_shorter_lease(tmp_path):
    with make_cache(tmp_path / "store", device_pages=4) as cache:
        lease = hold(cache, [])
        put(cache, run(1, 4))
        tokens = run(1, 4) + run(2, 3)
        with hold(cache, run(1, 4)) as head:
            assert grow(cache, head, run(2, 3)) == 0, "the device is full of leased pages"
        cache.put(tokens, kv_of(tokens))
        small = hold(cache, run(1, 4))
        assert small.tokens == 16
        with make_cache(tmp_path / "other", device_pages=8) as other:
            put(other, run(3, 8))
        with make_cache(tmp_path / "other", device_pages=3) as other, hold(other, run(3, 8)) as short:
            assert other.lookup(run(3, 8)).tokens == 32
            assert short.tokens == 12
            assert_right(short, run(3, 8))
        small.release()
        lease.release()


def test_a_restore_that_fails_shortens_the_prefix_and_is_counted():
    with make_cache() as cache:
        put(cache, run(1, 4))
        push_out(cache)
        keys = cache.lookup(run(1, 4)).keys
        flip_in_host(cache, cache._residency.table.row(keys[2]))
        with hold(cache, run(1, 4)) as lease:
            assert lease.tokens == 8
            assert_right(lease, run(1, 4))
        cache.check_integrity()
        assert counters(cache)["tiers"]["host"]["refused"] == {"checksum": 1}
        assert cache.lookup(run(1, 4)).tokens == 8
        assert put(cache, run(1, 4)) == 16
        with hold(cache, run(1, 4)) as lease:
            assert_right(lease, run(1, 4))
            assert lease.tokens == 16


def test_two_acquires_of_the_same_cold_pages_cause_one_transfer(monkeypatch):
    with make_cache() as cache:
        put(cache, run(1, 4))
        push_out(cache)
        gate = Gate(monkeypatch, cache._residency.tiers[HOST], "load")
        leases = [cache.acquire(cache.lookup(run(1, 4))) for _ in range(3)]
        assert gate.reached.wait(10)
        leases.append(cache.acquire(cache.lookup(run(1, 4))))
        gate.open()
        for lease in leases:
            assert len(lease.wait(20)) == 4
            assert_right(lease, run(1, 4))
            lease.release()
        assert len({slot for slots in gate.slots for slot in slots}) == 4
        assert sum(map(len, gate.slots)) == 4


def test_two_acquires_that_both_wait_for_room_share_the_pages_and_both_get_them(monkeypatch):
    """The second request finds that the first one started the same restore while it waited: it must wait along, not give up."""
    with make_cache(device_pages=4) as cache:
        put(cache, run(1, 4))
        push_out(cache)
        residency = cache._residency
        stores, loads = Gate(monkeypatch, residency.tiers[HOST], "store"), Gate(monkeypatch, residency.tiers[HOST], "load", open_=True)
        first = cache.acquire(cache.lookup(run(1, 4)))
        assert stores.reached.wait(10)
        second = cache.acquire(cache.lookup(run(1, 4)))
        time.sleep(0.05)
        stores.open()
        for lease in (first, second):
            assert len(lease.wait(20)) == 4
            assert_right(lease, run(1, 4))
            lease.release()
        assert sum(map(len, loads.slots)) == 4


def test_a_lease_released_before_its_pages_came_leaks_nothing(monkeypatch):
    with make_cache() as cache:
        put(cache, run(1, 4))
        push_out(cache)
        gate = Gate(monkeypatch, cache._residency.tiers[HOST], "load")
        lease = cache.acquire(cache.lookup(run(1, 4)))
        assert gate.reached.wait(10)
        lease.release()
        cache.acquire(cache.lookup(run(1, 4))).release()
        gate.open()
        cache.check_integrity()
        assert counters(cache)["leased_pages"] == 0
        with hold(cache, run(1, 4)) as again:
            assert_right(again, run(1, 4))


# Layer by layer


def test_tokens_are_final_after_the_first_layer_asked_for_whichever_it_is():
    for layer in (0, 12):
        with make_cache(layout=DEEP) as cache:
            put(cache, run(1, 4))
            push_out(cache)
            flip_in_host(cache, cache._residency.table.row(cache.lookup(run(1, 4)).keys[1]))
            with cache.acquire(cache.lookup(run(1, 4))) as lease:
                lease.layer(layer, 20)
                assert lease.tokens == 4
                assert_right(lease, run(1, 4), layout=DEEP)


def test_a_restore_that_breaks_after_tokens_were_promised_raises_for_every_later_layer(monkeypatch):
    with make_cache(layout=DEEP) as cache:
        put(cache, run(1, 4))
        push_out(cache)
        gate = threading.Event()
        device = cache._residency.device
        scatter = device.scatter

        def breaking(slots, pages, layers=slice(None)):
            if layers.start:
                assert gate.wait(20)
                raise RuntimeError("the device fell off the bus")
            scatter(slots, pages, layers)

        monkeypatch.setattr("kvtier.mover.stage.layers_per_step", lambda *_: 6)
        monkeypatch.setattr(device, "memory", lambda: None)
        monkeypatch.setattr(device, "scatter", breaking)
        lease = cache.acquire(cache.lookup(run(1, 4)))
        lease.layer(0, 20)
        assert lease.tokens == 16
        gate.set()
        with pytest.raises(TransferFailed):
            lease.layer(12, 20)
        cache.settle(20)
        with pytest.raises(TransferFailed):
            lease.layer(12, 20)
        assert lease.tokens < 16
        lease.release()
        cache.check_integrity()


def test_a_restore_that_breaks_before_anything_was_promised_is_a_shorter_prefix(monkeypatch):
    with make_cache(layout=DEEP) as cache:
        put(cache, run(1, 4))
        push_out(cache)

        def breaking(slots, pages, layers=slice(None)):
            raise RuntimeError("the device fell off the bus")

        monkeypatch.setattr(cache._residency.device, "memory", lambda: None)
        monkeypatch.setattr(cache._residency.device, "scatter", breaking)
        with cache.acquire(cache.lookup(run(1, 4))) as lease:
            lease.layer(0, 20)
            assert lease.tokens == 0


# Holding


def test_leased_pages_are_never_evicted_or_moved():
    with make_cache() as cache:
        put(cache, run(1, 4))
        with hold(cache, run(1, 4)) as lease:
            table = lease.block_table.copy()
            for start in range(20, 30):
                put(cache, run(start, 8))
                assert (lease.block_table == table).all()
                assert_right(lease, run(1, 4))
            assert cache.lookup(run(1, 4)).pages_by_tier["device"] == 4
        push_out(cache)
        assert cache.lookup(run(1, 4)).pages_by_tier["device"] == 0


def test_pins_hold_until_they_expire_or_are_taken_back(tmp_path):
    clock = Clock()
    with make_cache(tmp_path / "store", host_pages=8, clock=clock) as cache:
        for start, pages in ((1, 2), (2, 2), (3, 2)):
            put(cache, run(start, pages))
        assert cache.pin(cache.lookup(run(1, 2)), ttl=10, tier="device") == 2
        assert cache.pin(cache.lookup(run(2, 2)), tier="host") == 2
        assert cache.pin(cache.lookup(run(9, 2))) == 0
        for start in range(20, 30):
            put(cache, run(start, 4))
            cache.settle(20)
        assert all(DEVICE in tiers for tiers in tiers_of(cache, run(1, 2)))
        assert all(tiers & {DEVICE, HOST} for tiers in tiers_of(cache, run(2, 2)))
        assert tiers_of(cache, run(3, 2)) == [{DISK}, {DISK}]
        clock.now += 11
        push_out(cache)
        assert not any(DEVICE in tiers for tiers in tiers_of(cache, run(1, 2)))
        cache.unpin(cache.lookup(run(2, 2)))
        for start in range(40, 50):
            put(cache, run(start, 4))
        cache.settle(20)
        assert tiers_of(cache, run(2, 2)) == [{DISK}, {DISK}]
        with pytest.raises(LeaseError, match="tape"):
            cache.pin(cache.lookup(run(2, 2)), tier="tape")


def test_a_pin_holds_above_its_tier_although_a_colder_copy_exists(tmp_path):
    with make_cache(tmp_path / "store", device_pages=4) as cache:
        put(cache, run(1, 2))
    with make_cache(tmp_path / "store", device_pages=4) as cache:
        hold(cache, run(1, 2)).release()
        assert tiers_of(cache, run(1, 2)) == [{DEVICE, DISK}] * 2
        cache.pin(cache.lookup(run(1, 2)), tier="host")
        push_out(cache)
        assert tiers_of(cache, run(1, 2)) == [{HOST, DISK}] * 2


def test_pinned_pages_only_the_device_has_may_leave_it_for_their_tier():
    with make_cache(device_pages=4) as cache:
        put(cache, run(1, 4))
        cache.pin(cache.lookup(run(1, 4)))
        assert put(cache, run(2, 4)) == 16
        assert tiers_of(cache, run(1, 4)) == [{HOST}] * 4


def test_pages_behind_a_lost_one_can_still_be_unpinned():
    with make_cache(host_pages=6) as cache:
        put(cache, run(1, 4))
        match = cache.lookup(run(1, 4))
        cache.pin(match)
        push_out(cache)
        flip_in_host(cache, cache._residency.table.row(match.keys[0]))
        hold(cache, run(1, 4)).release()
        cache.settle(20)
        assert cache.lookup(run(1, 4)).tokens == 0
        cache.unpin(match)
        for start in range(20, 30):
            put(cache, run(start, 8))
        cache.settle(20)
        assert tiers_of(cache, run(1, 4)) == [set()] * 4


# Growing


def test_appending_after_full_stores_nothing_until_the_lease_is_cut():
    with make_cache(device_pages=3, host_pages=8) as cache, cache.begin() as lease:
        assert grow(cache, lease, run(1, 3)[:10]) == 10
        with cache.fork(lease) as twin:
            assert grow(cache, twin, [7]) == 0, "the open page is shared and there is no page for a copy"
            assert twin.full
            assert not lease.full
        twin = cache.fork(lease)
        assert grow(cache, twin, [7]) == 0
        lease.release()
        assert grow(cache, twin, [8]) == 0, "token 7 was not taken, so what follows it cannot be"
        assert twin.tokens == 10
        cache.truncate(twin, 10)
        assert grow(cache, twin, run(1, 3)[10:]) == 2
        assert_right(twin, run(1, 3))
        twin.release()


def test_a_fork_of_an_open_page_is_copied_when_either_side_writes():
    with make_cache() as cache:
        lease = cache.begin()
        grow(cache, lease, [1, 2, 3, 4, 5, 6])
        twin = cache.fork(lease)
        assert (twin.block_table == lease.block_table).all()
        grow(cache, lease, [7])
        grow(cache, twin, [8, 9])
        assert_right(lease, [1, 2, 3, 4, 5, 6, 7])
        assert_right(twin, [1, 2, 3, 4, 5, 6, 8, 9])
        assert lease.block_table[0] == twin.block_table[0]
        assert lease.block_table[1] != twin.block_table[1]
        lease.release()
        twin.release()
        cache.check_integrity()
        assert cache.lookup([1, 2, 3, 4, 5, 6, 8, 9]).tokens == 8


def test_truncating_to_nothing_inside_and_on_the_edge_of_pages():
    tokens = run(1, 3)
    with make_cache() as cache:
        put(cache, tokens)
        for keep in (12, 11, 8, 6, 4, 1, 0):
            with hold(cache, tokens) as lease:
                cache.truncate(lease, keep)
                assert lease.tokens == keep
                assert_right(lease, tokens)
                assert grow(cache, lease, [7, 8, 9, 10, 11]) == 5
                assert_right(lease, [*tokens[:keep], 7, 8, 9, 10, 11])
                cache.truncate(lease, lease.tokens - 2)
                grow(cache, lease, [5, 6])
                assert_right(lease, [*tokens[:keep], 7, 8, 9, 5, 6])
            cache.check_integrity()
        with hold(cache, tokens) as lease:
            assert_right(lease, tokens)
            for wrong in (-1, 13):
                with pytest.raises(LeaseError):
                    cache.truncate(lease, wrong)


def test_truncating_inside_a_page_without_room_says_so_and_changes_nothing():
    with make_cache(device_pages=3) as cache:
        put(cache, run(1, 3))
        with hold(cache, run(1, 3)) as lease:
            with pytest.raises(LeaseError, match="free device page"):
                cache.truncate(lease, 6)
            assert_right(lease, run(1, 3))
            assert lease.tokens == 12
            cache.truncate(lease, 8)


def test_a_released_lease_is_of_no_use_and_can_be_released_again():
    with make_cache() as cache:
        put(cache, run(1, 2))
        lease = hold(cache, run(1, 2))
        lease.release()
        lease.release()
        uses = [lease.wait, lambda: lease.block_table, lambda: lease.layer(0), lease.slots, lambda: cache.fork(lease)]
        uses += [
            lambda: cache.truncate(lease, 0),
            lambda: grow(cache, lease, [1]),
            lambda: cache.put(run(3, 1), kv_of(run(3, 1)), after=lease),
        ]
        for use in uses:
            with pytest.raises(LeaseError, match="released"):
                use()
        cache.check_integrity()


def test_attention_for_a_released_lease_is_counted_and_touches_no_other_page():
    with make_cache(policy__name="a2cr-classic") as cache:
        lease = cache.begin()
        grow(cache, lease, [1, 2])
        lease.release()
        put(cache, run(5, 2))
        cache.record_attention(lease, [1.0])
        assert counters(cache)["attention_ignored"] == 1
        table = cache._residency.table
        assert np.isnan(table.attention[: table.rows]).all()


def test_attention_values_that_make_no_sense_are_counted_and_ignored():
    with make_cache(policy__name="a2cr-classic") as cache:
        put(cache, run(1, 5))
        with hold(cache, run(1, 5)) as lease:
            cache.record_attention(lease, [0.5, float("nan"), -0.1, 1.1, float("inf")])
            assert counters(cache)["attention_ignored"] == 4
            with pytest.raises(LeaseError):
                cache.record_attention(lease, [0.5])


def test_put_shares_pages_that_are_there():
    with make_cache() as cache:
        assert put(cache, run(1, 2)) == 8
        assert put(cache, run(1, 2)) == 8
        longer = [*run(1, 2), 1, 2, 3, 4, 5]
        assert put(cache, longer) == 12, "the last, partial page is not kept"
        assert counters(cache)["tiers"]["device"]["pages"] == counters(cache)["tiers"]["device"]["pages_in"] == 3
        with hold(cache, run(1, 2)) as lease:
            assert cache.put([1, 2, 3, 4], kv_of(longer)[:, :, 8:12], after=lease) == 4
            assert_right(lease, longer)
            grow(cache, lease, [5])
            with pytest.raises(LeaseError, match="append"):
                cache.put([6, 7, 8, 9], kv_of([6, 7, 8, 9]), after=lease)
        assert cache.put([1, 2], kv_of([1, 2])) == 0
        assert cache.put([], kv_of([])) == 0
        cache.check_integrity()


def test_sealing_a_page_that_is_on_its_way_up_waits_for_what_becomes_of_it(pool, monkeypatch):
    """Its restore fails here: the sealed page must be the engine's own, not a lease on a copy that never came."""
    with make_cache() as cache:
        put(cache, run(1, 1))
        push_out(cache)
        flip_in_host(cache, cache._residency.table.row(cache.lookup(run(1, 1)).keys[0]))
        writer = cache.begin()
        grow(cache, writer, run(1, 1)[:3])
        gate = Gate(monkeypatch, cache._residency.tiers[HOST], "load")
        reader = cache.acquire(cache.lookup(run(1, 1)))
        assert gate.reached.wait(10)
        done = pool.submit(grow, cache, writer, run(1, 1)[3:])
        time.sleep(0.1)
        gate.open()
        assert done.result(20) == 1
        cache.settle(20)
        assert_right(writer, run(1, 1))
        reader.wait(20)
        assert_right(reader, run(1, 1))
        writer.release()
        reader.release()
        cache.check_integrity()


def test_sealing_a_page_that_is_being_copied_down_keeps_it(pool, monkeypatch):
    with make_cache(device_pages=3) as cache:
        put(cache, run(1, 1))
        writer = cache.begin()
        grow(cache, writer, run(1, 1)[:3])
        gate = Gate(monkeypatch, cache._residency.tiers[HOST], "store")
        other = pool.submit(put, cache, run(2, 2))
        assert gate.reached.wait(10)
        assert grow(cache, writer, run(1, 1)[3:]) == 1
        gate.open()
        assert other.result(20) in (4, 8)
        assert_right(writer, run(1, 1))
        cache.check_integrity()
        writer.release()
        cache.check_integrity()


# Asking ahead


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
        assert counters(cache)["prefetch"] == expected | {"in_time": 2, "over_budget": 4}
        assert counters(cache)["tiers"]["host"]["pages_served"] == 4, "prefetched pages count for the tier they came from"
        assert cache._residency.prefetch_room == 2


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
        assert cache._residency.prefetch_room == 4


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
        assert cache._residency.prefetch_room * LAYOUT.page_bytes == cache.config.mover.prefetch_budget_bytes


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


# When copies are written


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


def test_a_page_whose_first_row_was_a_hollow_one_can_be_stored_again(tmp_path):
    """Page 0 is lost on disk, page 1 is found: page 0 gets a row as a missing parent, and later its own copy and its own parent key."""
    with make_cache(tmp_path / "store", host_pages=None) as cache:
        put(cache, run(1, 2))
        cache.flush()
        first = cache._residency.table.row(cache.lookup(run(1, 2)).keys[0])
        cache._residency.mover.spawn(forget(cache, first)).result(10)
        cache._residency.mover.spawn(cache._residency.mover.work(cache._residency.tiers[1].tidy)).result(10)  # type: ignore[attr-defined]
        cache.close(flush=False)
    with make_cache(tmp_path / "store", host_pages=None) as cache:
        assert cache.lookup(run(1, 2)).tokens == 0
        put(cache, run(1, 1))
        cache.flush()
        assert tiers_of(cache, run(1, 2)) == [{0, 1}, {1}]
        cache.check_integrity()
    with make_cache(tmp_path / "store", host_pages=None) as cache, hold(cache, run(1, 2)) as lease:
        assert lease.tokens == 8
        assert_right(lease, run(1, 2))


async def forget(cache, row):
    with cache._residency.lock:
        cache._residency.forget(row, 1, "a test")
        cache._residency.forget(row, 0, "a test")


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


# Errors and the end


def test_kv_of_another_shape_or_dtype_is_refused_before_anything_is_written():
    with make_cache() as cache:
        tokens = run(1, 2)
        good = kv_of(tokens)
        for wrong in (good[:1], good[:, :1], good[:, :, :-1], good[..., :-1], good.to(torch.float16), good.double()):
            with pytest.raises(LayoutError, match="kv"):
                cache.put(tokens, wrong)
            with cache.begin() as lease, pytest.raises(LayoutError):
                cache.append(lease, tokens, wrong)
        assert counters(cache)["pages"] == 0


def test_everything_but_close_and_release_says_closed_after_close(tmp_path):
    cache = make_cache(tmp_path / "store")
    put(cache, run(1, 2))
    match = cache.lookup(run(1, 2))
    lease = cache.acquire(match)
    open_lease = cache.begin()
    grow(cache, open_lease, [1, 2])
    cache.close()
    cache.close()
    uses = [
        lambda: cache.lookup([1]),
        lambda: cache.acquire(match),
        lambda: cache.begin(),
        lambda: put(cache, run(1, 2)),
        lambda: grow(cache, lease, [1]),
        lambda: grow(cache, open_lease, [1]),
        lambda: cache.fork(lease),
        lambda: cache.truncate(lease, 4),
        lambda: cache.prefetch([1]),
        lambda: cache.record_attention(lease, [0.1, 0.1]),
        lambda: cache.pin(match),
        lambda: cache.unpin(match),
        lambda: cache.fits([[1]]),
        cache.stats,
        cache.settle,
        cache.flush,
        cache.clear,
        cache.check_integrity,
    ]
    for use in uses:
        with pytest.raises(Closed):
            use()
    lease.release()
    open_lease.release()


def test_close_while_restores_hints_and_copies_are_under_way_ends_everything(tmp_path, pool, monkeypatch):
    cache = make_cache(tmp_path / "store", mover__workers=1, mover__staging_bytes=1, mover__clean_pressure=0.3)
    put(cache, run(1, 6))
    push_out(cache)
    host = cache._residency.tiers[HOST]
    gate = Gate(monkeypatch, host, "load")
    lease = cache.acquire(cache.lookup(run(1, 6)))
    hint = cache.prefetch(run(1, 6))
    assert gate.reached.wait(10)
    closed = pool.submit(cache.close)
    time.sleep(0.1)
    gate.open()
    closed.result(20)
    assert lease.restored.result(5) is None
    assert hint.wait(5)
    lease.release()
    assert kvtier_threads() == []


def test_settling_waits_for_all_and_not_for_others_who_settle(pool, monkeypatch):
    with make_cache() as cache:
        put(cache, run(1, 4))
        push_out(cache)
        gate = Gate(monkeypatch, cache._residency.tiers[HOST], "load")
        lease = cache.acquire(cache.lookup(run(1, 4)))
        with pytest.raises(TimeoutError):
            cache.settle(0.05)
        settled = [pool.submit(cache.settle) for _ in range(3)]
        time.sleep(0.05)
        assert not any(future.done() for future in settled)
        gate.open()
        for future in settled:
            future.result(10)
        assert lease.restored.done()
        lease.release()


@pytest.mark.slow
def test_closing_under_load_leaves_nobody_waiting(tmp_path):
    for attempt in range(20):
        cache = make_cache(tmp_path / "store", host_pages=6, disk_pages=20, mover__staging_bytes=1)

        def engine(number, cache=cache):
            with contextlib.suppress(Exception):  # Closed, or whatever a tier that goes away in the middle of a call says
                for at in itertools.count(number):
                    put(cache, run(at % 9, 4))
                    hold(cache, run((at + 4) % 9, 4)).release()
                    cache.prefetch(run((at + 2) % 9, 4))
                    cache.settle()

        threads = [threading.Thread(target=engine, args=(number,), daemon=True) for number in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.01 + 0.002 * attempt)
        cache.close()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
    assert kvtier_threads() == []


def test_stats_has_the_keys_that_are_documented(tmp_path):
    with make_cache(tmp_path / "store") as cache:
        put(cache, run(1, 4))
        push_out(cache)
        hold(cache, run(1, 4)).release()
        stats = cache.stats()
        assert set(stats) >= {
            "layout",
            "policy",
            "tiers",
            "links",
            "prefetch",
            "lookups",
            "tokens_asked",
            "attention_ignored",
            "pages",
            "leased_pages",
        }
        assert set(stats["tiers"]) == {"device", "host", "disk"}
        for tier in stats["tiers"].values():
            wanted = {"format", "capacity_bytes", "bytes_used", "pressure", "pages", "pages_in", "pages_served", "hit_tokens"}
            assert set(tier) >= wanted | {"pages_recovered", "evicted", "refused", "achieved"}
        for link in stats["links"].values():
            assert set(link) >= {"transfers", "pages", "bytes", "seconds", "gb_per_s"}
        assert stats["links"]["host->device"]["pages"] == 4
        assert stats["lookups"] == 1
        assert stats["tokens_asked"] == 16
        assert stats["tiers"]["host"]["hit_tokens"] == 16


def test_stats_does_not_hold_the_lock_while_it_asks_the_machine(pool, monkeypatch):
    with make_cache() as cache:
        host = cache._residency.tiers[HOST]
        asked, go_on = threading.Event(), threading.Event()
        report = host.report

        def slow_report():
            asked.set()
            assert go_on.wait(20)
            return report()

        monkeypatch.setattr(host, "report", slow_report)
        stats = pool.submit(cache.stats)
        assert asked.wait(10)
        assert pool.submit(put, cache, run(1, 2)).result(5) == 8
        go_on.set()
        stats.result(20)


def test_two_caches_on_one_store_do_not_mix(tmp_path):
    with make_cache(tmp_path / "store") as cache:
        before = sorted(kvtier_threads())
        with pytest.raises(StoreLocked):
            make_cache(tmp_path / "store")
        assert sorted(kvtier_threads()) == before
        assert put(cache, run(1, 2)) == 8
    make_cache(tmp_path / "store").close()


@pytest.mark.slow
@pytest.mark.parametrize("host_pages", [None, 6])
def test_many_threads_neither_lock_up_nor_read_wrong_bytes(tmp_path, host_pages):
    sequences = [[root * 100 + at // 8 for at in range(24)] for root in range(6)] + [[0] * 8 + [tail] * 16 for tail in range(6)]
    ends = time.monotonic() + 3
    failures: list[BaseException] = []
    counts = [0] * 4
    more: dict[str, Any] = {"mover__clean_pressure": 0.7, "mover__staging_bytes": 1, "mover__prefetch_budget_bytes": 3 * LAYOUT.page_bytes}
    cache = make_cache(tmp_path / "store", device_pages=26, host_pages=host_pages, disk_pages=20, **more)

    def engine(number):
        chance = random.Random(number)
        try:
            while time.monotonic() < ends:
                tokens = chance.choice(sequences)
                what = chance.random()
                if what < 0.2:
                    put(cache, tokens)
                elif what < 0.3:
                    hint = cache.prefetch(tokens)
                    if chance.random() < 0.5:
                        hint.cancel()
                elif what < 0.35:
                    cache.acquire(cache.lookup(tokens)).release()
                else:
                    with hold(cache, tokens) as lease:
                        assert_right(lease, tokens)
                        rest = tokens[lease.tokens :]
                        taken = sum(grow(cache, lease, [token]) for token in rest) if chance.random() < 0.5 else grow(cache, lease, rest)
                        assert_right(lease, tokens)
                        assert lease.full or taken == len(rest)
                        cache.record_attention(lease, [chance.random()] * lease.pages)
                        with cache.fork(lease) as twin:
                            grow(cache, twin, [999, number])
                            assert_right(lease, tokens)
                counts[number] += 1
        except BaseException as error:  # noqa: BLE001 - shown by the assertion below
            failures.append(error)

    threads = [threading.Thread(target=engine, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "locked up"
    if failures:
        raise failures[0]
    assert min(counts) > 0
    cache.check_integrity()
    assert counters(cache)["leased_pages"] == 0
    cache.close()
    assert kvtier_threads() == []


def test_priorities_are_in_the_order_of_their_numbers():
    assert sorted(Priority) == [Priority.DEMAND, Priority.PREFETCH, Priority.DEMOTION]


def test_nothing_is_written_behind_a_prefix_whose_length_is_not_known_yet(tmp_path):
    with make_cache(tmp_path / "store") as cache:
        put(cache, run(1, 4))
        push_out(cache)
        more = run(1, 5)[16:]
        lease = cache.acquire(cache.lookup(run(1, 4)))
        with pytest.raises(LeaseError, match="not final yet"):
            cache.append(lease, more, kv_of(run(1, 5))[:, :, 16:])
        lease.wait()
        assert cache.append(lease, more, kv_of(run(1, 5))[:, :, 16:]) == 4
        lease.release()


@pytest.mark.parametrize(
    "tokens", [[9.9] * 4, np.zeros((2, 4), np.int64), np.array([2**63] * 4, np.uint64), [None] * 4, "abcd", [2**70] * 4]
)
def test_what_is_no_flat_sequence_of_whole_numbers_is_refused_and_leaves_nothing(tokens):
    with make_cache() as cache:
        for use in (cache.lookup, cache.prefetch, lambda ids: cache.put(ids, kv_of([1, 2, 3, 4])), lambda ids: cache.fits([ids])):
            with pytest.raises(LayoutError, match="whole numbers"):
                use(tokens)
        assert cache.stats()["pages"] == 0


def test_a_lease_of_another_cache_is_refused():
    with make_cache() as cache, make_cache() as other:
        lease = other.begin()
        uses = [
            lambda: cache.append(lease, [1], kv_of([1])),
            lambda: cache.put([1, 2, 3, 4], kv_of([1, 2, 3, 4]), after=lease),
            lambda: cache.truncate(lease, 0),
            lambda: cache.fork(lease),
            lambda: cache.record_attention(lease, []),
        ]
        for use in uses:
            with pytest.raises(LeaseError, match="another cache"):
                use()
        lease.release()


@pytest.mark.parametrize("index", [-1, 99])
def test_a_layer_the_model_does_not_have_is_refused(index):
    with make_cache() as cache:
        put(cache, run(1, 2))
        with hold(cache, run(1, 2)) as lease, pytest.raises(LeaseError, match="has layers 0 to"):
            lease.layer(index)


def test_fits_leaves_out_what_is_pinned_to_the_device():
    with make_cache(device_pages=4) as cache:
        put(cache, run(1, 4))
        assert cache.fits([run(500, 2)]) == 1
        cache.pin(cache.lookup(run(1, 4)), tier="device")
        assert cache.fits([run(500, 2)]) == 0
        assert cache.fits([run(1, 4)]) == 1
