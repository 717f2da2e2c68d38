"""What is remembered of pages that left: columns of facts by name, a whole request at a time, in bounded memory.

A two-way set-associative table: a name has two cells; of two other pages in them the one that was used longer ago is forgotten. Nothing
is searched, moved or listed, whatever the size. (`kvtier.policy.ghosts` keeps an exact list instead, one page at a time.) The two cells of
a name are beside each other: with two facts they are one cache line.

Owned by one policy, called under the policy owner's lock. Names are `EvictionPolicy.names`.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kvtier.policy.base import Mask, Pages

GHOSTS_PER_PAGE = 32
"""Cells for every page the tier holds where nobody says, while that gives no more than FEW of them."""
FEW = 1 << 18
GHOSTS_PER_PAGE_OF_MANY = 4
_SPREAD = np.array(0x9E3779B97F4A7C15, np.uint64)
_ONE = np.array(1)
_EMPTY = np.array(-math.inf)

Facts = NDArray[np.int64]
"""`[n, facts]`: whole numbers about each page."""

_LINE = 64
"""Bytes of a cache line."""


def records(rows: int, width: int) -> Pages:
    """Zeros `[rows, width]`, of which the first begins a cache line."""
    cells = np.zeros(rows * width + _LINE // 8, np.int64)
    first = -cells.ctypes.data % _LINE // 8
    return cells[first : first + rows * width].reshape(rows, width)


class Memory:
    """`facts` whole numbers, and the time of the last use, of pages that left."""

    def __init__(self, facts: int, per_page: int = GHOSTS_PER_PAGE) -> None:
        self._width = facts
        self._per_page = per_page
        self._allot(1 << 10)

    def _allot(self, cells: int) -> None:
        self._shift = np.array(64 - (cells.bit_length() - 1), np.uint64)
        self.records: Pages = records(cells, 2 + self._width)
        """`[cells, 2 + facts]`: what `names`, `last` and `facts` are views of."""
        self.names: Pages = self.records[:, 0]
        self.last: NDArray[np.float64] = self.records.view(np.float64)[:, 1]
        self.facts: Facts = self.records[:, 2:]
        self.last[:] = _EMPTY

    @property
    def cells(self) -> int:
        """How many pages can be remembered at most."""
        return len(self.records)

    def __len__(self) -> int:
        return int(np.count_nonzero(self.last != _EMPTY))

    def leave(self, names: Pages, last: NDArray[np.float64], facts: Facts) -> None:
        """Pages of these names left."""
        self._put(names, last, facts)

    def fit(self, held: int) -> None:
        """Room for what a tier that held `held` pages can leave behind."""
        wanted = min(self._per_page * held, max(FEW, GHOSTS_PER_PAGE_OF_MANY * held))
        if wanted > self.cells:
            self._grow(1 << (wanted - 1).bit_length())

    def recall(self, names: Pages) -> tuple[Pages, NDArray[np.float64], Facts]:
        """Places among `names` of those that were remembered, their last uses and their facts; they are ghosts no more."""
        cells = self._cells(names)
        found = self._find(names, cells)
        other = cells ^ _ONE
        second = self._find(names, other) & ~found
        if np.count_nonzero(second):
            cells[second] = other[second]
            found |= second
        places = np.flatnonzero(found)
        if not len(places):
            return places, np.empty(0), np.empty((0, self._width), np.int64)
        cells = cells[places]
        last, facts = self.last[cells], self.facts[cells]
        self.last[cells] = _EMPTY
        return places, last, facts

    def _cells(self, names: Pages) -> Pages:
        return ((names.view(np.uint64) * _SPREAD) >> self._shift).view(np.int64)

    def _find(self, names: Pages, cells: Pages) -> Mask:
        found: Mask = (self.names[cells] == names) & (self.last[cells] != _EMPTY)
        return found

    def _put(self, names: Pages, last: NDArray[np.float64], facts: Facts) -> None:
        cells = self._cells(names)
        other = cells ^ _ONE
        cells = np.where(self.last[other] < self.last[cells], other, cells)
        self.names[cells] = names
        self.last[cells] = last
        self.facts[cells] = facts

    def _grow(self, cells: int) -> None:
        kept = np.flatnonzero(self.last != _EMPTY)
        names, last, facts = self.names[kept], self.last[kept], self.facts[kept]
        self._allot(cells)
        self._put(names, last, facts)
