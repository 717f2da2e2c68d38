"""What a list of copies is made of before a device gets it: neighbours become one, and never cross from one registration into another.

`RegisteredMemory` is what one device's host memory is: written by whoever registers, read by whoever copies, in any thread; the arrays are
replaced, never changed.
"""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from kvtier.cuda.surface import Addresses
from kvtier.errors import DeviceError


def joined(targets: Addresses, sources: Addresses, size_bytes: int, borders: Addresses) -> tuple[Addresses, Addresses, NDArray[np.uint64]]:
    """Copies of `size_bytes` each, with those that follow each other on both sides made one: targets, sources and bytes of each.

    Nothing is joined across an address of `borders`, where a registration begins. DeviceError unless there are as many of both.
    """
    if len(targets) != len(sources):
        raise DeviceError(f"{len(targets)} targets and {len(sources)} sources are given for copies; expected as many")
    joins = (np.diff(targets) == size_bytes) & (np.diff(sources) == size_bytes)
    if joins.any() and len(borders):
        joins &= ~((targets[1:, None] == borders) | (sources[1:, None] == borders)).any(1)
    if not joins.any():
        return targets, sources, np.full(len(targets), size_bytes, np.uint64)
    firsts = np.flatnonzero(np.concatenate(([True], ~joins)))
    counts = np.diff(np.append(firsts, len(targets)))
    return np.ascontiguousarray(targets[firsts]), np.ascontiguousarray(sources[firsts]), (counts * size_bytes).astype(np.uint64)


class RegisteredMemory:
    """Pieces of host memory that a device was told of."""

    def __init__(self) -> None:
        self._pieces: dict[int, int] = {}
        self._sorted: tuple[Addresses, Addresses] = (np.empty(0, np.int64), np.empty(0, np.int64))
        self._lock = threading.Lock()

    @property
    def starts(self) -> Addresses:
        """Where pieces begin, ascending."""
        return self._sorted[0]

    def add(self, address: int, size_bytes: int) -> None:
        """This piece is registered."""
        with self._lock:
            self._pieces[address] = address + size_bytes
            self._sort()

    def remove(self, address: int) -> None:
        """The piece that begins here is not any more."""
        with self._lock:
            del self._pieces[address]
            self._sort()

    def covers(self, addresses: Addresses, size_bytes: int) -> bool:
        """Whether every stretch of `size_bytes` from these addresses lies in one piece."""
        starts, ends = self._sorted
        places = np.searchsorted(starts, addresses, side="right") - 1
        return bool(len(starts)) and bool(((places >= 0) & (addresses + size_bytes <= ends[np.maximum(places, 0)])).all())

    def _sort(self) -> None:
        starts = sorted(self._pieces)
        self._sorted = np.array(starts, np.int64), np.array([self._pieces[start] for start in starts], np.int64)
