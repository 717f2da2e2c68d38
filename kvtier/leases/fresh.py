"""Full pages that are about to be written into device slots: as an engine computed them, or as another cache has them on its device.

A source names its pages by their places, 0 to `count` - 1, and holds no state of the cache that takes them. Whoever made it keeps the pages
where they are until they were written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from kvtier.layout import PageLayout
from kvtier.tiers.device import DevicePool
from kvtier.tiers.gpu import GpuPool


class FreshPages(ABC):
    """`count` pages that follow each other."""

    count: int

    @abstractmethod
    def write(self, pool: DevicePool, slots: Sequence[int], places: Sequence[int]) -> None:
        """Write the pages at these places into these slots of `pool`, which nobody else can see yet. DeviceError if a GPU fails."""

    @abstractmethod
    def after(self, pages: int) -> FreshPages:
        """Those behind the first `pages`."""


class Computed(FreshPages):
    """The full pages of `kv` `[layers, planes, tokens, kv_heads, head_dim]`."""

    def __init__(self, kv: torch.Tensor, layout: PageLayout) -> None:
        self.count = kv.shape[2] // layout.page_tokens
        self._kv, self._layout = kv, layout
        shape = (layout.layers, layout.planes, self.count, layout.page_tokens, layout.kv_heads, layout.head_dim)
        self._pages = kv[:, :, : self.count * layout.page_tokens].reshape(shape).permute(2, 0, 1, 3, 4, 5)

    def write(self, pool: DevicePool, slots: Sequence[int], places: Sequence[int]) -> None:
        pool.scatter(slots, self._pages if len(places) == self.count else self._pages[list(places)])

    def after(self, pages: int) -> FreshPages:
        return Computed(self._kv[:, :, pages * self._layout.page_tokens :], self._layout)


class Held(FreshPages):
    """Pages in these slots of another cache's device, which a lease keeps there: copied directly between GPUs that reach each other, else
    through host memory."""

    def __init__(self, pool: DevicePool, slots: Sequence[int]) -> None:
        self.count = len(slots)
        self._pool, self._slots = pool, list(slots)

    def write(self, pool: DevicePool, slots: Sequence[int], places: Sequence[int]) -> None:
        held = [self._slots[place] for place in places]
        if isinstance(self._pool, GpuPool) and isinstance(pool, GpuPool) and self._pool.accelerator.reaches(pool.accelerator):
            self._pool.copy_to(held, pool, slots)
        else:
            pool.scatter(slots, self._pool.gather(held))

    def after(self, pages: int) -> FreshPages:
        return Held(self._pool, self._slots[pages:])
