"""The bound on what A²CR may lose to LRU: the count of LRU's finds is LRU's, and adversarial traffic cannot take more than is stated."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kvtier import columns
from kvtier.policy import A2CR, LRU
from kvtier.policy.guard import FOLLOWS, LEFT, OWED, Guard
from tests.policy.traffic import Request, Traffic, found

LONGEST = 12


def adversary(seed: int, requests: int) -> list[Request]:
    """Texts of some pages whose return is always against what was learned: what returned soon, then often, then last, turn by turn."""
    chance = np.random.default_rng(seed)
    traffic = Traffic(seed)
    now = 0.0
    while len(traffic.requests) < requests:
        texts = [traffic.fresh(int(chance.integers(2, LONGEST))) for _ in range(int(chance.integers(5, 120)))]
        kind = int(chance.integers(4))
        for turn in range(int(chance.integers(50, 1500))):
            now += float(chance.exponential(10.0 ** chance.integers(-2, 3)))
            if kind == 0:  # a loop
                text = texts[turn % len(texts)]
            elif kind == 1:  # by popularity
                text = texts[min(int(chance.exponential(8)), len(texts) - 1)]
            elif kind == 2:  # used again at once and never more
                text = list(traffic.requests[-1].pages) if turn % 3 == 2 else traffic.fresh(8)
            else:  # the most recent ones, LRU's own
                texts.append(traffic.fresh(6))
                text = texts[-1 - min(int(chance.exponential(30)), len(texts) - 1)]
            traffic.requests.append(Request(now, tuple(text), 512 * len(text)))
    return traffic.requests[:requests]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("compiled", [True, False])
def test_what_lru_would_have_found_is_counted_as_lru_finds_it(seed, compiled, monkeypatch):
    if compiled and columns.loops() is None:
        pytest.skip(columns.why_missing())
    if not compiled:
        monkeypatch.setattr(columns, "loops", lambda: None)
    requests, room, policy = adversary(seed, 1500), 300, A2CR()
    ours, lru = found(requests, policy, room).sum(), found(requests, LRU(), room).sum()
    # The count tells requests apart, not the pages within one: where LRU's room ends within a request, all of it counts as held.
    assert policy._guard.state[OWED] == pytest.approx(lru - ours, abs=0.02 * max(lru, ours))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_adversarial_traffic_costs_no_more_than_the_bound(seed):
    requests = adversary(seed, 6000)
    for room in (60, 250, 1000):
        policy = A2CR()
        behind = np.cumsum(found(requests, LRU(), room) - found(requests, policy, room))
        uses = np.cumsum([len(request.pages) for request in requests])
        bound = (2 * room + 2 * LONGEST) * (1 + np.log2(1 + uses / room))
        assert (behind <= bound).all(), f"{room} pages: {behind.max()} behind"


def test_it_follows_lru_when_the_score_is_wrong_and_finds_what_lru_finds():
    """A score turned upside down keeps what LRU would not: after some room's worth of losses the tier is an LRU tier, then tries again."""
    policy, room = A2CR(), 200
    worth = policy._worth
    policy.attach = lambda: None  # type: ignore[method-assign]
    policy._worth = lambda pages, now: -worth(pages, now)  # type: ignore[method-assign]
    requests = [request for request in adversary(11, 12000) if len(request.pages) <= LONGEST]
    ours, lru = found(requests, policy, room), found(requests, LRU(), room)
    falls = policy._guard.falls
    assert 0 < falls <= 1 + math.log2(1 + sum(len(request.pages) for request in requests) / room)
    assert ours.sum() >= lru.sum() - (2 * room + 2 * LONGEST) * falls - room


def test_while_lru_is_followed_pages_leave_in_its_order():
    policy, plain = A2CR(), LRU()
    policy._guard.state[[FOLLOWS, LEFT]] = 1, 10**9
    requests = adversary(5, 800)
    assert found(requests, policy, 150).tolist() == found(requests, plain, 150).tolist()


def test_a_ring_of_calls_that_grows_keeps_its_counts():
    guard = Guard()
    for call in range(3000):
        guard.count(2, call)
    before = int(guard.state[1])
    guard.fit(5000, 3000)
    assert len(guard.ring) > 4096
    guard.found(np.arange(3000))
    assert int(guard.state[OWED]) == 0
    assert int(guard.state[1]) == before - 3000
    guard.fit(100, 3000)
    guard.count(1, 3000)
    assert int(guard.state[1]) <= 100


def test_credit_from_long_ago_buys_nothing():
    guard = Guard()
    guard.fit(100, 0)
    guard.state[OWED] -= 10**6
    assert not guard.settle(1)
    guard.state[OWED] += 101
    assert guard.settle(1)
    assert bool(guard.state[FOLLOWS])
    assert not guard.settle(799)
    assert guard.settle(1)
    assert guard.state[FOLLOWS] == 0
    guard.state[OWED] += 101
    assert guard.settle(1)
    assert not guard.settle(1599), "twice as long the second time"
    assert guard.settle(1)
