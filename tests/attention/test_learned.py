"""Laws checked: what requests took is foreseen, the faster way is taken once both are known, and now and then the other is looked at."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.attention.learned import LEAST_REQUESTS, Attended, LearnedCosts
from kvtier.attention.router import Expected, Router, Side

ROUTER = Router({"default": 0.5, "simple_qa": 0.7, "creative_writing": 0.3})
IDLE = Side(0, 0.0)
TOKENS = 1024


def did(calls: int, seconds: float) -> Attended:
    attended = Attended()
    for _ in range(calls):
        attended.add(1, seconds / calls)
    return attended


def test_a_request_costs_what_others_of_its_class_cost():
    costs = LearnedCosts()
    assert costs.expect("default", TOKENS, 0.5) == Expected()
    for _ in range(5):
        costs.ended("default", "fetch", TOKENS, did(30, 0.3))
        costs.ended("long", "in_place", TOKENS, did(300, 6.0))
    short, long = costs.expect("default", TOKENS, 0.5), costs.expect("long", TOKENS, 0.5)
    assert [short.fetch_s, short.in_place_s, long.fetch_s, long.in_place_s] == pytest.approx([0.8, 0.6, 3.5, 6.0])
    assert costs.expect("default", TOKENS, None).fetch_s is None
    assert costs.expect("default", 0, 0.0) == Expected(), "nothing is in host memory: there is nothing to choose"
    assert costs.expect("never seen", TOKENS, 0.5) == Expected()
    costs.ended("never seen", "fetch", TOKENS, Attended())
    assert costs.expect("never seen", TOKENS, 0.5) == Expected(), "it never attended"
    assert costs.as_json()["calls_per_request"] == {"default": 30.0, "long": 300.0}


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.floats(0, 1), st.sampled_from(sorted(ROUTER.thresholds)))
def test_between_idle_sides_what_is_chosen_is_never_much_slower(fetch_s, in_place_s, attention, workload):
    """The document's attention and thresholds choose among ways that take about as long: a tenth."""
    chosen = ROUTER.decide(attention, IDLE, IDLE, workload, expected=Expected(fetch_s, in_place_s)).choice
    took = {"fetch": fetch_s, "in_place": in_place_s}
    assert took[chosen] <= 1.106 * min(took.values())


@pytest.mark.parametrize(("busy", "choice"), [(0.0, "fetch"), (1.0, "in_place")])
def test_a_busy_side_is_left_alone_if_the_other_is_about_as_fast(busy, choice):
    about = Expected(1.0, 1.02)
    assert ROUTER.decide(0.5, IDLE, Side(0, busy), expected=about).choice == choice
    assert ROUTER.decide(0.5, IDLE, Side(0, busy), expected=Expected(1.0, 2.0)).choice == "fetch"


def test_the_document_alone_decides_without_a_weight():
    alone = Router({"default": 0.5}, measured_weight=0.0)
    assert alone.decide(0.6, IDLE, IDLE, expected=Expected(100.0, 1.0)).choice == "fetch"


def run(fetch_s: float, in_place_s: float, requests: int, costs: LearnedCosts) -> float:
    """Seconds that requests of a made-up machine take, which go the way that was chosen. 1 ms of fetching is the transfer."""
    took = 0.0
    for _ in range(requests):
        decision = ROUTER.decide(0.9, IDLE, IDLE, expected=costs.expect("default", TOKENS, 1e-3))
        choice = decision.choice
        if costs.exploring(decision):
            choice = "in_place" if choice == "fetch" else "fetch"
        seconds = fetch_s if choice == "fetch" else in_place_s
        took += seconds
        costs.ended("default", choice, TOKENS, did(30, seconds - (1e-3 if choice == "fetch" else 0)))
    return took


@pytest.mark.parametrize(("fetch_s", "in_place_s"), [(2.0, 1.0), (1.0, 2.0), (37.0, 1.0), (1.0, 1.02)])
def test_once_both_ways_are_known_requests_take_hardly_longer_than_the_faster(fetch_s, in_place_s):
    costs, best = LearnedCosts(), min(fetch_s, in_place_s)
    run(fetch_s, in_place_s, 2 * LEAST_REQUESTS, costs)
    assert run(fetch_s, in_place_s, 400, costs) < 1.1 * 400 * best


def test_a_machine_that_changes_is_noticed():
    costs = LearnedCosts()
    run(4.0, 1.0, 200, costs)
    run(0.5, 1.0, 1500, costs)
    assert run(0.5, 1.0, 100, costs) < 60
    assert costs.explored > LEAST_REQUESTS
