"""Laws checked: what was measured is what is foreseen, and the cut is the cheapest one there is."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.pricing import EXPLORE_SHARE, FORGET, LEAST_OBSERVATIONS, OUTLIER, CostModel, Prices

PAGE = 16
weights = st.floats(1e-9, 1e-3)


def taught(restore: tuple[float, ...], compute: tuple[float, float, float]) -> Prices:
    """Prices that have seen enough of work that takes exactly `restore` (fixed, per byte of each tier) and `compute`."""
    prices = Prices(len(restore), PAGE)
    chance = np.random.default_rng(0)
    for _ in range(20):
        moved = [0.0, *chance.integers(1, 10**7, len(restore) - 1)]
        prices.restored(moved, restore[0] + float(np.dot(restore[1:], moved[1:])))
        start, tokens = int(chance.integers(0, 4000)), int(chance.integers(16, 2000))
        prices.computed(start, tokens, compute[0] + compute[1] * tokens + compute[2] * tokens * (start + tokens / 2))
    return prices


@settings(max_examples=50)
@given(fixed=weights, per_byte=weights, seed=st.integers(0, 99))
def test_what_follows_the_model_is_foreseen(fixed, per_byte, seed):
    model, chance = CostModel(2), np.random.default_rng(seed)
    for size in chance.integers(1, 1000, 30):
        model.observe([1, int(size)], fixed + per_byte * size)
    assert model.seconds([1, 500]) == pytest.approx(fixed + per_byte * 500, rel=1e-3)


@settings(max_examples=50)
@given(data=st.lists(st.tuples(st.lists(st.floats(0, 1e9), min_size=3, max_size=3).filter(any), st.floats(1e-6, 1e3)), max_size=30))
def test_weights_are_never_negative_whatever_was_seen(data):
    model = CostModel(3)
    for terms, seconds in data:
        model.observe(terms, seconds)
    assert all(0 <= weight < math.inf for weight in model.weights)


def test_what_was_never_seen_is_not_foreseen():
    model = CostModel(3)
    assert model.seconds([1, 0, 0]) is None
    model.observe([1, 5, 0], 2.0)
    assert model.seconds([1, 5, 0]) == pytest.approx(2.0)
    assert model.seconds([1, 5, 1]) is None


def test_the_past_is_forgotten():
    model = CostModel(1)
    for _ in range(50):
        model.observe([10], 1.0)
    for _ in range(100):
        model.observe([10], 3.0)
    assert model.seconds([10]) == pytest.approx(3.0, rel=1e-2)
    assert FORGET**100 < 1e-2


def test_one_stall_counts_as_a_slow_one_not_as_a_catastrophe():
    calm, stalled = CostModel(1), CostModel(1)
    for model, last in ((calm, OUTLIER * 1.0), (stalled, 1000.0)):
        for _ in range(20):
            model.observe([10], 1.0)
        model.observe([10], last)
    assert stalled.seconds([10]) == pytest.approx(calm.seconds([10]))


@pytest.mark.parametrize(("terms", "seconds"), [([1, -1], 1.0), ([0, 0], 1.0), ([1, math.nan], 1.0), ([1, 1], 0.0), ([1, 1], math.inf)])
def test_impossible_observations_are_refused_and_change_nothing(terms, seconds):
    model = CostModel(2)
    with pytest.raises(ValueError, match="expected terms of 0 or more"):
        model.observe(terms, seconds)
    assert model.observations == 0


@settings(max_examples=200)
@given(
    homes=st.lists(st.integers(0, 2), max_size=40),
    fixed=st.floats(1e-6, 1e-2),
    host=st.floats(1e-12, 1e-8),
    disk=st.floats(1e-12, 1e-8),
    linear=st.floats(1e-7, 1e-3),
    square=st.floats(1e-12, 1e-6),
)
def test_the_cut_is_the_cheapest_in_doubt_and_the_longest_of_equals(homes, fixed, host, disk, linear, square):
    prices, page_bytes = taught((fixed, host, disk), (1e-3, linear, square)), np.array([0, 1000, 500])
    cut = prices.pages_to_restore(np.array(homes, np.intp), page_bytes)

    def total(pages: int) -> float:
        restore = prices.restore_s(np.bincount(homes[:pages], minlength=3) * page_bytes)
        recompute = prices.recompute_s(pages * PAGE, (len(homes) - pages) * PAGE)
        assert restore is not None
        assert recompute is not None
        return restore + recompute

    def at_most(pages: int) -> float:
        return total(pages) + float(prices.recompute_doubt_s([pages * PAGE], [(len(homes) - pages) * PAGE])[0])

    costs = [at_most(pages) for pages in range(len(homes) + 1)]
    explored = cut == len(homes) and total(cut) <= (1 + EXPLORE_SHARE) * total(int(np.argmin(costs)))
    assert costs[cut] == pytest.approx(min(costs), rel=1e-9) or explored
    assert all(costs[cut] < longer or math.isclose(costs[cut], longer) for longer in costs[cut + 1 :])


def test_until_both_ways_were_measured_everything_is_restored():
    homes, page_bytes = np.ones(8, np.intp), np.array([0, 1000])
    prices = Prices(2, PAGE)
    for _ in range(LEAST_OBSERVATIONS):
        assert prices.pages_to_restore(homes, page_bytes) == 8
        prices.computed(0, 1000, 1e-6)
        assert prices.pages_to_restore(homes, page_bytes) == 8
        prices.restored([0, 1000], 1.0)
    assert prices.pages_to_restore(homes, page_bytes) == 0
    assert taught((1.0, 1.0), (1e-9, 1e-9, 1e-9)).pages_to_restore(np.full(8, 0), page_bytes) == 8, "what is on the device costs nothing"


def test_short_prefills_alone_do_not_make_a_long_one_look_free():
    """As an engine saw them while others used its cores: they take the same whatever their length, so all of it seems fixed."""
    prices, homes, page_bytes = Prices(2, 128), np.ones(11, np.intp), np.array([0, 1_500_000])
    for tokens, seconds in ((170, 0.63), (170, 0.72), (170, 0.25), (170, 0.25), (192, 0.28), (192, 0.31), (192, 0.28)):
        prices.computed(1450 - tokens, tokens, seconds)
        prices.restored(homes @ page_bytes[homes] * np.array([0, 1]), 0.02)
    restore, recompute = prices.restore_s([0, 11 * page_bytes[1]]), prices.recompute_s(0, 1408)
    assert restore is not None
    assert recompute is not None
    assert recompute < restore / 5, "what this is about"
    assert prices.pages_to_restore(homes, page_bytes) == 11
    for _ in range(10):
        prices.computed(0, 1408, 0.005)
    assert prices.pages_to_restore(homes, page_bytes) == 0, "once long ones were seen, they are believed"


@pytest.mark.parametrize("error", [0.0, 0.05, 0.2])
def test_one_standard_error_covers_what_is_true_most_of_the_time(error):
    chance, truth, covered = np.random.default_rng(1), np.array([1e-3, 2e-7]), 0
    for _ in range(100):
        prices = Prices(2, PAGE)
        for start, tokens in zip(chance.integers(0, 4000, 12).tolist(), chance.integers(16, 2000, 12).tolist(), strict=True):
            exact = 0.03 + truth @ (tokens, tokens * (start + tokens / 2))
            prices.computed(start, tokens, exact * math.exp(error * chance.standard_normal()))
        foreseen, doubt = prices.recompute_s(0, 3000), prices.recompute_doubt_s([0], [3000])
        assert foreseen is not None
        assert doubt[0] < 0.5 * foreseen, "it would never be believed"
        covered += foreseen + doubt[0] >= truth @ (3000, 3000 * 1500)
    assert covered > 70


def test_exploring_costs_a_small_share_and_happens():
    homes, page_bytes = np.ones(10, np.intp), np.array([0, 1000])
    prices = taught((1e-3, 1e-6), (1e-3, 1e-5, 1e-9))
    recompute, restore = prices.recompute_s(0, 160), prices.restore_s([0, 10_000])
    assert recompute is not None
    assert restore is not None
    assert restore > 4 * recompute
    cuts = [prices.pages_to_restore(homes, page_bytes) for _ in range(2000)]
    explored = cuts.count(10)
    assert explored > 2
    assert set(cuts) == {0, 10}
    assert explored * (restore - recompute) <= 1.01 * EXPLORE_SHARE * 2000 * recompute
