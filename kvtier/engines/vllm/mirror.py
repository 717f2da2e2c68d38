"""The scheduler's picture of what the workers hold. It may be stale: a page that is gone fails to load and is computed again.

A page counts only where every worker has its part. State: the scheduler's thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from kvtier.keys import PageKey


class Mirror:
    """Per worker, which tiers have which pages, as bits."""

    def __init__(self, workers: int) -> None:
        self._masks: list[dict[PageKey, int]] = [{} for _ in range(workers)]

    def update(self, rank: int, masks: Mapping[PageKey, int]) -> list[tuple[PageKey, int, int]]:
        """What worker `rank` has now of some pages; (page, tiers before, tiers now) of those for which the whole picture changed."""
        mine, changed = self._masks[rank], []
        for key, mask in masks.items():
            before = self.tiers(key)
            if mask:
                mine[key] = mask
            else:
                mine.pop(key, None)
            if (now := self.tiers(key)) != before:
                changed.append((key, before, now))
        return changed

    def tiers(self, key: PageKey) -> int:
        """Bits of the tiers in which all workers have the page."""
        together = -1
        for masks in self._masks:
            together &= masks.get(key, 0)
        return together

    def holds(self, key: PageKey) -> bool:
        """Whether all workers have the page, each in any tier."""
        return all(key in masks for masks in self._masks)

    def prefix(self, keys: Sequence[PageKey]) -> int:
        """How many of the first `keys` all workers have."""
        return next((index for index, key in enumerate(keys) if not self.holds(key)), len(keys))

    def homes(self, keys: Sequence[PageKey]) -> NDArray[np.intp]:
        """For pages that all workers have, the warmest tier of the worker that has it coldest."""
        return np.array([max(_warmest(masks[key]) for masks in self._masks) for key in keys], np.intp)

    def clear(self) -> None:
        """Nobody has anything."""
        for masks in self._masks:
            masks.clear()


def _warmest(mask: int) -> int:
    return (mask & -mask).bit_length() - 1
