"""The arena: one large piece of memory, taken whole at start in the largest pages there are, so that no later write waits for a page.

Built in steps that undo themselves: see what can be had, reserve, place, lock, fill. Its owner is whoever built it; `bytes` may be used
by any thread.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kvtier.errors import ConfigError
from kvtier.memory.limits import available_memory, locked_memory_limit
from kvtier.memory.region import HUGE_PAGE_BYTES, PageKind, Region, reserve

Switch = Literal["auto", "on", "off"]
_MOST_THREADS = 16  # beyond that the memory is busy, not the threads
_log = logging.getLogger(__name__)


class Arena:
    """`size_bytes` of zeroed memory: `bytes`, uint8 `[size_bytes]`, aligned to 4096 bytes, and to 2 MiB unless it has 4 KiB pages only.

    `huge_pages`: "on" takes explicit ones (2 MiB each) from the system's pool; "auto" does if the pool has enough, else takes what
    transparent ones the kernel finds, else 4 KiB pages, and those always below 2 MiB; "off" takes 4 KiB pages. `mlock`: keep it from being
    swapped out. `threads` fill it; by default one per usable core, at most 16. `place`, called with address and length in bytes once the
    memory is reserved and before it is touched, may bind it to where it shall be; it raises a KVTierError to stop. `section` names the
    configuration section in messages.

    Raises ConfigError, with nothing taken or kept, if that much memory cannot be had here now, and for an "on" that cannot be met.
    """

    bytes: NDArray[np.uint8]

    def __init__(
        self,
        size_bytes: int,
        huge_pages: Switch = "auto",
        mlock: Switch = "auto",
        threads: int | None = None,
        place: Callable[[int, int], None] | None = None,
        section: str = "host",
    ) -> None:
        if size_bytes < 1:
            raise ConfigError(f"{section}.capacity_bytes is {size_bytes}; give at least 1")
        self._section = section
        self._mlock = mlock
        self._threads = threads or min(_MOST_THREADS, len(os.sched_getaffinity(0)))
        self._place = place
        self.locked = False
        started = time.perf_counter()
        region = self._take(size_bytes, huge_pages)
        self._seconds = time.perf_counter() - started
        self._region: Region | None = region
        self.bytes = region.array(size_bytes)

    def report(self) -> dict[str, object]:
        """What was achieved: `arena_bytes` usable, `mapped_bytes` with the end of the last page, kind and bytes of huge pages, `mlock`,
        and the seconds and threads it took. Reads /proc, some milliseconds."""
        return {
            "arena_bytes": self.bytes.nbytes,
            "mapped_bytes": self._region.length_bytes if self._region else 0,
            "huge_pages": self._kind,
            "huge_page_bytes": self._huge_page_bytes(self._region) if self._region else 0,
            "mlock": self.locked,
            "fill_seconds": round(self._seconds, 6),
            "fill_threads": self._threads,
        }

    def close(self) -> None:
        """Let go of the memory, which unlocks it: gone at once, or with the last array that views it. Safe to call twice."""
        self.bytes = np.zeros(0, dtype=np.uint8)
        self._region = None
        self.locked = False

    def _take(self, size_bytes: int, huge_pages: Switch) -> Region:
        why = "below 2 MiB"
        if huge_pages == "on" or (huge_pages == "auto" and size_bytes >= HUGE_PAGE_BYTES):
            try:
                return self._take_of(size_bytes, "explicit")
            except OSError as error:
                pages = -(-size_bytes // HUGE_PAGE_BYTES)
                why = f"no {pages} pages of 2 MiB in the pool: {error.strerror}"
                if huge_pages == "on":
                    raise ConfigError(
                        f"{self._section}.huge_pages is on, but there are {why}; raise the pool (`sysctl vm.nr_hugepages={pages}`, more if "
                        f"others use it too), or set {self._section}.huge_pages to auto"
                    ) from None
        transparent = huge_pages == "auto" and size_bytes >= HUGE_PAGE_BYTES
        try:
            region = self._take_of(size_bytes, "transparent" if transparent else "none")
        except OSError as error:
            raise ConfigError(
                f"{self._section}.capacity_bytes: the system refuses {size_bytes} bytes: {error.strerror}; lower it, or raise its limits "
                "(`ulimit -v`, vm.overcommit_memory)"
            ) from None
        if transparent:
            found = self._huge_page_bytes(region)
            self._kind = "transparent" if found else "none"
            _log.info("%s arena: %d of %d bytes in transparent huge pages (%s)", self._section, found, region.length_bytes, why)
        return region

    def _take_of(self, size_bytes: int, kind: PageKind) -> Region:
        """A filled region of one kind of pages; whatever goes wrong, nothing stays mapped. OSError if the system refuses."""
        if kind != "explicit":
            self._check_room(size_bytes)
        region = reserve(size_bytes, kind)
        try:
            if self._place is not None:
                self._place(region.address, region.length_bytes)
            # The system never swaps explicit huge pages, and asking it to lock them would only meet the limit on locked memory.
            self.locked = self._mlock != "off" and (kind == "explicit" or self._lock(region))
            region.fill(self._threads)
        except BaseException:
            region.release()
            raise
        self._kind = kind
        return region

    def _check_room(self, size_bytes: int) -> None:
        room = available_memory()
        if size_bytes > room.bytes:
            raise ConfigError(
                f"{self._section}.capacity_bytes is {size_bytes}, but only {room.bytes} bytes of memory can be had: {room.why}; lower it"
            )

    def _lock(self, region: Region) -> bool:
        try:
            region.lock()
        except OSError as error:
            why = f"{error.strerror} ({locked_memory_limit()})"
            if self._mlock == "on":
                raise ConfigError(
                    f"{self._section}.mlock is on, but {region.length_bytes} bytes cannot be locked: {why}; raise the limit (`ulimit -l`), "
                    f"grant CAP_IPC_LOCK, or set {self._section}.mlock to auto or off"
                ) from None
            _log.info("%s arena: %d bytes are not locked in memory: %s", self._section, region.length_bytes, why)
            return False
        return True

    def _huge_page_bytes(self, region: Region) -> int:
        return region.length_bytes if self._kind == "explicit" else region.huge_page_bytes()
