"""Many callers at once, and the end of a cache while they are at work."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from typing import Any

import pytest

from kvtier.errors import Closed, StoreLocked
from tests.cache.rig import (
    HOST,
    LAYOUT,
    Gate,
    assert_right,
    counters,
    grow,
    hold,
    kvtier_threads,
    make_cache,
    push_out,
    put,
    run,
)


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
        lambda: lease.block_table,
        lambda: lease.layer(0),
        lambda: lease.slots(),
        lambda: lease.wait(),
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


def test_two_caches_on_one_store_do_not_mix(tmp_path):
    with make_cache(tmp_path / "store") as cache:
        before = sorted(kvtier_threads())
        with pytest.raises(StoreLocked):
            make_cache(tmp_path / "store")
        assert sorted(kvtier_threads()) == before
        assert put(cache, run(1, 2)) == 8
    make_cache(tmp_path / "store").close()


@pytest.mark.slow
@pytest.mark.parametrize("queue_bytes", [1, "64MiB"])
@pytest.mark.parametrize("host_pages", [None, 6])
def test_many_threads_neither_lock_up_nor_read_wrong_bytes(tmp_path, host_pages, queue_bytes):
    sequences = [[root * 100 + at // 8 for at in range(24)] for root in range(6)] + [[0] * 8 + [tail] * 16 for tail in range(6)]
    ends = time.monotonic() + 3
    failures: list[BaseException] = []
    counts = [0] * 4
    more: dict[str, Any] = {"mover__clean_pressure": 0.7, "mover__staging_bytes": 1, "mover__prefetch_budget_bytes": 3 * LAYOUT.page_bytes}
    more["mover__queue_bytes"] = queue_bytes
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


@pytest.mark.slow
def test_what_a_hint_brings_through_a_full_queue_can_be_put_meanwhile(tmp_path, pool):
    """The hint's transfers are small and mostly turned away, while the writer waits for those of its pages that are on their way."""
    narrow: dict[str, Any] = {"mover__queue_bytes": 1, "mover__staging_bytes": 1, "mover__workers": 2}
    with make_cache(tmp_path / "store", device_pages=64, host_pages=None, disk__write_policy="write_through", **narrow) as cache:
        sequences = [run(start, 24) for start in range(6)]
        for tokens in sequences:
            put(cache, tokens)
            cache.settle(20)
        residency = cache._residency
        for tokens in sequences * 20:
            with residency.lock:
                residency.eviction.vacate(residency.table.ready(0))
            hint = cache.prefetch(tokens, deadline=1.0)
            assert pool.submit(put, cache, tokens).result(20) == len(tokens)
            assert hint.wait(20)
            with hold(cache, tokens) as lease:
                assert_right(lease, tokens)
        assert counters(cache)["links"]["disk->device"]["turned_away"] > 0
        cache.settle(20)
        cache.check_integrity()
