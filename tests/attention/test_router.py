"""Laws checked: the router's costs are the source's, thresholds and loads shift them the right way, and what is forced is forced."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.attention.router import Router, Side
from kvtier.errors import ConfigError

ROUTER = Router({"default": 0.5, "creative_writing": 0.3, "simple_qa": 0.7})
IDLE = Side(0, 0.0)
shares = st.floats(0, 1)


@given(shares, shares, shares)
def test_the_costs_are_those_of_the_source(attention, cores, device):
    decision = ROUTER.decide(attention, Side(0, cores), Side(0, device))
    in_place, fetch = attention * 0.5 + cores * 0.3, (1 - attention) * 0.5 + device * 0.3
    assert decision.in_place_cost == pytest.approx(in_place)
    assert decision.fetch_cost == pytest.approx(fetch)
    assert decision.choice == ("fetch" if decision.fetch_cost < decision.in_place_cost else "in_place")


@pytest.mark.parametrize("workload", ["default", "creative_writing", "simple_qa"])
def test_between_idle_sides_the_threshold_decides(workload):
    threshold = ROUTER.thresholds[workload]
    assert ROUTER.decide(threshold + 0.01, IDLE, IDLE, workload).choice == "fetch"
    assert ROUTER.decide(threshold - 0.01, IDLE, IDLE, workload).choice == "in_place"


@pytest.mark.parametrize("unknown", [None, math.nan])
def test_without_attention_the_loads_decide(unknown):
    assert ROUTER.decide(unknown, Side(0, 0.9), IDLE, "simple_qa").choice == "fetch"
    assert ROUTER.decide(unknown, IDLE, Side(0, 0.9), "simple_qa").choice == "in_place"
    assert ROUTER.decide(unknown, Side(9, 0), Side(1, 0)).choice == "fetch"
    assert ROUTER.decide(unknown, Side(1, 0), Side(9, 0)).choice == "in_place"


@given(shares, st.integers(0, 9), st.integers(0, 9))
def test_more_waiting_on_a_side_never_draws_work_to_it(attention, cores, device):
    here = ROUTER.decide(attention, Side(cores, 0.5), Side(device, 0.5))
    more = ROUTER.decide(attention, Side(cores + 1, 0.5), Side(device, 0.5))
    assert (here.choice, more.choice) != ("fetch", "in_place")


def test_what_is_forced_or_has_no_room_is_said():
    forced = Router({"default": 0.5}, mode="fetch").decide(0.0, IDLE, IDLE)
    assert (forced.choice, forced.why) == ("fetch", "routing.mode is fetch")
    full = ROUTER.decide(1.0, IDLE, IDLE, fits=False)
    assert (full.choice, full.why) == ("in_place", "the device has no room")
    with pytest.raises(ConfigError, match="workload 'poetry' is not among"):
        ROUTER.decide(0.5, IDLE, IDLE, "poetry")
