"""A²CR as the source has it: its numbers, its thresholds, and an order found without looking at every page."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import ConfigError
from kvtier.policy import ROOT, A2CRClassic, A2CRParameters, PressureBand, make_policy, nothing_protected
from kvtier.policy.a2cr_classic import ATTENTION_LEVELS, ATTENTION_SMOOTHING
from kvtier.testing.policy import Asked, PolicyContract, evicted, insert_one, pages_of


class TestContract(PolicyContract):
    def make_policy(self) -> A2CRClassic:
        return A2CRClassic()


class TestContractWithoutAdaptation(PolicyContract):
    examples = 75

    def make_policy(self) -> A2CRClassic:
        return A2CRClassic(A2CRParameters(adaptive=False, attention_weight=0.0, eviction_threshold=0.35))


def test_defaults_are_those_of_the_source():
    parameters = A2CRParameters()
    assert (parameters.attention_weight, parameters.frequency_weight, parameters.recency_weight) == (0.4, 0.3, 0.3)
    assert (parameters.time_decay_factor, parameters.eviction_threshold, parameters.cleanup_interval) == (0.05, 0.2, 60)
    assert parameters.bands == (PressureBand(0.0, 0.2, 0.02), PressureBand(0.7, 0.3, 0.05), PressureBand(0.9, 0.4, 0.1))


def test_one_score_worked_by_hand():
    policy = A2CRClassic()
    insert_one(policy, 0, ROOT, 0, now=0.0)
    policy.touch(pages_of(0), now=1.0)
    policy.touch(pages_of(0), now=10.0)
    policy.record_attention(0, 0.25)
    # .4 x .25 attention + .3 x 3 touches of 10 + .3 x exp(-.1 per second x 20 s) = .1 + .09 + .0406
    assert policy.score(0, now=30.0, pressure=0.95) == pytest.approx(0.1 + 0.09 + 0.3 * 0.1353352832)
    assert policy.score(0, now=30.0, pressure=0.8) == pytest.approx(0.1 + 0.09 + 0.3 * 0.3678794412)
    assert policy.score(0, now=30.0, pressure=0.5) == pytest.approx(0.1 + 0.09 + 0.3 * 0.6703200460)


def test_without_adaptation_the_base_values_hold_at_any_pressure():
    policy = A2CRClassic(A2CRParameters(adaptive=False))
    insert_one(policy, 0, ROOT, 0, now=0.0)
    for pressure in (0.0, 0.8, 1.0):
        assert policy.score(0, now=20.0, pressure=pressure) == pytest.approx(0.4 * 0.5 + 0.3 * 0.1 + 0.3 * math.exp(-1))
    policy.record_attention(0, 0.0)
    assert policy.expired(1, nothing_protected, now=100.0, pressure=1.0).tolist() == [0]
    assert policy.expired(1, nothing_protected, now=10.0, pressure=1.0).tolist() == [], ".03 + .3 x exp(-.5) = .212 is over .2"


def test_count_stops_at_ten_and_starts_again_with_an_insert():
    policy = A2CRClassic()
    insert_one(policy, 0, ROOT, 0, now=0.0)
    for touches, share in ((8, 0.9), (1, 1.0), (5, 1.0)):
        for _ in range(touches):
            policy.touch(pages_of(0), now=0.0)
        assert policy.score(0, 0.0, 0.0) == pytest.approx(0.4 * 0.5 + 0.3 * share + 0.3)
    policy.record_attention(0, 1.0)
    policy.remove(pages_of(0))
    insert_one(policy, 0, ROOT, 0, now=0.0)
    assert policy.score(0, 0.0, 0.0) == pytest.approx(0.4 * 0.5 + 0.3 * 0.1 + 0.3), "no ghost of the earlier life"


def test_attention_is_neutral_then_the_first_mass_then_a_moving_average():
    policy = A2CRClassic(A2CRParameters(frequency_weight=0.0, recency_weight=0.0, attention_weight=1.0))
    insert_one(policy, 0, ROOT, 0, now=0.0)
    assert policy.score(0, 0.0, 0.0) == 0.5
    policy.record_attention(0, 1.0)
    assert policy.score(0, 0.0, 0.0) == 1.0
    policy.record_attention(0, 0.0)
    assert policy.score(0, 0.0, 0.0) == pytest.approx(1 - ATTENTION_SMOOTHING, abs=0.5 / ATTENTION_LEVELS)


@pytest.mark.parametrize("mass", [math.nan, -0.01, 1.01, math.inf, -math.inf])
def test_an_impossible_mass_is_refused_and_changes_nothing(mass):
    policy = A2CRClassic()
    insert_one(policy, 0, ROOT, 0, now=0.0)
    before = policy.score(0, 0.0, 0.0)
    with pytest.raises(ValueError, match="attention"):
        policy.record_attention(0, mass)
    assert policy.score(0, 0.0, 0.0) == before
    with pytest.raises(KeyError):
        policy.record_attention(1, 0.5)


@given(
    masses=st.lists(st.tuples(st.integers(0, 5), st.floats(0, 1)), max_size=40),
    touches=st.lists(st.tuples(st.integers(0, 5), st.floats(0, 30)), max_size=40),
    now=st.floats(30, 200),
    pressure=st.sampled_from([0.1, 0.8, 0.95]),
)
def test_scores_are_those_of_the_formula_up_to_the_attention_step(masses, touches, now, pressure):
    policy = A2CRClassic()
    last, count, attention = [0.0] * 6, [1] * 6, [0.5] * 6
    for page in range(6):
        insert_one(policy, page, ROOT, 0, now=0.0)
    recorded = set()
    for page, mass in masses:
        policy.record_attention(page, mass)
        attention[page] = 0.8 * attention[page] + 0.2 * mass if page in recorded else mass
        recorded.add(page)
    for page, when in sorted(touches, key=lambda touch: touch[1]):
        policy.touch(pages_of(page), when)
        last[page], count[page] = when, count[page] + 1
    decay = {0.1: 0.02, 0.8: 0.05, 0.95: 0.1}[pressure]
    for page in range(6):
        expected = 0.4 * attention[page] + 0.3 * min(1, count[page] / 10) + 0.3 * math.exp(-decay * (now - last[page]))
        assert policy.score(page, now, pressure) == pytest.approx(expected, abs=0.4 * 0.5 / ATTENTION_LEVELS + 1e-9)


@pytest.mark.parametrize(("pressure", "gone"), [(0.5, [0]), (0.8, [0, 1]), (0.95, [0, 1, 2])])
def test_expired_pages_are_those_under_the_threshold_of_the_band(pressure, gone):
    policy = A2CRClassic()
    for page, mass in enumerate([0.25, 0.5, 0.75, 1.0]):
        insert_one(policy, page, ROOT, 0, now=0.0)
        policy.record_attention(page, mass)
    # Long after the last touch the scores are .4 x mass + .03: .13, .23, .33, .43 against .2, .3 and .4.
    assert policy.expired(10, nothing_protected, now=1e4, pressure=pressure).tolist() == gone
    assert policy.expired(1, nothing_protected, now=1e4, pressure=pressure).tolist() == gone[:1]
    assert policy.expired(10, Asked({0}), now=1e4, pressure=pressure).tolist() == gone[1:]
    assert len(policy) == 4


def test_expired_lets_a_parent_follow_its_last_child_but_not_a_child_that_stays():
    policy = A2CRClassic()
    for page, parent in ((0, ROOT), (1, 0), (2, ROOT), (3, 2)):
        insert_one(policy, page, parent, 0 if parent == ROOT else 1, now=0.0)
        policy.record_attention(page, 1.0 if page == 3 else 0.0)
    assert policy.expired(10, nothing_protected, now=1e4, pressure=0.95).tolist() == [1, 0]


def test_the_band_is_held_until_pressure_falls_below_its_bound_less_the_hysteresis():
    policy = A2CRClassic(A2CRParameters(recency_weight=0.0, frequency_weight=0.0, attention_weight=1.0))
    insert_one(policy, 0, ROOT, 0, now=0.0)
    policy.record_attention(0, 0.34375)
    gone = [policy.expired(1, nothing_protected, 0.0, pressure).tolist() == [0] for pressure in (0.85, 0.91, 0.86, 0.84, 0.89, 0.91, 0.5)]
    assert gone == [False, True, True, False, False, True, False], "a threshold of .4 from .91 until under .85"


def test_only_a_successful_evict_or_expired_moves_the_band():
    policy = A2CRClassic()
    insert_one(policy, 0, ROOT, 0, now=0.0)
    insert_one(policy, 1, ROOT, 0, now=0.0)
    calm = policy.score(0, 10.0, 0.8)
    policy.peek(1, nothing_protected, 10.0, 0.95)
    policy.score(0, 10.0, 0.95)
    assert policy.evict(3, nothing_protected, 10.0, 0.95) is None
    assert policy.score(0, 10.0, 0.88) == calm
    assert evicted(policy, 1, Asked({0}), 10.0, 0.95) == [1]
    assert policy.score(0, 10.0, 0.88) < calm, "decay .1 is held at .88"


def test_a_clock_that_runs_backwards_stands_still():
    policy = A2CRClassic()
    insert_one(policy, 0, ROOT, 0, now=100.0)
    insert_one(policy, 1, ROOT, 0, now=100.0)
    assert policy.score(0, 40.0, 0.5) == policy.score(0, 100.0, 0.5) == pytest.approx(0.4 * 0.5 + 0.3 * 0.1 + 0.3)
    assert evicted(policy, 1, Asked({0}), now=150.0, pressure=0.5) == [1]
    assert policy.score(0, 100.0, 0.5) == policy.score(0, 150.0, 0.5) == pytest.approx(0.4 * 0.5 + 0.3 * 0.1 + 0.3 * math.exp(-1))


def test_a_fall_in_attention_is_seen_at_once():
    policy = A2CRClassic()
    for page in range(3):
        insert_one(policy, page, ROOT, 0, now=float(page))
    policy.record_attention(2, 0.1)
    assert policy.peek(1, nothing_protected, 2.0, 0.95).tolist() == [2]
    policy.record_attention(2, 0.9)
    policy.record_attention(2, 0.9)
    assert policy.peek(3, nothing_protected, 2.0, 0.95)[0] == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"attention_weight": -0.1},
        {"frequency_weight": math.nan},
        {"recency_weight": math.inf},
        {"attention_weight": 0, "frequency_weight": 0, "recency_weight": 0},
        {"time_decay_factor": -1},
        {"eviction_threshold": 1.1},
        {"eviction_threshold": math.nan},
        {"cleanup_interval": 0},
        {"bands": ()},
        {"hysteresis": 0.25},
    ],
)
def test_impossible_parameters_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        A2CRParameters(**wrong)


def test_policies_are_made_by_name():
    assert make_policy("lru").name == "lru"
    policy = make_policy("a2cr-classic", A2CRParameters(time_decay_factor=0.5))
    assert isinstance(policy, A2CRClassic)
    assert policy.parameters.time_decay_factor == 0.5
    with pytest.raises(ConfigError, match=r"'lfuu'.*a2cr, lru, fifo.*a2cr-classic"):
        make_policy("lfuu")
