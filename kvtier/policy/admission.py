"""Whether a page that leaves a tier is worth the write into the one below, judged by what the write pushes out.

A tier has room for one page only if another goes, so a write costs what that other page would have brought: the chance with which pages
that left the cache for good are wanted again before as many more have left as the last tier holds: what a tier of twice the size would
still have found. This is measured (*regret*: left or refused, and then computed again), not set; while nothing has to leave, writing
costs nothing and everything is admitted. A page whose own chance of another use (`EvictionPolicy.chance`) is below that price is not
written.

Estimates may err, and their errors come back as regret, too: chances are corrected by the ratio of refused pages that were wanted again
to as many as were foreseen. Both fade, so a judge that refused too much opens by itself and tries again later.

One object per cache, owned by whoever owns the policies and called under the same lock. Pages that left are remembered by name
(`EvictionPolicy.names`) in bounded memory, a cell or two for each page of the last tier.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtier.policy.base import Mask, Pages
from kvtier.policy.memory import Memory

AUTO, ALWAYS = "auto", "always"
ADMISSIONS = (AUTO, ALWAYS)

DOUBT = 64
"""Pages that left and were not wanted again, as many as are taken for granted before there is any experience."""
PERIODS = 4
"""Experience is halved whenever so many times the pages of the last tier have left."""


@dataclass
class Regret:
    """What was written down and what was not, and what of the pages that left the cache for good had to be computed again."""

    admitted: int = 0
    """Pages that left a tier and were worth a write into a colder one."""
    refused: int = 0
    """Pages that left the cache because they were not."""
    evicted: int = 0
    """Pages that left the cache for other reasons, for want of room."""
    refused_wanted: int = 0
    """Refused pages that were computed again."""
    evicted_wanted: int = 0
    """Evicted pages that were computed again."""


class Admission:
    """Judges with the experience of one cache, whose last tier has room for `room` pages.

    `mode`: `auto`, or `always` to admit everything and only measure.
    """

    def __init__(self, room: int, mode: str = AUTO) -> None:
        self.mode = mode
        self._room = room
        self.regret = Regret()
        self._gone = Memory(1, per_page=1)
        self._gone.fit(room)
        self._evicted = self._evicted_wanted = 0.0
        self._refused_wanted = self._promised = 0.0
        """Of refused pages, those that were computed again, and as many as their chances promised. As the two before, fading."""
        self._counted = self._since_faded = 0

    @property
    def price(self) -> float:
        """The chance of another use that a page must have to be worth a write: that of the pages which leave to make room."""
        return self._evicted_wanted / (self._evicted + DOUBT)

    @property
    def error(self) -> float:
        """How many times more refused pages were wanted again than was foreseen, 1 at least."""
        return max(1.0, (self._refused_wanted + 1) / (self._promised + 1))

    def worth(self, chances: NDArray[np.float64]) -> Mask:
        """Which pages with these chances of another use `[n]` are worth a write. Nothing is counted."""
        worth: Mask = np.ones(len(chances), np.bool_) if self.mode == ALWAYS else chances * self.error >= self.price
        return worth

    def admit(self, pages: int) -> None:
        """So many pages go down."""
        self.regret.admitted += pages

    def refuse(self, names: Pages, chances: NDArray[np.float64]) -> None:
        """Pages of these names and chances leave the cache unwritten."""
        self.regret.refused += len(names)
        self._promised += float(chances.sum())
        self._remember(names, True)

    def evict(self, names: Pages) -> None:
        """Pages of these names leave the cache for want of room."""
        self.regret.evicted += len(names)
        self._evicted += len(names)
        self._remember(names, False)

    def computed(self, names: Pages) -> None:
        """Pages of these names were computed: those that had been in the cache not long ago, had to be computed again."""
        _, left, facts = self._gone.recall(names)
        refused = facts[left >= self._counted - self._room]
        wanted = int(np.count_nonzero(refused))
        self.regret.refused_wanted += wanted
        self.regret.evicted_wanted += len(refused) - wanted
        self._refused_wanted += wanted
        self._evicted_wanted += len(refused) - wanted

    def _remember(self, names: Pages, refused: bool) -> None:
        if not len(names):
            return
        self._counted += len(names)
        # The table forgets who left first, so the number of those who left is its clock.
        self._gone.leave(names, np.full(len(names), float(self._counted)), np.full((len(names), 1), int(refused)))
        self._since_faded += len(names)
        if self._since_faded > PERIODS * self._room:
            self._since_faded = 0
            self._evicted /= 2
            self._evicted_wanted /= 2
            self._refused_wanted /= 2
            self._promised /= 2
