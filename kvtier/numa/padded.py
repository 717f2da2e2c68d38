"""Numbers that several threads write at once, each thread on cache lines of its own, so that none takes a line away from another."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

from kvtier.errors import NumaError
from kvtier.numa.topology import ROOT, read_number

_USUAL_LINE_BYTES = 64
_WORD_BYTES = ctypes.sizeof(ctypes.c_int64)


@lru_cache(maxsize=4)
def cache_line_bytes(root: Path = ROOT) -> int:
    """Bytes of a cache line as the kernel tells, 64 where it does not."""
    return read_number(root / "sys/devices/system/cpu/cpu0/cache/index0/coherency_line_size", _USUAL_LINE_BYTES)


def padded_bytes(size_bytes: int) -> int:
    """`size_bytes`, rounded up to whole cache lines."""
    line = cache_line_bytes()
    return -(-size_bytes // line) * line


class PaddedCounters:
    """`counters` whole numbers for each of `threads`, every thread's on cache lines of its own. A thread adds to its own without a lock;
    anyone may read. NumaError for none of either."""

    def __init__(self, threads: int, counters: int) -> None:
        if threads < 1 or counters < 1:
            raise NumaError(f"{counters} counters for {threads} threads; expected at least one of each")
        self._threads, self._counters = threads, counters
        self.stride_bytes = padded_bytes(counters * _WORD_BYTES)
        self._memory = ctypes.create_string_buffer(threads * self.stride_bytes + cache_line_bytes())
        address = ctypes.addressof(self._memory)
        self.address = padded_bytes(address)
        self._rows = [(ctypes.c_int64 * counters).from_address(self.address + thread * self.stride_bytes) for thread in range(threads)]

    def add(self, thread: int, counter: int, count: int = 1) -> None:
        """Called by that thread alone."""
        self._rows[thread][counter] += count

    def totals(self) -> list[int]:
        """Each counter over all threads."""
        return [sum(row[counter] for row in self._rows) for counter in range(self._counters)]
