"""Look-ahead: worked by hand, beside a queue simulated page by page, and on the public trace."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.policy import LRU
from kvtier.policy.admission import Regret
from kvtier.replay.link import arrivals_s, look_ahead, prefetched
from kvtier.replay.runs import BUDGET_SHARE
from kvtier.replay.tiers import NOWHERE, Tiers, TiersOutcome
from kvtier.replay.trace import Request, Trace, build_trace
from tests.replay.rig import public_trace, trace_of, traces


def outcome_of(served: list[int]) -> TiersOutcome:
    return TiersOutcome(np.array(served, np.int8), 0, Counter(), [], Regret(), 1.0)


def test_two_requests_one_of_which_waits_for_the_link():
    # A page takes a second. Request 0 wants two from t = 0 on, request 1, at t = 1, one: it starts at 2 and is done at 3.
    trace = trace_of([0, 1], [0, 2], [0])
    link = look_ahead(
        trace, outcome_of([1, 1, 0, 1, 0]), tier=1, bytes_per_s=10.0, page_bytes=10, ahead_ms=[0, 500, 1500, 2000], budget_pages=3
    )
    assert link.use == pytest.approx(3 / 2)
    assert link.stall_ms == pytest.approx(2000)
    assert link.in_place == pytest.approx({0: 0.0, 500: 0.5 / 3, 1500: 2 / 3, 2000: 1.0})
    assert link.as_json()["in_place"] == pytest.approx({"0": 0.0, "500": 0.5 / 3, "1500": 2 / 3, "2000": 1.0})


def test_a_prefetcher_stops_at_its_budget_and_what_was_not_hinted_goes_before_hints():
    # A page takes a second. Request 0 wants two and starts at 2 s, request 1, known at 1 s, one and starts at 3 s.
    served, trace = np.array([2, 1]), np.array([0.0, 1.0])
    assert prefetched(trace, served, 1.0, 2.0, budget_pages=3) == pytest.approx(1.0)
    # One page of room: request 0 gets its first page by 1 s; its second is demanded at 2 s. Request 1 finds no room at 1 s.
    assert prefetched(trace, served, 1.0, 2.0, budget_pages=1) == pytest.approx(1 / 3)
    # Two pages, known 1.5 s ahead: request 0 has 1.5 of its pages at 1.5 s, the rest takes until 2 s; then there is nothing for request 1.
    assert prefetched(trace, served, 1.0, 1.5, budget_pages=2) == pytest.approx(1.5 / 3)
    # With room for three, request 1's page comes from 2 s on, half of it by 2.5 s.
    assert prefetched(trace, served, 1.0, 1.5, budget_pages=3) == pytest.approx(2.0 / 3)
    assert prefetched(trace, served, 1.0, 2.0, budget_pages=0) == 0


def test_a_tier_that_served_nothing_has_no_share():
    link = look_ahead(trace_of([0], [1]), outcome_of([NOWHERE, NOWHERE]), 1, 1e9, 10, [0, 50], 1)
    assert (link.use, link.stall_ms, link.in_place, link.prefetched) == (0.0, None, {0: None, 50: None}, {0: None, 50: None})
    assert look_ahead(trace_of([0]), outcome_of([NOWHERE]), 1, 1e9, 10, [], 1).use is None


def queued(trace: Trace, served: np.ndarray, ahead_s: float, page_s: float) -> float:
    free, in_time = -1e9, 0.0
    for at_s, wanted in zip(arrivals_s(trace).tolist(), trace.sum_per_request(served == 1).tolist(), strict=True):
        for _ in range(wanted):
            start = max(free, at_s)
            free = start + page_s
            in_time += min(1.0, max(0.0, (at_s + ahead_s - start) / page_s))
    return in_time


@given(trace=traces(), data=st.data())
def test_it_is_a_queue_and_never_worse_with_more_time_or_speed(trace, data):
    served = np.array(data.draw(st.lists(st.sampled_from([NOWHERE, 0, 1]), min_size=trace.accesses, max_size=trace.accesses)), np.int8)
    slow, fast = (
        look_ahead(trace, TiersOutcome(served, 0, Counter(), [], Regret(), 1.0), 1, speed, 1000, [0, 300, 1000], 10**6)
        for speed in (1000, 3000)
    )
    if slow.stall_ms is None or fast.stall_ms is None:
        assert not (served == 1).any()
        return
    shares = [share for share in slow.in_place.values() if share is not None]
    assert shares == sorted(shares)
    assert all(share <= 1 + 1e-9 for share in shares)
    assert slow.in_place[300] == pytest.approx(queued(trace, served, 0.3, 1.0) / np.count_nonzero(served == 1))
    assert fast.stall_ms <= slow.stall_ms
    for link in (slow, fast):
        # With room for every hint the order is that of look-ahead: what is late belongs to the request that comes first anyway.
        assert link.prefetched == pytest.approx(link.in_place)


def test_requests_of_one_timestamp_come_before_the_next_and_others_when_they_say():
    trace = trace_of([0], [1], [2], [3], step_ms=0)
    assert arrivals_s(trace).tolist() == [0.0] * 4, "there is nothing to spread them over"
    crowd = crowd_of_five()
    spread = arrivals_s(crowd)
    assert spread[-1] == 6.0
    assert (np.diff(spread) >= 0).all()
    assert len(np.unique(spread)) == 5
    assert ((spread[:2] >= 0) & (spread[:2] < 3)).all()
    assert ((spread[2:4] >= 3) & (spread[2:4] < 6)).all()


def crowd_of_five() -> Trace:
    return build_trace("crowd", [Request(at_ms, 4, 0, [place]) for place, at_ms in enumerate((0, 0, 3000, 3000, 6000))], 4)


@pytest.mark.slow
def test_look_ahead_on_the_conversation_trace_is_what_others_found():
    trace = public_trace("conversation")
    tiers = Tiers(trace, [LRU(), LRU()], [int(share * trace.distinct) for share in (0.01, 0.09)], ["exclusive"])
    outcome = tiers.replay()
    link = look_ahead(trace, outcome, 1, 12e9, 128 * 1024 * 512, [10, 50, 100, 250, 500, 1000], tiers.capacities[0] // BUDGET_SHARE)
    assert link.in_place == pytest.approx({10: 0.079, 50: 0.314, 100: 0.501, 250: 0.778, 500: 0.918, 1000: 0.994}, abs=2e-3)
    assert link.stall_ms == pytest.approx(126, abs=0.5)
    assert link.use == pytest.approx(0.10, abs=5e-3)
    assert link.prefetched == pytest.approx(link.in_place, abs=2e-4), "the default budget keeps nothing of it back"
    tight = look_ahead(trace, outcome, 1, 12e9, 128 * 1024 * 512, [250], 1)
    assert tight.prefetched[250] is not None
    assert tight.prefetched[250] < 0.2, "a page at a time brings little"
