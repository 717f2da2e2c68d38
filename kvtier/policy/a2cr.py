"""A²CR: what leaves is what promises the least reuse per second of residence, as learned from this tier's own traffic.

A page's kind is what is known about it without looking inside: how often it was used (this outlives eviction), whether it was the end of
its request (in a colder tier: the deepest of those that came down together, which finds more than handing down where requests ended), how
many requests its prefix was built by, how much of the request that used it last was new, and how much attention the engine paid to it,
where the engine says so. `kvtier.policy.reuse` learns for every kind how the chance of reuse changes with age and turns that into worth;
the page of least worth leaves, always a leaf. No time constant, weight or threshold is set by hand, and pages are never let go while there
is room.

Not for tiers so small that a request or two fill them, where there is nothing to choose from, nor where calls per page (rather than per
request) leave no time for it (`kvtier bench table` compares).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kvtier.columns import WHOLE, Exit
from kvtier.errors import IntegrityError
from kvtier.policy.ages import EDGES, age_bins
from kvtier.policy.base import Mask, Pages, Protection
from kvtier.policy.facts import KIND, USES
from kvtier.policy.guard import ROOM
from kvtier.policy.kinds import ATTENTION
from kvtier.policy.spells import CALL_NUMBER, GONE, RESCORED_SHARE, Spells

UNATTENDED, LITTLE, USUAL, MUCH = range(ATTENTION)
"""Attention: never reported, less than half of the mean page's, about that, more than twice that."""
ATTENTION_SMOOTHING = 0.2
"""Weight of the newest mass in a page's moving average and, over all pages' reports, a hundredth of that in the mean."""


class A2CR(Spells):
    """The score is the worth of a page at its age: the logarithm of expected uses per second of residence. Pressure plays no part.

    `evict` compares scores that may be as old as the last eighth of the tier's pages that left.
    """

    name = "a2cr"

    def __init__(self) -> None:
        super().__init__()
        self._most_held = 0
        """The most pages there were when some had to leave."""
        self._mean_attention = math.nan

    def evict(self, count: int, protected: Protection, now: float, pressure: float) -> Pages | None:
        self._make_room()
        self._score_if_due(now)
        self._guard.state[ROOM] = len(self._ranking)
        taken = self._ranking.take(count, protected)
        if taken is None:
            return None
        self._note(now)
        self._remember(taken)
        self._counts[GONE] += count
        return taken

    @property
    def gives_way(self) -> bool:
        return self._loops is not None

    def give_way(self, count: int, exit: Exit, now: float) -> tuple[Pages, list[int]] | None:
        self._make_room()
        if self._loops is None or count < 1:
            return None
        if count > len(self._ranking):
            self._score_if_due(now)
            return None
        pages = np.empty(count, WHOLE)
        slots = self._loops.give_way(*exit, pages, now)
        return None if slots is None else (pages, slots)

    def _score_if_due(self, now: float) -> None:
        if self._counts[GONE] * RESCORED_SHARE >= len(self._ranking):
            self._score_all(max(now, self._latest))

    def _make_room(self) -> None:
        """Pages are to leave: what is remembered has the room that it needs."""
        held = len(self._ranking)
        if held > self._most_held:
            self._most_held = held
            self._memory.fit(held)
            self._guard.fit(held, int(self._counts[CALL_NUMBER]))
            self._fit_loops()

    def peek(self, count: int, protected: Protection, now: float, pressure: float) -> Pages:
        self._score_if_due(now)
        return self._ranking.first(count, protected)

    def record_attention(self, page: int, mass: float) -> None:
        if not 0 <= mass <= 1:
            raise ValueError(f"attention mass is {mass}; expected a share from 0 to 1")
        one = np.array([page], np.int64)
        self._ranking.require(one)
        before = float(self._attention[page])
        unknown = self._combined[page] % ATTENTION == UNATTENDED
        after = mass if unknown else before + ATTENTION_SMOOTHING * (mass - before)
        self._attention[page] = after
        mean = self._mean_attention
        self._mean_attention = mean = mass if math.isnan(mean) else mean + ATTENTION_SMOOTHING / 100 * (mass - mean)
        level = LITTLE if after < mean / 2 else MUCH if after > mean * 2 else USUAL
        self._change(one, self._combined[one] // ATTENTION * ATTENTION + level)

    def score(self, page: int, now: float, pressure: float) -> float:
        one = np.array([page], np.int64)
        self._ranking.require(one)
        return float(self._worth(one, max(now, self._latest))[0])

    def promised(self, within_s: float, now: float) -> float:
        return -math.log(max(within_s, float(EDGES[1])))

    def chance(self, pages: Pages, now: float) -> NDArray[np.float64]:
        ages = np.maximum(max(now, self._latest) - self._ranking.last[pages], 0.0)
        chances: NDArray[np.float64] = self._model.chance[self._facts[pages, KIND], age_bins(ages)]
        return chances

    def here(self, pages: Pages) -> Mask:
        return self._ranking.which(pages)

    def __len__(self) -> int:
        return len(self._ranking)

    def check_integrity(self) -> None:
        self._ranking.check_integrity()
        pages = np.flatnonzero(self._ranking.here)
        if not np.array_equal(self._facts[pages, KIND], self._model.kinds_of(self._combined[pages])):
            raise IntegrityError("a page is of another kind than its features say")
        if np.count_nonzero(self._facts[:, USES][pages] < 1):
            raise IntegrityError("a page is here that was never used")
