"""What the public face promises whoever writes: appending, forking, truncating and sealing, one promise a test. Copies are without loss, so
every comparison is bit by bit.
"""

from __future__ import annotations

import time
from concurrent.futures import Future

import pytest
import torch

from kvtier.errors import LeaseError
from tests.cache.rig import (
    HOST,
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
    tiers_of,
    until,
)


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
        cache._residency.eviction.forget(row, 1, "a test")
        cache._residency.eviction.forget(row, 0, "a test")


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


def test_kv_that_wants_gradients_is_kept_without_them():
    """Else the pool would keep all that the engine's model computed alive, append by append."""
    with make_cache() as cache, cache.begin() as lease:
        tokens = run(1, 2)
        kv = kv_of(tokens).requires_grad_() * 1
        for start, stop in ((0, 3), (3, 4), (4, 8)):
            assert cache.append(lease, tokens[start:stop], kv[:, :, start:stop]) == stop - start
            assert not lease.layer(0).requires_grad
        assert_right(lease, tokens)


def test_a_cache_that_was_made_in_inference_mode_works_outside_of_it_and_on_its_threads():
    with torch.inference_mode():
        cache = make_cache(attention__digest_bytes=1 << 16, host__format="q8")
    with cache:
        with cache.begin() as lease:
            assert grow(cache, lease, run(1, 2)[:6]) == 6
            assert grow(cache, lease, run(1, 2)[6:]) == 2
            cache.record_queries(lease, 0, kv_of([5])[0, 0].requires_grad_())
        push_out(cache)
        with hold(cache, run(1, 2)) as lease, torch.inference_mode():
            assert lease.tokens == 8
            assert grow(cache, lease, [7]) == 1
        cache.check_integrity()


def test_a_writer_that_is_interrupted_while_it_waits_for_room_leaves_no_page_held_and_no_slot_taken(monkeypatch):
    with make_cache(host_pages=32) as cache:
        put(cache, run(1, 8))
        residency = cache._residency
        gate = Gate(monkeypatch, residency.tiers[HOST], "store")
        spawn = residency.mover.spawn

        def spawn_and_interrupt(job):
            asked = spawn(job)
            results = iter([KeyboardInterrupt])

            def result(timeout=None):
                for interrupted in results:
                    raise interrupted
                return Future.result(asked, timeout)

            monkeypatch.setattr(asked, "result", result)
            return asked

        monkeypatch.setattr(residency.mover, "spawn", spawn_and_interrupt)
        with pytest.raises(KeyboardInterrupt):
            put(cache, run(1, 2) + run(5, 3))
        monkeypatch.setattr(residency.mover, "spawn", spawn)
        assert counters(cache)["leased_pages"] == 0
        gate.open()
        until(lambda: residency.device.used_slots == len(residency.policies[0]) == 5)
        cache.settle(20)
        cache.check_integrity()
        assert put(cache, run(6, 8)) == len(run(6, 8))
