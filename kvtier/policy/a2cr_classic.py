"""A²CR as the source describes it: attention, frequency and recency added up, with a threshold that follows pressure.

Kept by name so that its behaviour can be had and compared. Do not use it where the hit ratio matters: with a decay of .05 to .1 per
second the recency term is gone before the usual reuse gap (a minute or two), what remains is a count that never ages, and on public
traces it loses to LRU from 5 % of the distinct blocks up.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass

import numpy as np

from kvtier.errors import ConfigError, IntegrityError
from kvtier.policy.base import EvictionPolicy, Mask, Pages, Protection
from kvtier.policy.leaves import Leaves, Value
from kvtier.policy.pressure import SOURCE_BANDS, PressureBand, PressureBands, require_amount, require_share

COUNT_CAP = 10
"""Touches that give the full frequency term, the insert included."""
ATTENTION_LEVELS = 64
"""Attention is scored in steps of 1/64: finer changes nothing that is measurable and would leave every page in a group of its own."""
ATTENTION_SMOOTHING = 0.2
"""Weight of the newest mass in a page's moving average; the first mass is taken whole. The source names no constant."""
NEUTRAL_ATTENTION = 0.5
"""Attention of a page for which none was recorded since it was inserted."""

_COUNTS = COUNT_CAP + 1
_NO_ATTENTION = math.nan


@dataclass(frozen=True)
class A2CRParameters:
    """Names and values of the source. Times are seconds, decay is per second. ConfigError for values that make no sense.

    `bands` and `hysteresis` hold when `adaptive`; otherwise `eviction_threshold` and `time_decay_factor` do, at any pressure.
    `cleanup_interval` is for the owner of the policy: how often it asks for `expired` pages.
    """

    attention_weight: float = 0.4
    frequency_weight: float = 0.3
    recency_weight: float = 0.3
    time_decay_factor: float = 0.05
    eviction_threshold: float = 0.2
    cleanup_interval: float = 60.0
    adaptive: bool = True
    bands: tuple[PressureBand, ...] = SOURCE_BANDS
    hysteresis: float = 0.05

    def __post_init__(self) -> None:
        for name in ("attention_weight", "frequency_weight", "recency_weight", "time_decay_factor", "cleanup_interval"):
            require_amount(name, getattr(self, name))
        require_share("eviction_threshold", self.eviction_threshold)
        if self.attention_weight + self.frequency_weight + self.recency_weight == 0:
            raise ConfigError("attention_weight, frequency_weight and recency_weight are all 0; at least one must be positive")
        if self.cleanup_interval == 0:
            raise ConfigError("cleanup_interval is 0; expected seconds, more than 0")
        PressureBands(self.bands, self.hysteresis)


class A2CRClassic(EvictionPolicy):
    """score = attention_weight * attention + frequency_weight * min(1, count / 10) + recency_weight * exp(-decay * age).

    A page's group is its attention level and its count: within one only age differs. The count starts again at one when a page is
    inserted again. The band held is moved by `evict` that succeeds and by `expired`; `peek` and `score` only apply it. Each call that
    compares pages looks at up to 715 groups (65 attention levels, 11 counts), however many pages there are.
    """

    name = "a2cr-classic"

    def __init__(self, parameters: A2CRParameters | None = None) -> None:
        super().__init__()
        self.parameters = parameters or A2CRParameters()
        self._bands = PressureBands(self.parameters.bands, self.parameters.hysteresis)
        self._band = 0
        self._leaves = Leaves()
        self._attention = array("d")
        self._static = [
            self.parameters.attention_weight * level / ATTENTION_LEVELS + self.parameters.frequency_weight * count / COUNT_CAP
            for level in range(ATTENTION_LEVELS + 1)
            for count in range(_COUNTS)
        ]

    def insert(self, pages: Pages, parents: Pages, depths: Pages, now: float) -> None:
        arriving = list(zip(pages.tolist(), parents.tolist(), depths.tolist(), strict=True))
        for page, parent, _ in arriving:
            self._leaves.require_new(page, parent)
        for page, parent, depth in arriving:
            self._leaves.insert(page, parent, depth, now, _NEW_GROUP)
            if page >= len(self._attention):
                more = max(page + 1, 2 * len(self._attention)) - len(self._attention)
                self._attention.extend([_NO_ATTENTION] * more)
            self._attention[page] = _NO_ATTENTION

    def touch(self, pages: Pages, now: float) -> None:
        for page in self._leaves.require(pages):
            self._leaves.touch(page, now)
            group = self._leaves.group(page)
            if group % _COUNTS < COUNT_CAP:
                self._leaves.raise_group(page, group + 1)

    def remove(self, pages: Pages) -> None:
        for page in self._leaves.require(pages):
            self._leaves.remove(page)

    def record_attention(self, page: int, mass: float) -> None:
        if not 0 <= mass <= 1:
            raise ValueError(f"attention mass is {mass}; expected a share from 0 to 1")
        held = self._leaves.group(page)
        before = self._attention[page]
        after = mass if math.isnan(before) else before + ATTENTION_SMOOTHING * (mass - before)
        self._attention[page] = after
        group = _group(after, held % _COUNTS)
        if group < held:
            self._leaves.lower_group(page, group)
        elif group > held:
            self._leaves.raise_group(page, group)

    def evict(self, count: int, protected: Protection, now: float, pressure: float) -> Pages | None:
        band = self._bands.after(self._band, pressure)
        victims = self._leaves.take(count, protected, self._value(now, band))
        if victims is None:
            return None
        self._leaves.note(now)
        self._band = band
        return np.array(victims, np.int64)

    def peek(self, count: int, protected: Protection, now: float, pressure: float) -> Pages:
        value = self._value(now, self._bands.after(self._band, pressure))
        return np.array(self._leaves.first(count, protected, value), np.int64)

    def expired(self, count: int, protected: Protection, now: float, pressure: float) -> Pages:
        self._band = self._bands.after(self._band, pressure)
        threshold = self._bands.bands[self._band].eviction_threshold if self.parameters.adaptive else self.parameters.eviction_threshold
        return np.array(self._leaves.first(count, protected, self._value(now, self._band), below=threshold), np.int64)

    def score(self, page: int, now: float, pressure: float) -> float:
        value = self._value(now, self._bands.after(self._band, pressure))
        return value(self._leaves.group(page), self._leaves.last_touch(page))

    def here(self, pages: Pages) -> Mask:
        return self._leaves.here(pages)

    def __len__(self) -> int:
        return len(self._leaves)

    def check_integrity(self) -> None:
        self._leaves.check_integrity(self._value(self._leaves.latest, self._band))
        for page, attention in enumerate(self._attention):
            if page in self._leaves:
                group = self._leaves.group(page)
                if group != _group(NEUTRAL_ATTENTION if math.isnan(attention) else attention, group % _COUNTS):
                    raise IntegrityError(f"page {page} is in the group of another attention than its own {attention}")

    def _value(self, now: float, band: int) -> Value:
        decay = self._bands.bands[band].time_decay_factor if self.parameters.adaptive else self.parameters.time_decay_factor
        now = max(self._leaves.latest, now)
        static = self._static
        weight = self.parameters.recency_weight
        exp = math.exp

        def value(group: int, last: float) -> float:
            return static[group] + weight * exp(-decay * (now - last))

        return value


def _group(attention: float, count: int) -> int:
    return int(attention * ATTENTION_LEVELS + 0.5) * _COUNTS + count


_NEW_GROUP = _group(NEUTRAL_ATTENTION, count=1)
