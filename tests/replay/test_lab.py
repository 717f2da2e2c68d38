"""One tier: what the lab finds is what a cache would, and no policy beats the optimum."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import IntegrityError
from kvtier.policy import LRU, POLICIES, make_policy
from kvtier.replay.lab import replay
from kvtier.replay.optimum import Future
from tests.replay.rig import prompts_of, public_trace, trace_of, traces

capacities = st.integers(1, 20)


def plain_lru(prompts: list[list[int]], capacity: int) -> list[int]:
    held: OrderedDict[int, None] = OrderedDict()
    hits = []
    for prompt in prompts:
        named = prompt[:capacity]
        hits.append(sum(page in held for page in named))
        for page in reversed(named):
            held[page] = None
            held.move_to_end(page)
        while len(held) > capacity:
            held.popitem(last=False)
    return hits


@given(trace=traces(moments=False), capacity=capacities)
def test_lru_finds_what_an_ordered_dict_finds(trace, capacity):
    assert replay(trace, LRU(), capacity).hit_pages.tolist() == plain_lru(prompts_of(trace), capacity)


@pytest.mark.parametrize("name", POLICIES)
@given(trace=traces(), capacity=capacities)
def test_no_policy_finds_more_than_the_optimum_and_all_find_all_with_room_for_all(name, trace, capacity):
    outcome = replay(trace, make_policy(name), capacity)
    assert outcome.hit_pages.sum() <= Future(trace).hit_pages(capacity).sum()
    assert outcome.inserted - outcome.evicted <= capacity
    everything = replay(trace, make_policy(name), trace.distinct)
    assert everything.hit_pages.tolist() == trace.sum_per_request(~trace.first_seen).tolist()
    assert (everything.inserted, everything.evicted) == (trace.distinct, 0)


def test_a_request_longer_than_the_tier_keeps_its_head():
    trace = trace_of([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 5])
    outcome = replay(trace, LRU(), 3)
    assert outcome.hit_pages.tolist() == [0, 3, 2]
    assert (outcome.inserted, outcome.evicted) == (4, 1)


def test_the_running_request_does_not_pay_for_itself():
    class Greedy(LRU):
        def evict(self, count, protected, now, pressure):
            assert protected(np.array([0, 1, 2, 3])).tolist() == [True, True, False, True]
            assert pressure == 1.0
            return super().evict(count, protected, now, pressure)

    assert replay(trace_of([0, 1, 2], [0, 1, 3]), Greedy(), 3).hit_pages.tolist() == [0, 2]


def test_a_policy_that_gives_no_room_is_an_error_and_not_a_figure():
    class Mean(LRU):
        def evict(self, count, protected, now, pressure):
            return None

    with pytest.raises(IntegrityError, match="lru gave no 1 of 1 pages"):
        replay(trace_of([0], [1]), Mean(), 1)


def test_it_says_how_far_it_is(monkeypatch):
    monkeypatch.setattr("kvtier.replay.lab.STEP_REQUESTS", 2)
    heard: list[int] = []
    replay(trace_of([0], [1], [2], [3], [4]), LRU(), 3, heard.append)
    assert heard == [0, 2, 4]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "policy", "found"),
    [
        ("conversation", "lru", {0.01: 0.0535, 0.02: 0.0804, 0.05: 0.2002, 0.1: 0.2848, 0.2: 0.3520, 0.5: 0.3703}),
        ("synthetic", "lru", {0.01: 0.0388, 0.02: 0.0793, 0.05: 0.1596, 0.1: 0.2673, 0.2: 0.4003, 0.5: 0.5996}),
        ("conversation", "a2cr-classic", {0.05: 0.1345}),
        ("synthetic", "a2cr-classic", {0.05: 0.1627}),
    ],
)
def test_replays_of_the_public_traces_find_what_others_found(name, policy, found):
    trace = public_trace(name)
    for share, ratio in found.items():
        outcome = replay(trace, make_policy(policy), int(trace.distinct * share))
        assert trace.hit_tokens(outcome.hit_pages) / trace.tokens == pytest.approx(ratio, abs=1e-3)
