"""Pressure of a tier (used / capacity, 0 to 1): its smoothing, and the bands that make a policy sterner as a tier fills.

Bands are a pure function of (band held, pressure); whoever holds the band owns that one number. The source switches at bare bounds; the
hysteresis is ours, so that a tier hovering at a bound does not re-rank its pages on every call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from kvtier.errors import ConfigError

PRESSURE_SMOOTHING = 0.2
"""Weight of the newest observation: a step is nine tenths followed after ten observations."""


def require_share(name: str, value: float) -> None:
    """ConfigError unless 0 <= value <= 1."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} is {value}; expected 0 to 1")


def require_amount(name: str, value: float) -> None:
    """ConfigError unless `value` is finite and not negative."""
    if not 0 <= value < math.inf:
        raise ConfigError(f"{name} is {value}; expected a finite number, 0 or more")


@dataclass(frozen=True)
class PressureBand:
    """What holds while pressure is above `above` and above no higher band: score threshold (0 to 1) and decay (per second)."""

    above: float
    eviction_threshold: float
    time_decay_factor: float

    def __post_init__(self) -> None:
        require_share("PressureBand.eviction_threshold", self.eviction_threshold)
        require_amount("PressureBand.time_decay_factor", self.time_decay_factor)


SOURCE_BANDS = (
    PressureBand(above=0.0, eviction_threshold=0.2, time_decay_factor=0.02),
    PressureBand(above=0.7, eviction_threshold=0.3, time_decay_factor=0.05),
    PressureBand(above=0.9, eviction_threshold=0.4, time_decay_factor=0.1),
)
"""`adaptive_tuning` of the source."""


@dataclass(frozen=True)
class PressureBands:
    """Bands in ascending order, the first above 0 (it holds when no other does), and the hysteresis between them.

    ConfigError if they are not, or if a band's bound less the hysteresis does not stay over the bound below it.
    """

    bands: tuple[PressureBand, ...] = SOURCE_BANDS
    hysteresis: float = 0.05

    def __post_init__(self) -> None:
        bounds = [band.above for band in self.bands]
        if not bounds or bounds[0] != 0 or not all(low < high < 1 for low, high in pairwise(bounds)):
            raise ConfigError(f"bands are above {bounds}; expected 0 first, then rising bounds under 1")
        gaps = [high - low for low, high in pairwise(bounds)]
        if not 0 <= self.hysteresis < min(gaps, default=1.0):
            raise ConfigError(f"hysteresis is {self.hysteresis}; expected 0 or more and under the smallest gap between bands {gaps}")

    def after(self, held: int, pressure: float) -> int:
        """Index of the band that holds at `pressure` if band `held` held before. NaN keeps the band.

        A band is entered when pressure exceeds its bound and left when pressure falls below the bound less the hysteresis.
        """
        band = held
        while band + 1 < len(self.bands) and pressure > self.bands[band + 1].above:
            band += 1
        while band > 0 and pressure < self.bands[band].above - self.hysteresis:
            band -= 1
        return band


class SmoothedPressure:
    """Exponential moving average of used / capacity; 0 until the first observation, which it takes whole.

    One step per observation, whatever the time between: observe at a steady pace, or once per change.
    """

    def __init__(self, smoothing: float = PRESSURE_SMOOTHING) -> None:
        if not 0 < smoothing <= 1:
            raise ConfigError(f"pressure smoothing is {smoothing}; expected above 0 and at most 1 (1: no smoothing)")
        self.value = 0.0
        self._smoothing = smoothing
        self._observed = False

    def observe(self, used: float, capacity: float) -> float:
        """The smoothed pressure with `used` of `capacity` (any one unit) taken in. ValueError unless 0 <= used <= capacity > 0."""
        if not 0 <= used <= capacity or capacity <= 0:
            raise ValueError(f"used {used} of capacity {capacity}: expected 0 <= used <= capacity and a capacity")
        weight = self._smoothing if self._observed else 1.0
        self._observed = True
        self.value += weight * (used / capacity - self.value)
        return self.value
