"""Room that is had in one step, where compiled loops choose the pages and drop their copies: what others have to know they still hear."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvtier.keys import PageKey
from kvtier.policy import A2CR, LRU, nothing_protected
from tests.cache.rig import DEVICE, DISK, HOST, counters, hold, make_cache, put, run, tiers_of
from tests.columns.rig import needs_loops


@pytest.fixture(params=["lru", "a2cr"])
def policy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def in_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pages left each time that took more than one step."""
    taken: list[int] = []

    def watch(kind: type[LRU] | type[A2CR]) -> None:
        evict = kind.evict

        def noted(self, count, protected, now, pressure):
            taken.append(count)
            return evict(self, count, protected, now, pressure)

        monkeypatch.setattr(kind, "evict", noted)

    watch(LRU)
    watch(A2CR)
    return taken


@needs_loops
def test_a_full_device_tier_gives_way_in_one_step(policy: str, in_steps: list[int]):
    with make_cache(device_pages=8, host_pages=None, policy__name=policy) as cache:
        for request in range(4):
            put(cache, run(request, 3))
        assert not in_steps
        assert [len(cache.lookup(run(request, 3)).keys) for request in range(4)] == [0, 2, 3, 3]
        assert counters(cache)["tiers"]["device"]["evicted"] == {"room needed": 4}
        cache.check_integrity()


@needs_loops
def test_pages_give_way_whose_colder_copies_inherit_their_use(policy: str, in_steps: list[int]):
    """The host has both copies for as long; those whose device copies left last were used last there."""
    with make_cache(device_pages=4, host_pages=8, policy__name=policy, host__write_policy="write_through") as cache:
        put(cache, run(1, 2))
        put(cache, run(2, 2))
        cache.settle(20)
        older, newer = cache.lookup(run(1, 2)).keys, cache.lookup(run(2, 2)).keys
        hold(cache, run(2, 2)).release()
        heard: list[Sequence[PageKey | None]] = []
        cache._residency.watcher = heard.append
        put(cache, run(3, 2))
        cache.settle(20)
        assert not in_steps
        assert heard[0] == list(older[::-1])
        assert tiers_of(cache, run(1, 2)) == [{HOST}] * 2
        assert tiers_of(cache, run(2, 2)) == [{DEVICE, HOST}] * 2
        with cache._residency.lock:
            next_out = cache._residency.policies[HOST].peek(2, nothing_protected, cache._residency.clock(), 1.0)
            assert cache._residency.table.key[next_out].tolist() == list(newer[::-1])
        cache.check_integrity()


def test_what_a_hint_brought_up_in_vain_is_counted_when_it_gives_way(policy: str):
    with make_cache(device_pages=4, host_pages=16, policy__name=policy, host__write_policy="write_through") as cache:
        for request in range(1, 4):
            put(cache, run(request, 2))
            cache.settle(20)
        assert tiers_of(cache, run(1, 2)) == [{HOST}] * 2
        assert cache.prefetch(run(1, 2)).wait(20)
        cache.settle(20)
        put(cache, run(4, 4))
        cache.settle(20)
        assert tiers_of(cache, run(1, 2)) == [{HOST}] * 2
        assert counters(cache)["prefetch"]["wasted"] == 2


def test_pages_that_are_not_worth_a_copy_below_leave_at_once(policy: str, monkeypatch: pytest.MonkeyPatch):
    """Nobody waits for the mover where nothing is moved."""
    with make_cache(device_pages=4, host_pages=8, policy__name=policy) as cache:
        residency = cache._residency
        monkeypatch.setattr(residency.admission, "worth", lambda chances: chances < 0)
        monkeypatch.setattr(residency.eviction, "reserve", None)
        put(cache, run(1, 4))
        put(cache, run(2, 3))
        assert tiers_of(cache, run(1, 4)) == [{DEVICE}, set(), set(), set()]
        assert counters(cache)["tiers"]["device"]["evicted"] == {"not admitted below": 3}
        assert residency.admission.regret.refused == 3
        cache.check_integrity()


@pytest.mark.parametrize(("write_policy", "cleans"), [("write_back", True), ("write_through", False)])
def test_pages_are_copied_down_ahead_only_where_they_wait_to_be_evicted(monkeypatch: pytest.MonkeyPatch, write_policy: str, cleans: bool):
    """Those that are written through are there already."""
    settings: dict[str, Any] = {"mover__clean_pressure": 0.5, "host__write_policy": write_policy}
    with make_cache(device_pages=4, host_pages=8, **settings) as cache:
        cleaned: list[int] = []

        async def note(tier: int) -> None:
            cleaned.append(tier)

        monkeypatch.setattr(cache._residency.house, "_clean", note)
        put(cache, run(1, 4))
        hold(cache, run(1, 4)).release()
        cache.settle(20)
        assert cleaned == [DEVICE] * cleans
        assert tiers_of(cache, run(1, 4)) == [{DEVICE} if cleans else {DEVICE, HOST}] * 4


@needs_loops
def test_whoever_wants_to_hear_what_is_gone_hears_it_by_its_key(policy: str):
    with make_cache(device_pages=4, host_pages=None, policy__name=policy) as cache:
        put(cache, run(1, 4))
        keys = cache.lookup(run(1, 4)).keys
        heard: list[Sequence[PageKey | None]] = []
        cache._residency.watcher = heard.append
        put(cache, run(2, 3))
        assert heard[0] == list(keys[:0:-1])


def test_the_next_colder_copy_of_each_page_inherits_its_use(tmp_path: Path):
    """One of two that leave the device has no copy in the host tier any more: that on disk inherits, and of the other that in the host."""
    now = [1.0]
    through: dict[str, Any] = {f"{tier}__write_policy": "write_through" for tier in ("host", "disk")}
    with make_cache(tmp_path / "store", device_pages=4, policy__name="lru", clock=lambda: now[0], **through) as cache:
        put(cache, run(1, 2))
        cache.settle(20)
        residency = cache._residency
        rows = residency.table.rows_of(cache.lookup(run(1, 2)).keys)
        with residency.lock:
            assert residency.eviction.clear(rows[1:], HOST) == 1
        now[0] = 9.0
        put(cache, run(2, 4))
        cache.settle(20)
        assert tiers_of(cache, run(1, 2)) == [{HOST, DISK}, {DISK}]
        host, disk = residency.policies[HOST], residency.policies[DISK]
        assert host.score(int(rows[0]), 9.0, 1.0) == 9.0
        assert [disk.score(row, 9.0, 1.0) for row in rows.tolist()] == [1.0, 9.0]


def test_slots_come_in_the_same_order_whether_pages_give_way_or_leave_step_by_step(monkeypatch: pytest.MonkeyPatch, policy: str):
    """Pages that follow each other so get slots that do: copies to neighbours are joined."""
    orders: list[list[int] | None] = []
    for steps in (False, True):
        with make_cache(device_pages=8, host_pages=None, policy__name=policy) as cache:
            put(cache, run(1, 7))
            eviction = cache._residency.eviction
            if steps:
                monkeypatch.setattr(eviction, "_give_way", lambda *_: None)
            with cache._residency.lock:
                orders += [eviction.reserve_now(DEVICE, 3), eviction.reserve_now(DEVICE, 2)]
    assert orders[:2] == orders[2:]


@needs_loops
@pytest.mark.parametrize("spare", [0, 1, 3])
def test_as_many_slots_stay_free_as_others_need(policy: str, spare: int):
    with make_cache(device_pages=8, host_pages=None, policy__name=policy) as cache:
        put(cache, run(1, 7))
        eviction, device = cache._residency.eviction, cache._residency.device
        with cache._residency.lock:
            slots = eviction.reserve_now(DEVICE, 3, spare=spare)
            assert slots is not None
            assert len(set(slots)) == 3
            assert device.free_slots == spare
            device.free(slots)
        cache.check_integrity()
