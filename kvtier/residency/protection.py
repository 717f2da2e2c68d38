"""Which pages a policy may not choose: the one place where holders, readers, pins and children are weighed.

Made under the residency's lock for one question to a policy, and forgotten after it.
"""

from __future__ import annotations

import numpy as np

from kvtier.pages import ABSENT, NO_TIER, READY, Exit, PageTable, Rows
from kvtier.pages.columns import HOLLOW
from kvtier.policy import Mask

# Without dimensions: with a Python number, NumPy spends longer on finding the type than on a whole request's rows.
_NOBODY, _ONE, _NO_TIER = np.array(0), np.array(1), np.array(NO_TIER)


class Protected:
    """The pages that are leased, being read in `tier`, pinned to it at time `now`, or the last copy of a page that others build on.

    With `hinted`, also those that a hint brought up and nobody used yet. A `kvtier.policy.Protection`, to be used within `with`. A page
    whose children were asked about before it, and would leave with their only copies, is not kept for them.
    """

    __slots__ = ("_hinted", "_leaving", "_now", "_table", "_tier", "notes_children")

    def __init__(self, table: PageTable, tier: int, now: float, hinted: bool = False) -> None:
        self._hinted = hinted
        self._table = table
        self._tier = tier
        self._now = now
        self.notes_children = tier == table.tiers - 1 and (tier > 0 or bool(table.counts[HOLLOW]))
        """Whether the last copy of a page may be in that tier while others build on it. Children that leave are noted in the table then, as
        long as this is entered: they keep their parents else."""
        self._leaving: list[Rows] = []

    def __enter__(self) -> Protected:
        return self

    def __exit__(self, *_: object) -> None:
        for parents in self._leaving:
            self._table.leaving[parents] = _NOBODY

    @property
    def exit(self) -> Exit | None:
        """The same question for compiled loops."""
        return self._table.exit(self._tier, self._now, None, self._hinted)

    def __call__(self, pages: Rows) -> Mask:
        """Which of these pages may not leave."""
        table, tier = self._table, self._tier
        kept: Mask = table.held(pages, tier)
        if self._hinted:
            kept |= table.prefetched_from[pages] != _NO_TIER
        if (pinned := table.any_pinned(pages, self._now)) is not None:
            for index in np.flatnonzero(pinned & ~kept).tolist():
                kept[index] = self._is_pinned_here(int(pages[index]))
        if self.notes_children:
            self._add_parents(pages, kept)
        return kept

    def _is_pinned_here(self, page: int) -> bool:
        floor = self._table.pinned(page, self._now)
        if self._tier < floor:
            return False
        others = self._table.state[: floor + 1, page].copy()
        others[self._tier :] = ABSENT
        return not (others == READY).any()

    def _add_parents(self, pages: Rows, kept: Mask) -> None:
        table = self._table
        parents = table.parent[pages[~kept & table.is_alone(pages, self._tier)]]
        np.add.at(table.leaving, parents, _ONE)
        self._leaving.append(parents)
        needed = table.children[pages] > table.leaving[pages]
        if np.count_nonzero(needed):
            kept |= needed & ~table.has_copy_above(pages, self._tier)
