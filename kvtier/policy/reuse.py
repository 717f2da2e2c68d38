"""How soon pages like this one are used again: hazards by kind of page and age, learned from what happens, and what a page is worth.

A *spell* begins when a page is used and ends when it is used again; a page that nobody uses stays in its last spell, in the tier or as a
ghost. Pages in the same situation are of one *kind* (a tuple of small features). For every kind and age there is a hazard: of the spells
that get so old, the share that ends now. It is what is seen over all pages, times one factor per feature and age, fitted to hits and
exposures (a generalised additive model of Poisson counts, one backfitting step per fit, from where the last one stood). All curves are
smoothed over neighbouring ages: ages are in half octaves, so nothing here has a time unit but the grid's ends.

Worth is reuse density: the most hits per second of residence that keeping the page from now on, up to any later age, can promise. That
is the Gittins index of a page as a one-armed bandit, and with hazards in place of frequencies the rule of LHD (Beckmann, Chen, Cidon,
NSDI'18) and EVA (Beckmann, Sanchez, HPCA'17), which fix the horizon instead.

Exposure is counted in the period in which it happens, hits too, and both fade at the same pace: after a change of traffic the hazards
are those of the new traffic within a few periods, whatever old pages lie about. To know who is exposed without looking at every page,
living spells are counted by kind and *cohort*: the part of a period in which they began.

Owned by one policy, called under the policy owner's lock.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kvtier import columns

Numbers = NDArray[np.int64]
Reals = NDArray[np.float64]

AGES = 56
"""Ages are told by power of two and half of it: bin 0 is below 1/16 s, the last above 97 days."""
_YOUNGEST_OCTAVE = -4
_BITS = np.array(51)
"""A float64 without these is its power of two and the first bit after that."""
_BELOW = np.array((1023 + _YOUNGEST_OCTAVE) * 2 - 1)
_FIRST, _LAST = np.array(0), np.array(AGES - 1)
EDGES: Reals = np.concatenate(([0.0], [2.0 ** (_YOUNGEST_OCTAVE + half // 2) * (1 + half % 2 / 2) for half in range(AGES)]))
"""Where ages begin, in seconds; one more than there are ages."""
_WIDTHS = np.diff(EDGES)

PERIOD_SPELLS, PERIOD_CALLS = 4096, 128
"""Spells begun between two fits, at least, and calls that began them: pages of one request share their fate, and small pages are many."""
PARTS = 8
"""Cohorts per period."""
_PERIOD = NOW, BEGUN, CALLS, SPELLS_DUE, CALLS_DUE, STARTED = range(6)
"""Cells of `period`: the cohort that is beginning spells, spells and calls in it, how many end it; 1 after the first call."""
COHORTS = 512
"""Cohorts that are told apart: spells older than that are neither exposed nor hit any more."""
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


def age_bins(ages: Reals) -> Numbers:
    """Which of the ages each of these (seconds, 0 or more) is."""
    bins: Numbers = (ages.view(np.int64) >> _BITS) - _BELOW
    np.maximum(bins, _FIRST, out=bins)
    np.minimum(bins, _LAST, out=bins)
    return bins


class ReuseModel:
    """Hazards and worth for kinds of pages with features of these sizes.

    A kind is a number that `kinds_of` gives for features in mixed radix; `worth` `[kinds, AGES]` is the logarithm of uses per second.
    The compiled loops of spells write `hits`, `change`, `alive` and `period`, as `begin`, `end`, `move` and `count` do.
    """

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.sizes = sizes
        self.fits = 0
        self.period: Numbers = np.zeros(len(_PERIOD), np.int64)
        """The cohort of now: see NOW and the others."""
        self.period[SPELLS_DUE], self.period[CALLS_DUE] = -(-PERIOD_SPELLS // PARTS), -(-PERIOD_CALLS // PARTS)
        self.kind_of: Numbers = np.full(math.prod(sizes), -1)
        """The kind of each combination of features, -1 where there was none yet."""
        self.worth: Reals = np.zeros((0, AGES))
        self.chance: Reals = np.ones((0, AGES))
        """The chance that a spell of a kind which got so old ever ends, `[kinds, AGES]`; 1 before anything is learned."""
        self.hits: Numbers = np.zeros((0, AGES), np.int64)
        """Of this period."""
        self.change: Numbers = np.zeros((0, AGES + 1), np.int64)
        """Of this period, how many more spells are exposed at an age than at the one before."""
        self.alive: Numbers = np.zeros((COHORTS, 0), np.int64)
        self.counted: Numbers = np.zeros(COHORTS, np.int64)
        """The living spells of a cohort have been counted as exposed at ages below this."""
        self._count = 0
        self._features: Numbers = np.zeros((0, len(sizes)), np.int64)
        """Of each kind and feature the row of `_factors`."""
        self._hits: Reals = np.zeros((0, AGES))
        self._exposed: Reals = np.zeros((0, AGES))
        self._expected: Reals = np.zeros((0, AGES))
        """Room for a fit: new memory of this size costs more than what is done in it."""
        self._began: Reals = np.zeros(COHORTS)
        """When each cohort began, seconds."""
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
        self._grow(64)

    def __len__(self) -> int:
        """Kinds there have been."""
        return self._count

    @property
    def cohort(self) -> int:
        """Serial number of the cohort that is beginning spells now."""
        return int(self.period[NOW])

    def kinds_of(self, combined: Numbers) -> Numbers:
        """The kinds of pages with these features, given as numbers in mixed radix, the first feature first."""
        kinds = self.kind_of[combined]
        if len(kinds) and kinds[kinds.argmin()] < 0:
            unknown = combined[kinds < 0]
            self._add(np.unique(unknown) if len(unknown) > 1 else unknown)
            kinds = self.kind_of[combined]
        return kinds

    def begin(self, kinds: Numbers) -> None:
        """Spells of these kinds begin now, in the cohort of now."""
        np.add.at(self.alive[self.cohort % COHORTS], kinds, 1)

    def end(self, kinds: Numbers, cohorts: Numbers, ages: Numbers) -> None:
        """Spells of these kinds and cohorts end with a use at these ages (`age_bins`)."""
        known = cohorts > self.cohort - COHORTS
        kinds, rows, ages = kinds[known], cohorts[known] % COHORTS, ages[known]
        np.subtract.at(self.alive, (rows, kinds), 1)
        np.add.at(self.hits, (kinds, ages), 1)
        starts = self.counted[rows]
        late = starts <= ages
        np.add.at(self.change, (kinds[late], starts[late]), 1)
        np.subtract.at(self.change, (kinds[late], ages[late] + 1), 1)

    def move(self, before: Numbers, after: Numbers, cohorts: Numbers) -> None:
        """Living spells turn out to be of another kind."""
        known = cohorts > self.cohort - COHORTS
        rows = cohorts[known] % COHORTS
        np.subtract.at(self.alive, (rows, before[known]), 1)
        np.add.at(self.alive, (rows, after[known]), 1)

    def count(self, spells: int) -> bool:
        """A call began so many spells. Whether it is the first, or the last of its cohort: then `turn`."""
        period = self.period
        period[BEGUN] += spells
        period[CALLS] += 1
        return not period[STARTED] or self._is_full()

    def turn(self, now: float) -> bool:
        """After the call that `count` said so of: starts a new cohort and fits where it is time; whether `worth` changed."""
        if not self.period[STARTED]:
            self.period[STARTED], self._began[0] = 1, now
        if not self._is_full():
            return False
        self.period[BEGUN] = self.period[CALLS] = 0
        self.period[NOW] += 1
        cohort = self.cohort
        fit = cohort % PARTS == 0 or self.fits < PARTS
        if fit:
            self._expose(now)
            self._fit()
        row = cohort % COHORTS
        self.alive[row] = self.counted[row] = 0
        self._began[row] = now
        return fit

    def _is_full(self) -> bool:
        return bool(self.period[BEGUN] >= self.period[SPELLS_DUE] and self.period[CALLS] >= self.period[CALLS_DUE])

    def _expose(self, now: float) -> None:
        """Living spells have reached the ages that they have now; the period's counts go where they are remembered."""
        rows = np.arange(max(0, self.cohort - COHORTS), self.cohort) % COHORTS
        ends = np.append(self._began[rows[1:]], now)
        reached = age_bins(np.maximum(now - (self._began[rows] + ends) / 2, 0.0)) + 1
        if (loops := columns.loops()) is not None:
            known = slice(self._count)
            change, hits, all_exposed, all_hits = self.change[known], self.hits[known], self._exposed[known], self._hits[known]
            loops.expose(rows, reached, self.counted, self.alive, change, hits, all_exposed, all_hits)
            return
        for row, until in zip(rows.tolist(), reached.tolist(), strict=True):
            start = int(self.counted[row])
            if until > start:
                self.change[:, start] += self.alive[row]
                self.change[:, until] -= self.alive[row]
                self.counted[row] = until
        self._exposed += np.cumsum(self.change, axis=1)[:, :AGES]
        self._hits += self.hits
        self.change[:] = 0
        self.hits[:] = 0

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
            loops.appraise(self._level, features, self._factors, _WIDTHS, best, chance, last, MOST_HAZARD, LEAST_RUN)
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
        np.cumsum(survival[:, :-1] * _WIDTHS * (1.0 - hazard / 2), axis=1, out=kept[:, 1:])
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
        for name in ("worth", "chance", "hits", "change", "_features", "_hits", "_exposed", "_expected"):
            column = getattr(self, name)
            larger = np.zeros((kinds, *column.shape[1:]), column.dtype)
            larger[:held] = column
            setattr(self, name, larger)
        alive = np.zeros((COHORTS, kinds), np.int64)
        alive[:, :held] = self.alive
        self.alive = alive
