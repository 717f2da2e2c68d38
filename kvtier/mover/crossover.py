"""Copy engines or a kernel? How long both take for copies between host and GPU, measured once, and which of them the next ones go by.

A copy engine needs some time for each copy, a kernel none, but it moves bytes more slowly and takes processors from the engine. So for
few or large pieces the copy engines win, for many small ones the kernel; where one takes over from the other depends on the machine, and is
measured on a lane's own stream when a cache is opened. Between the points that were measured, the logarithm of the ratio is interpolated;
beyond them, that of the nearest point counts. Pure but for `measured`, which does as its `seconds` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Way = Literal["d2h", "h2d"]
WAYS: tuple[Way, ...] = ("d2h", "h2d")
COPIES = (8, 64)
SIZES_BYTES = (4 << 10, 16 << 10, 64 << 10, 256 << 10)
"""The points at which both are measured: so many copies of each of these sizes, from 32 KiB to 16 MiB together."""
MARGIN = 0.9
"""A kernel has to take at most that share of the copy engines' time: it takes processors that the engine could use."""
UNIT_BYTES = 16
"""What a kernel copies multiples of, between addresses that are."""


@dataclass(frozen=True, eq=False)
class Crossover:
    """Seconds of both ways at the points there was room to measure: fp64 `[len(copies), len(sizes)]` each, per direction.

    Nothing measured (`why` says why) means: always the copy engines.
    """

    copies: tuple[int, ...] = ()
    sizes_bytes: tuple[int, ...] = ()
    engine_s: dict[Way, NDArray[np.float64]] | None = None
    kernel_s: dict[Way, NDArray[np.float64]] | None = None
    why: str = ""

    def ratio(self, way: Way, copies: int, size_bytes: int) -> float:
        """How long the kernel takes for these copies, as a share of what the copy engines take; infinite where nothing was measured."""
        if self.engine_s is None or self.kernel_s is None:
            return float("inf")
        logs = np.log(self.kernel_s[way] / self.engine_s[way])
        by_size = [float(np.interp(np.log(size_bytes), np.log(self.sizes_bytes), row)) for row in logs]
        return float(np.exp(np.interp(np.log(copies), np.log(self.copies), by_size)))

    def by_kernel(self, way: Way, copies: int, size_bytes: int) -> bool:
        """Whether so many copies of `size_bytes` each go by the kernel."""
        return self.engine_s is not None and copies > 0 and size_bytes > 0 and _ratio(self, way, copies, size_bytes) <= MARGIN

    def bytes_below(self, way: Way, copies: int) -> int:
        """The largest size, to half a power of two and within what was measured, at which that many copies go by the kernel; 0 for none."""
        if not self.sizes_bytes:
            return 0
        sizes = sorted(size for power in range(self.sizes_bytes[0].bit_length() - 1, 40) for size in (1 << power, 3 << (power - 1)))
        return max((size for size in sizes if size <= self.sizes_bytes[-1] and self.by_kernel(way, copies, size)), default=0)

    def as_json(self) -> dict[str, object]:
        """For `stats()`: the sizes below which the kernel takes over, by direction and number of copies, or why there is no choice."""
        if self.engine_s is None or self.kernel_s is None:
            return {"kernel_below_bytes": None, "why_copies_only": self.why}
        below = {way: {str(copies): self.bytes_below(way, copies) for copies in self.copies} for way in WAYS}
        points = [
            {
                "way": way,
                "copies": copies,
                "bytes": size,
                "copies_us": round(float(self.engine_s[way][row, column]) * 1e6, 1),
                "kernel_us": round(float(self.kernel_s[way][row, column]) * 1e6, 1),
            }
            for way in WAYS
            for row, copies in enumerate(self.copies)
            for column, size in enumerate(self.sizes_bytes)
        ]
        return {"kernel_below_bytes": below, "why_copies_only": "", "measured": points}


@lru_cache(maxsize=1024)
def _ratio(crossover: Crossover, way: Way, copies: int, size_bytes: int) -> float:
    """`Crossover.ratio`, which takes some 20 us, for what is asked for each step of layers."""
    return crossover.ratio(way, copies, size_bytes)


def measured(seconds: Callable[[Way, bool, int, int], float], room_bytes: int) -> Crossover:
    """Both ways at all points whose copies fit `room_bytes` together; `seconds(way, by_kernel, copies, size_bytes)` measures one.

    Some ten milliseconds: at most 4 x 4 x 24 MiB are copied, each point once to warm up and three times for the least.
    """
    sizes = tuple(size for size in SIZES_BYTES if size * COPIES[0] <= room_bytes)
    copies = tuple(count for count in COPIES if sizes and count * sizes[-1] <= room_bytes)
    if not sizes:
        return Crossover(why=f"a lane has room for {room_bytes} bytes, too few to measure with")

    def least(way: Way, by_kernel: bool, count: int, size: int) -> float:
        seconds(way, by_kernel, count, size)
        return max(1e-9, min(seconds(way, by_kernel, count, size) for _ in range(3)))

    def table(by_kernel: bool) -> dict[Way, NDArray[np.float64]]:
        return {way: np.array([[least(way, by_kernel, count, size) for size in sizes] for count in copies]) for way in WAYS}

    return Crossover(copies, sizes, table(False), table(True))
