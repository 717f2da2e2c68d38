"""Restoring is a priced choice: what is slower to bring up than to compute again stays where it is, and is said to."""

from __future__ import annotations

import math

import pytest

from kvtier.errors import LeaseError
from tests.cache.rig import HOST, Gate, assert_right, hold, make_cache, push_out, put, run

PAGES = 6


def cold(cache, start, restores=3):
    """A sequence that is only below the device, after a few restores of others from there."""
    for number in range(restores):
        put(cache, run(start + 1 + number, PAGES))
        push_out(cache, start + 500 + number)
        hold(cache, run(start + 1 + number, PAGES)).release()
    put(cache, run(start, PAGES))
    push_out(cache, start + 600)
    return run(start, PAGES)


def told(cache, seconds):
    for _ in range(3):
        cache.record_prefill(0, 1000, seconds)


def test_what_is_faster_to_compute_is_left_and_counted():
    with make_cache(host_pages=64) as cache:
        told(cache, 1e-9)
        tokens = cold(cache, 100)
        match = cache.lookup(tokens)
        assert match.tokens == len(tokens)
        assert match.restore_s is not None
        assert match.recompute_s is not None
        assert match.recompute_s < match.restore_s
        with cache.acquire(match) as lease:
            assert len(lease.wait(20)) == 0
        stats = cache.stats()
        assert stats["tokens_declined"] == len(tokens)
        assert stats["prices"]["restores_observed"] >= 3
        assert cache.lookup(tokens).tokens == len(tokens), "nothing was lost"


def test_what_is_slower_to_compute_is_restored():
    with make_cache(host_pages=64) as cache:
        told(cache, 1e6)
        tokens = cold(cache, 100)
        with cache.acquire(cache.lookup(tokens)) as lease:
            assert len(lease.wait(20)) == PAGES
            assert_right(lease, tokens)
        assert cache.stats()["tokens_declined"] == 0


def test_pages_on_the_device_are_always_used():
    with make_cache(host_pages=64) as cache:
        told(cache, 1e-9)
        tokens = cold(cache, 100)
        put(cache, tokens)
        with cache.acquire(cache.lookup(tokens)) as lease:
            assert len(lease.wait(20)) == PAGES


def test_always_restores_whatever_it_costs():
    with make_cache(host_pages=64, mover__restore="always") as cache:
        told(cache, 1e-9)
        tokens = cold(cache, 100)
        with cache.acquire(cache.lookup(tokens)) as lease:
            assert len(lease.wait(20)) == PAGES


def test_restores_that_others_began_teach_nothing(monkeypatch):
    with make_cache(host_pages=64) as cache:
        tokens = cold(cache, 100, restores=0)
        gate = Gate(monkeypatch, cache._residency.tiers[HOST], "load")
        hint = cache.prefetch(tokens)
        assert gate.reached.wait(20)
        with cache.acquire(cache.lookup(tokens)) as lease:
            gate.open()
            assert len(lease.wait(20)) == PAGES
        assert hint.wait(20)
        cache.settle(20)
        assert cache.stats()["prices"]["restores_observed"] == 0
        push_out(cache, 800)
        hold(cache, tokens).release()
        cache.settle(20)
        assert cache.stats()["prices"]["restores_observed"] == 1, "its own restores teach"


def test_restores_that_others_finished_first_teach_nothing(monkeypatch):
    with make_cache(host_pages=64) as cache:
        tokens = cold(cache, 100, restores=0)
        match = cache.lookup(tokens)
        start = cache._residency.start

        def late(coroutine):
            """The mover's loop gets to the restore only when a hint has brought everything."""
            monkeypatch.setattr(cache._residency, "start", start)
            cache.prefetch(tokens).wait(20)
            return start(coroutine)

        monkeypatch.setattr(cache._residency, "start", late)
        with cache.acquire(match) as lease:
            assert len(lease.wait(20)) == PAGES
        cache.settle(20)
        assert cache.stats()["prices"]["restores_observed"] == 0


@pytest.mark.parametrize("told", [(-1, 10, 1.0), (0, 0, 1.0), (0, 10, 0.0), (0, 10, math.nan), (0, 10, math.inf)])
def test_impossible_prefills_are_one_clear_error(told):
    with make_cache() as cache, pytest.raises(LeaseError, match="expected tokens and a time above 0"):
        cache.record_prefill(*told)
