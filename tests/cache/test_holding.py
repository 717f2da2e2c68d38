"""What leases and pins keep, and what attention may be reported for them, one promise a test."""

from __future__ import annotations

import numpy as np
import pytest

from kvtier.errors import LeaseError
from tests.cache.rig import (
    DEVICE,
    DISK,
    HOST,
    Clock,
    assert_right,
    counters,
    flip_in_host,
    grow,
    hold,
    kv_of,
    make_cache,
    push_out,
    put,
    run,
    tiers_of,
)


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
