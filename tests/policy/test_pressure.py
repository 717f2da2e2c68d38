"""Pressure bands and the smoothing before them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import ConfigError
from kvtier.policy import PressureBand, PressureBands, SmoothedPressure


def bands_at(*bounds: float) -> tuple[PressureBand, ...]:
    return tuple(PressureBand(bound, 0.2, 0.05) for bound in bounds)


def test_a_sequence_of_pressures_moves_through_the_bands_of_the_source():
    bands = PressureBands()
    held, seen = 0, []
    for pressure in (0.5, 0.7, 0.71, 0.66, 0.64, 0.95, 0.86, 0.849, 0.9, 0.901, 0.66, 1.0, 0.3):
        held = bands.after(held, pressure)
        seen.append(held)
    assert seen == [0, 0, 1, 1, 0, 2, 2, 1, 1, 2, 1, 2, 0]


@given(held=st.integers(0, 2), pressure=st.floats(0, 1))
def test_bands_are_idempotent_and_never_far_from_their_bounds(held, pressure):
    bands = PressureBands()
    band = bands.after(held, pressure)
    assert bands.after(band, pressure) == band
    assert band == 0 or pressure >= bands.bands[band].above - bands.hysteresis
    assert all(pressure <= other.above for other in bands.bands[band + 1 :])


def test_without_hysteresis_only_the_bounds_count():
    bands = PressureBands(hysteresis=0.0)
    assert [bands.after(2, pressure) for pressure in (0.9, 0.899, 0.7, 0.699)] == [2, 1, 1, 0]


def test_pressure_that_is_not_a_number_keeps_the_band():
    assert [PressureBands().after(held, math.nan) for held in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("bounds", [(), (0.1,), (0.0, 0.7, 0.7), (0.0, 0.9, 0.7), (0.0, 1.0), (0.0, math.nan), (0.0, 0.5, 0.52)])
def test_bands_out_of_order_or_closer_than_the_hysteresis_are_refused(bounds):
    with pytest.raises(ConfigError, match=r"bands"):
        PressureBands(bands_at(*bounds))


@pytest.mark.parametrize(("threshold", "decay"), [(-0.1, 0.1), (1.1, 0.1), (math.nan, 0.1), (0.1, -0.1), (0.1, math.inf)])
def test_a_band_with_impossible_values_is_refused(threshold, decay):
    with pytest.raises(ConfigError, match=r"PressureBand\."):
        PressureBand(0.5, threshold, decay)


def test_smoothing_takes_the_first_observation_whole_and_a_fifth_of_the_next():
    pressure = SmoothedPressure()
    assert pressure.value == 0.0
    assert pressure.observe(50, 100) == 0.5
    assert pressure.observe(100, 100) == pytest.approx(0.6)
    assert SmoothedPressure(1.0).observe(3, 4) == 0.75


@given(st.lists(st.integers(0, 10), min_size=1))
def test_smoothed_pressure_stays_between_its_extremes(used):
    pressure = SmoothedPressure()
    for amount in used:
        pressure.observe(amount, 10)
    assert min(used) / 10 - 1e-9 <= pressure.value <= max(used) / 10 + 1e-9


@pytest.mark.parametrize(("used", "capacity"), [(-1, 10), (11, 10), (0, 0), (math.nan, 10)])
def test_an_impossible_observation_is_refused(used, capacity):
    pressure = SmoothedPressure()
    with pytest.raises(ValueError, match="capacity"):
        pressure.observe(used, capacity)
    assert pressure.value == 0.0


@pytest.mark.parametrize("smoothing", [0.0, -1.0, 1.5, math.nan])
def test_impossible_smoothing_is_refused(smoothing):
    with pytest.raises(ConfigError, match="smoothing"):
        SmoothedPressure(smoothing)
