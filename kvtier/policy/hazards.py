"""What is learned from the use of pages about each kind of them: hazards by age, fitted to hits and exposures; and what it is worth.

For every kind and age there is a hazard: of the spells that get so old, the share that ends now. It is what is seen over all pages, times
one factor per feature and age (a generalised additive model of Poisson counts, one backfitting step per fit, from where the last one
stood). All curves are smoothed over neighbouring ages (`kvtier.policy.ages`).

Worth is reuse density: the most hits per second of residence that keeping the page from now on, up to any later age, can promise. That
is the Gittins index of a page as a one-armed bandit, and with hazards in place of frequencies the rule of LHD (Beckmann, Chen, Cidon,
NSDI'18) and EVA (Beckmann, Sanchez, HPCA'17), which fix the horizon instead.

Owned by one policy, called under the policy owner's lock. `kvtier.policy.reuse` counts what is fitted to.
"""

from __future__ import annotations

import math

import numpy as np

from kvtier import columns
from kvtier.columns import Numbers, Reals
from kvtier.policy.ages import AGES, WIDTHS

FADE = 0.9
"""What is left of hits and exposures after each fit: some ten periods count."""
SMOOTHING: Reals = 0.75 ** np.arange(7.0)
"""Weights of neighbouring ages by how far apart they are: three quarters per half octave, up to three octaves."""
PRIOR_HITS = 1.0
"""Hits' worth of belief that a feature changes nothing."""
LEAST_HAZARD, MOST_HAZARD = 1e-7, 0.97
LEAST_DENSITY, LEAST_RUN, LEAST_EXPOSURE = 1e-12, 1e-30, 0.01

_ROOT_OF_HALF, _BITS, _BIAS = 0x3FE6A09E667F3BCD, 52, 1023
_ONE = _BIAS << _BITS


def _log(numbers: Reals) -> Reals:
    """The natural logarithm of normal numbers above 0, as compiled loops take it: the last bit of NumPy's depends on the machine."""
    bits = numbers.view(np.int64)
    power = (bits + (_ONE - _ROOT_OF_HALF) >> _BITS) - _BIAS
    rest = (bits - (power << _BITS)).view(np.float64)
    part = (rest - 1.0) / (rest + 1.0)
    square, series = part * part, np.zeros_like(part)
    for term in range(9, -1, -1):
        series = series * square + 2.0 / (2 * term + 1)
    logs: Reals = power * math.log(2.0) + part * series
    return logs


def _smooth(counts: Reals) -> Reals:
    """Counts `[..., AGES]` with those of neighbouring ages."""
    smooth: Reals = SMOOTHING[0] * counts
    for apart, weight in enumerate(SMOOTHING[1:].tolist(), 1):
        smooth[..., apart:] += weight * counts[..., :-apart]
        smooth[..., :-apart] += weight * counts[..., apart:]
    return smooth


class Hazards:
    """Hazards and worth for kinds of pages with features of these sizes. There is room for kinds once `_grow` made it.

    A kind is a number that `kinds_of` gives for features in mixed radix; `worth` `[kinds, AGES]` is the logarithm of uses per second.
    """

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.sizes = sizes
        self.fits = 0
        self.kind_of: Numbers = np.full(math.prod(sizes), -1)
        """The kind of each combination of features, -1 where there was none yet."""
        self.worth: Reals = np.zeros((0, AGES))
        self.chance: Reals = np.ones((0, AGES))
        """The chance that a spell of a kind which got so old ever ends, `[kinds, AGES]`; 1 before anything is learned."""
        self._count = 0
        self._features: Numbers = np.zeros((0, len(sizes)), np.int64)
        """Of each kind and feature the row of `_factors`."""
        self._hits: Reals = np.zeros((0, AGES))
        self._exposed: Reals = np.zeros((0, AGES))
        self._expected: Reals = np.zeros((0, AGES))
        """Room for a fit: new memory of this size costs more than what is done in it."""
        self._level: Reals = np.zeros(AGES)
        self._last_age = 0
        """Nobody was used again at this age or a greater one, by the last fit; of the last age nothing is known."""
        self._firsts: Numbers = np.cumsum((0, *sizes))
        """Where the values of each feature begin among those of all."""
        self._values: Numbers = np.stack(np.unravel_index(np.arange(math.prod(sizes)), sizes), 1) + self._firsts[:-1]
        """Of each combination and feature the row of `_factors`."""
        self._factors: Reals = np.ones((sum(sizes), AGES))
        """By value of a feature and age, one feature after the other."""
        self._seen, self._due = np.zeros((2, *self._factors.shape))
        """Room for a fit, too."""

    def __len__(self) -> int:
        """Kinds there have been."""
        return self._count

    def kinds_of(self, combined: Numbers) -> Numbers:
        """The kinds of pages with these features, given as numbers in mixed radix, the first feature first."""
        kinds = self.kind_of[combined]
        if len(kinds) and kinds[kinds.argmin()] < 0:
            self.meet(np.unique(combined[kinds < 0]))
            kinds = self.kind_of[combined]
        return kinds

    # -- fitting ---------------------------------------------------------------------------------------------------------------

    def _fit(self) -> None:
        self.fits += 1
        hits, exposed, features = self._hits[: self._count], self._exposed[: self._count], self._features[: self._count]
        if (loops := columns.loops()) is not None:
            by_value = (self._firsts, self._factors, SMOOTHING, self._level, self._seen, self._due)
            rest = (FADE, PRIOR_HITS, LEAST_EXPOSURE, LEAST_HAZARD, MOST_HAZARD)
            loops.learn(hits, exposed, self._expected[: self._count], features, *by_value, *rest)
        else:
            self._learn(hits, exposed, features)
        self._last_age = min(int(np.flatnonzero(self._level > LEAST_HAZARD).max(initial=0)) + 1, AGES - 1)
        self._appraise(slice(self._count))

    def _learn(self, hits: Reals, exposed: Reals, features: Numbers) -> None:
        """Level and factors by what was counted until now, which then fades."""
        self._level[:] = np.clip(_smooth(hits.sum(0)) / (_smooth(exposed.sum(0)) + LEAST_EXPOSURE), LEAST_HAZARD, MOST_HAZARD)
        expected = exposed * self._level
        for of_kind in features.T:
            expected *= self._factors[of_kind]
        for of_kind, first, end in zip(features.T, self._firsts, self._firsts[1:], strict=False):
            before = self._factors[first:end].copy()
            own = [of_kind == value for value in range(first, end)]
            seen, due = np.array([hits[kinds].sum(0) for kinds in own]), np.array([expected[kinds].sum(0) for kinds in own])
            after = (_smooth(seen) + PRIOR_HITS) / (_smooth(due / before) + PRIOR_HITS)
            expected *= (after / before)[of_kind - first]
            self._factors[first:end] = after
        hits *= FADE
        exposed *= FADE

    def _hazards(self, features: Numbers) -> Reals:
        """Of the spells of kinds with these features that get as old, the share that ends at that age, `[kinds, AGES]`."""
        hazard: Reals = np.repeat(self._level[None, :], len(features), axis=0)
        for of_kind in features.T:
            hazard *= self._factors[of_kind]
        np.minimum(hazard, MOST_HAZARD, out=hazard)
        return hazard

    def _appraise(self, kinds: slice) -> None:
        """Worth and chance of these kinds by the factors of now.

        Worth is the log of the largest (chance of a use) / (seconds until then or until giving up), over all ages at which to give up.
        """
        features, worth, chance = self._features[kinds], self.worth[kinds], self.chance[kinds]
        if (loops := columns.loops()) is not None:
            rest = (self._last_age, MOST_HAZARD, LEAST_RUN, LEAST_DENSITY)
            loops.appraise(self._level, features, self._factors, WIDTHS, worth, chance, *rest)
            return
        worth[:], chance[:] = self._promise(features)
        worth[:] = _log(np.maximum(worth, LEAST_DENSITY))

    def _promise(self, features: Numbers) -> tuple[Reals, Reals]:
        """The most uses per second from each age, and the chance of a use at all, `[kinds, AGES]`."""
        hazard = self._hazards(features)
        hazard[:, -1] = 0.0
        survival = np.ones((len(features), AGES + 1))
        np.cumprod(1.0 - hazard, axis=1, out=survival[:, 1:])
        used, kept = np.zeros((2, len(features), AGES + 1))
        np.cumsum(survival[:, :-1] * hazard, axis=1, out=used[:, 1:])
        np.cumsum(survival[:, :-1] * WIDTHS * (1.0 - hazard / 2), axis=1, out=kept[:, 1:])
        best, last = np.zeros((len(features), AGES)), self._last_age
        # The steepest way up from each age is a side of the upper hull of (kept, used); found by looking at all ways.
        for age in range(last):
            rise, run = used[:, age + 1 : last + 1] - used[:, age, None], kept[:, age + 1 : last + 1] - kept[:, age, None]
            best[:, age] = (rise / np.maximum(run, LEAST_RUN)).max(axis=1)
        return best, 1.0 - survival[:, -1:] / survival[:, :-1]

    # -- kinds -----------------------------------------------------------------------------------------------------------------

    def meet(self, numbers: Numbers) -> None:
        """There are kinds of pages with these features, which there were not before; in ascending order, each once."""
        first, self._count = self._count, self._count + len(numbers)
        if self._count > len(self.worth):
            self._grow(max(self._count, 2 * len(self.worth)))
        added = slice(first, self._count)
        self.kind_of[numbers] = np.arange(first, self._count)
        self._values.take(numbers, 0, self._features[added], "clip")
        # Before the first fit, the older the less: the order of LRU.
        if self.fits:
            self._appraise(added)
        else:
            self.worth[added], self.chance[added] = -np.arange(AGES), 1.0

    def _grow(self, kinds: int) -> None:
        held = len(self.worth)
        for name in self._by_kind():
            column = getattr(self, name)
            larger = np.zeros((kinds, *column.shape[1:]), column.dtype)
            larger[:held] = column
            setattr(self, name, larger)

    def _by_kind(self) -> tuple[str, ...]:
        """The columns that have a row for every kind."""
        return ("worth", "chance", "_features", "_hits", "_exposed", "_expected")
