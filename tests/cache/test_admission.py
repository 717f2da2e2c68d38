"""What is written down, what a hint may displace: the residency asks the policies, and counts what it regrets."""

from __future__ import annotations

import numpy as np
import pytest

from kvtier import TieredKVCache
from kvtier.policy import A2CR
from tests.cache.rig import LAYOUT, assert_right, hold, make_cache, push_out, put, run

DEVICE = 0


def doomed(monkeypatch: pytest.MonkeyPatch, cache: TieredKVCache, chance: float, price: float) -> None:
    """The device's policy gives every page this chance of another use; pages that leave the cache have had one of `price`."""
    monkeypatch.setattr(cache._residency.policies[DEVICE], "chance", lambda pages, now: np.full(len(pages), chance))
    cache._residency.admission._evicted, cache._residency.admission._evicted_wanted = 10_000.0, 10_000.0 * price


def test_what_is_not_worth_a_write_is_not_written_and_its_return_is_regretted(monkeypatch):
    with make_cache(device_pages=4, host_pages=16) as cache:
        doomed(monkeypatch, cache, 0.01, 0.5)
        put(cache, run(1, 3))
        push_out(cache)
        assert cache.lookup(run(1, 3)).tokens == 0
        stats = cache.stats()
        assert stats["admission"]["refused"] >= 3
        assert stats["admission"]["admitted"] == 0
        assert stats["tiers"]["host"]["pages_in"] == 0
        put(cache, run(1, 3))
        assert cache.stats()["admission"]["refused_wanted"] == 3
        with hold(cache, run(1, 3)) as lease:
            assert_right(lease, run(1, 3))


def test_a_judge_that_refused_what_was_wanted_opens_by_itself(monkeypatch):
    with make_cache(device_pages=4, host_pages=64) as cache:
        doomed(monkeypatch, cache, 0.01, 0.2)
        for turn in range(40):
            put(cache, run(1 + turn % 4, 3))
            push_out(cache)
        admission = cache.stats()["admission"]
        assert admission["refused_wanted"] > 3
        assert admission["admitted"] > 0
        assert cache.stats()["tiers"]["host"]["pages_in"] > 0


@pytest.mark.parametrize("more", [{"policy__admission": "always"}, {"host__write_policy": "write_through"}])
def test_nothing_is_refused_where_everything_is_asked_for(more, monkeypatch):
    with make_cache(device_pages=4, host_pages=16, **more) as cache:
        doomed(monkeypatch, cache, 0.01, 0.5)
        put(cache, run(1, 3))
        push_out(cache)
        assert cache.lookup(run(1, 3)).pages_by_tier["host"] == 3
        assert cache.stats()["admission"]["refused"] == 0


def test_pinned_pages_are_written_whatever_their_chance(monkeypatch):
    with make_cache(device_pages=4, host_pages=16) as cache:
        doomed(monkeypatch, cache, 0.01, 0.5)
        put(cache, run(1, 2))
        cache.pin(cache.lookup(run(1, 2)), ttl=600, tier="host")
        push_out(cache)
        assert cache.lookup(run(1, 2)).pages_by_tier["host"] == 2


def test_pages_that_left_for_want_of_room_and_come_back_are_regretted():
    with make_cache(device_pages=4, host_pages=4) as cache:
        for text in (1, 2, 3, 4):
            put(cache, run(text, 4))
            cache.settle(20)
        assert cache.stats()["admission"]["evicted"] == 8
        put(cache, run(2, 4))
        assert cache.stats()["admission"]["evicted_wanted"] == 4
        put(cache, run(1, 4))
        assert cache.stats()["admission"]["evicted_wanted"] == 4, "a cache of twice the size would not have had the first text either"


def test_a_hint_never_displaces_a_page_of_higher_score(monkeypatch):
    """Four pages on the device are worth more than one that is wanted within an hour, and less than one that is wanted at once."""
    with make_cache(device_pages=4, host_pages=16) as cache:
        put(cache, run(1, 4))
        put(cache, run(2, 4))
        cache.settle(20)
        assert cache.lookup(run(1, 4)).pages_by_tier["host"] == 4
        device = cache._residency.policies[DEVICE]
        assert isinstance(device, A2CR)
        monkeypatch.setattr(device, "score", lambda page, now, pressure: -1.0)
        hint = cache.prefetch(run(1, 4), deadline=3600.0)
        assert hint.wait(20)
        cache.settle(20)
        assert cache.lookup(run(2, 4)).pages_by_tier["device"] == 4
        assert cache.stats()["prefetch"]["outranked"] == 4
        assert cache.prefetch(run(1, 3), deadline=0.5).wait(20)
        cache.settle(20)
        assert cache.lookup(run(1, 3)).pages_by_tier["device"] == 3
        assert cache.prefetch(run(2, 4), deadline=0.5).wait(20), "an earlier promise is not broken for a later one"
        cache.settle(20)
        assert cache.lookup(run(1, 3)).pages_by_tier["device"] == 3


def test_an_lru_device_gives_its_pages_for_any_hint():
    with make_cache(device_pages=4, host_pages=16, policy__name="lru") as cache:
        put(cache, run(1, 4))
        put(cache, run(2, 4))
        cache.settle(20)
        assert cache.prefetch(run(1, 4), deadline=3600.0).wait(20)
        cache.settle(20)
        assert cache.lookup(run(1, 4)).pages_by_tier["device"] == 4


def test_the_prefetch_budget_follows_the_size_of_the_device():
    for pages, budget in ((1, 1), (64, 32)):
        with make_cache(device_pages=pages, mover__prefetch_budget_bytes=None) as cache:
            assert cache._residency.hinted.room == budget
    with make_cache(device_pages=64, mover__prefetch_budget_bytes=2 * LAYOUT.page_bytes) as cache:
        assert cache._residency.hinted.room == 2
