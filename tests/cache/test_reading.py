"""What the public face promises whoever looks for a prefix, waits for it and reads it, one promise a test. Copies are without loss, so
every comparison is bit by bit.
"""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from kvtier.errors import LeaseError, TransferFailed
from kvtier.policy import nothing_protected
from tests.cache.rig import (
    DEEP,
    HOST,
    LAYOUT,
    Gate,
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
)

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
