"""How soon pages like this one are used again, as it happens: spells of use, counted by kind of page, age and when they began.

A *spell* begins when a page is used and ends when it is used again; a page that nobody uses stays in its last spell, in the tier or as a
ghost. Pages in the same situation are of one *kind* (a tuple of small features). What the counts say about kinds, `kvtier.policy.hazards`
learns in every fit.

Exposure is counted in the period in which it happens, hits too, and both fade at the same pace: after a change of traffic the hazards
are those of the new traffic within a few periods, whatever old pages lie about. To know who is exposed without looking at every page,
living spells are counted by kind and *cohort*: the part of a period in which they began.

Owned by one policy, called under the policy owner's lock.
"""

from __future__ import annotations

import numpy as np

from kvtier import columns
from kvtier.columns import Numbers, Reals
from kvtier.policy.ages import AGES, age_bins
from kvtier.policy.hazards import Hazards

PERIOD_SPELLS, PERIOD_CALLS = 4096, 128
"""Spells begun between two fits, at least, and calls that began them: pages of one request share their fate, and small pages are many."""
PARTS = 8
"""Cohorts per period."""
_PERIOD = NOW, BEGUN, CALLS, SPELLS_DUE, CALLS_DUE, STARTED = range(6)
"""Cells of `period`: the cohort that is beginning spells, spells and calls in it, how many end it; 1 after the first call."""
COHORTS = 512
"""Cohorts that are told apart: spells older than that are neither exposed nor hit any more."""


class ReuseModel(Hazards):
    """Spells of kinds of pages with features of these sizes, and what is learned from them.

    The compiled loops of spells write `hits`, `change`, `alive` and `period`, as `begin`, `end`, `move` and `count` do.
    """

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__(sizes)
        self.period: Numbers = np.zeros(len(_PERIOD), np.int64)
        """The cohort of now: see NOW and the others."""
        self.period[SPELLS_DUE], self.period[CALLS_DUE] = -(-PERIOD_SPELLS // PARTS), -(-PERIOD_CALLS // PARTS)
        self.hits: Numbers = np.zeros((0, AGES), np.int64)
        """Of this period."""
        self.change: Numbers = np.zeros((0, AGES + 1), np.int64)
        """Of this period, how many more spells are exposed at an age than at the one before."""
        self.alive: Numbers = np.zeros((COHORTS, 0), np.int64)
        self.counted: Numbers = np.zeros(COHORTS, np.int64)
        """The living spells of a cohort have been counted as exposed at ages below this."""
        self._began: Reals = np.zeros(COHORTS)
        """When each cohort began, seconds."""
        self._grow(64)

    @property
    def cohort(self) -> int:
        """Serial number of the cohort that is beginning spells now."""
        return int(self.period[NOW])

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
        period = self.period
        if not period[STARTED]:
            period[STARTED], self._began[0] = 1, now
            if not self._is_full():
                return False
        period[BEGUN] = period[CALLS] = 0
        period[NOW] += 1
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
        if (loops := columns.loops()) is not None:
            known = slice(self._count)
            counts = (self.change[known], self.hits[known], self._exposed[known], self._hits[known])
            loops.expose(self._began, self.counted, self.alive, *counts, self.cohort, now)
            return
        rows = np.arange(max(0, self.cohort - COHORTS), self.cohort) % COHORTS
        ends = np.append(self._began[rows[1:]], now)
        reached = age_bins(np.maximum(now - (self._began[rows] + ends) / 2, 0.0)) + 1
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

    def _grow(self, kinds: int) -> None:
        super()._grow(kinds)
        alive = np.zeros((COHORTS, kinds), np.int64)
        alive[:, : self.alive.shape[1]] = self.alive
        self.alive = alive

    def _by_kind(self) -> tuple[str, ...]:
        return (*super()._by_kind(), "hits", "change")
