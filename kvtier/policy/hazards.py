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
SMOOTHING = 0.75 ** np.abs(np.arange(AGES)[:, None] - np.arange(AGES)[None, :])
SMOOTHING[np.abs(np.arange(AGES)[:, None] - np.arange(AGES)[None, :]) > 6] = 0.0
"""Weights of neighbouring ages, three quarters per half octave, up to three octaves."""
PRIOR_HITS = 1.0
"""Hits' worth of belief that a feature changes nothing."""
LEAST_HAZARD, MOST_HAZARD = 1e-7, 0.97
LEAST_DENSITY, LEAST_RUN, LEAST_EXPOSURE = 1e-12, 1e-30, 0.01
_LEAST_WORTH = np.log(LEAST_DENSITY)


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
        """Nobody was used again at this age or a greater one, by the last fit."""
        self._firsts: Numbers = np.cumsum((0, *sizes))
        """Where the values of each feature begin among those of all."""
        self._values: Numbers = np.indices(sizes).reshape(len(sizes), -1).T + self._firsts[:-1]
        """Of each combination and feature the row of `_factors`."""
        self._factors: Reals = np.ones((sum(sizes), AGES))
        """By value of a feature and age, one feature after the other."""
        self._ratios: Reals = np.ones_like(self._factors)
        """What the factors of a fit are to those of the one before."""

    def __len__(self) -> int:
        """Kinds there have been."""
        return self._count

    def kinds_of(self, combined: Numbers) -> Numbers:
        """The kinds of pages with these features, given as numbers in mixed radix, the first feature first."""
        kinds = self.kind_of[combined]
        if len(kinds) and kinds[kinds.argmin()] < 0:
            unknown = combined[kinds < 0]
            self._add(np.unique(unknown) if len(unknown) > 1 else unknown)
            kinds = self.kind_of[combined]
        return kinds

    # -- fitting ---------------------------------------------------------------------------------------------------------------

    def _fit(self) -> None:
        self.fits += 1
        hits, exposed = self._hits[: self._count], self._exposed[: self._count]
        level = (hits.sum(0) @ SMOOTHING) / (exposed.sum(0) @ SMOOTHING + LEAST_EXPOSURE)
        self._level = np.clip(level, LEAST_HAZARD, MOST_HAZARD)
        self._last_age = int(np.flatnonzero(self._level > LEAST_HAZARD).max(initial=0)) + 1
        expected = self._expect(exposed)
        for feature, first in enumerate(self._firsts[:-1].tolist()):
            own = slice(first, int(self._firsts[feature + 1]))
            seen, due = self._gather(hits, expected, feature)
            after = (seen[own] @ SMOOTHING + PRIOR_HITS) / (due[own] @ SMOOTHING + PRIOR_HITS)
            self._ratios[own] = after / self._factors[own]
            self._rescale(expected, feature)
            self._factors[own] = after
        self._appraise(slice(self._count))
        hits *= FADE
        exposed *= FADE

    def _expect(self, exposed: Reals) -> Reals:
        """The hits that would be seen by the level of now and the factors of the last fit, `[kinds, AGES]`."""
        features = self._features[: self._count]
        if (loops := columns.loops()) is not None:
            loops.expect(exposed, self._level, features, self._factors, expected := self._expected[: self._count])
            return expected
        expected = exposed * self._level
        for of_kind in features.T:
            expected *= self._factors[of_kind]
        return expected

    def _gather(self, hits: Reals, expected: Reals, feature: int) -> tuple[Reals, Reals]:
        """By value of this feature, in its rows of `[values, AGES]`: the hits that were seen, and those expected but for its factor."""
        seen, due = np.zeros((2, *self._factors.shape))
        features = self._features[: self._count]
        if (loops := columns.loops()) is not None:
            loops.gather(hits, expected, features, self._factors, seen, due, feature)
            return seen, due
        of_kind = features[:, feature]
        foreseen = expected / self._factors[of_kind]
        for value in range(int(self._firsts[feature]), int(self._firsts[feature + 1])):
            own = of_kind == value
            seen[value], due[value] = hits[own].sum(0), foreseen[own].sum(0)
        return seen, due

    def _rescale(self, expected: Reals, feature: int) -> None:
        features = self._features[: self._count]
        if (loops := columns.loops()) is not None:
            loops.rescale(expected, features, self._ratios, feature)
        else:
            expected *= self._ratios[features[:, feature]]

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
        features, best, chance = self._features[kinds], self.worth[kinds], self.chance[kinds]
        best[:] = LEAST_DENSITY
        last = self._last_age
        if (loops := columns.loops()) is not None:
            loops.appraise(self._level, features, self._factors, WIDTHS, best, chance, last, MOST_HAZARD, LEAST_RUN)
        else:
            self._promise(features, best, chance, last)
        promising = best[:, :last]
        np.log(np.maximum(promising, LEAST_DENSITY, out=promising), out=promising)
        best[:, last:] = _LEAST_WORTH

    def _promise(self, features: Numbers, best: Reals, chance: Reals, last: int) -> None:
        """Into `best` the most uses per second from each age below `last`, into `chance` the chance of a use at all."""
        hazard = self._hazards(features)
        hazard[:, -1] = 0.0
        survival = np.ones((len(features), AGES + 1))
        np.cumprod(1.0 - hazard, axis=1, out=survival[:, 1:])
        used, kept = np.zeros((2, len(features), AGES + 1))
        np.cumsum(survival[:, :-1] * hazard, axis=1, out=used[:, 1:])
        np.cumsum(survival[:, :-1] * WIDTHS * (1.0 - hazard / 2), axis=1, out=kept[:, 1:])
        # The steepest way up from each age is a side of the upper hull of (kept, used); found by looking at all ways.
        for age in range(min(last, AGES - 1)):
            rise, run = used[:, age + 1 : last + 1] - used[:, age, None], kept[:, age + 1 : last + 1] - kept[:, age, None]
            best[:, age] = (rise / np.maximum(run, LEAST_RUN)).max(axis=1)
        chance[:] = 1.0 - survival[:, -1:] / survival[:, :-1]

    # -- kinds -----------------------------------------------------------------------------------------------------------------

    def _add(self, numbers: Numbers) -> None:
        first, self._count = self._count, self._count + len(numbers)
        if self._count > len(self.worth):
            self._grow(max(self._count, 2 * len(self.worth)))
        added = slice(first, self._count)
        self.kind_of[numbers] = np.arange(first, self._count)
        self._features[added] = self._values[numbers]
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
