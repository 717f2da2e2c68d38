"""The host tier: one preallocated arena of equal slots in this process's memory, locked and pinned where the machine allows.

`reserve`, `free` and the counters are called under the cache's lock. `store` and `load` run in several threads, each slot in one of
them; they touch only that slot's bytes and columns. Layout and format are fixed for the tier's life, so a copy proves itself by its
key and an xxh3-64 checksum of its bytes, both compared in every `load`.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from kvtier.errors import ConfigError, IntegrityError
from kvtier.formats.base import Format, Payload
from kvtier.keys import PageKey
from kvtier.layout import PageLayout
from kvtier.tiers.base import PageId, Refused, Tier

Switch = Literal["auto", "on", "off"]

_CACHE_LINE_BYTES = 64
_PIN_CHUNK_BYTES = 1 << 30
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device, not only the current one
_CGROUPS = Path("/sys/fs/cgroup")
_log = logging.getLogger(__name__)
_libc = ctypes.CDLL(None, use_errno=True)


class HostTier(Tier):
    """Copies in host memory, `capacity_bytes // slot_bytes` of them, gone when the process ends.

    `mlock`: keep the arena from being swapped. `pin`: register it with CUDA. Each "auto" (tried, else done without), "on" (or
    ConfigError) or "off". `load` returns views of the arena: valid until the slot is freed, not to be written to.

    Raises ConfigError for a capacity below one page or beyond this machine's (or this container's) memory, for formats whose payloads
    vary in size, and for an "on" that cannot be met.
    """

    name = "host"

    def __init__(self, layout: PageLayout, format: Format, capacity_bytes: int, mlock: Switch = "auto", pin: Switch = "auto") -> None:
        if not format.fixed_size:
            advice = "a byte stage saves nothing in fixed slots; leave it off here and use it on disk"
            raise ConfigError(f"host.format is {format.name!r}, whose pages vary in size: {advice}")
        self.layout = layout
        self.format = format
        self.capacity_bytes = capacity_bytes
        self._payload_bytes = format.payload_bytes(layout)
        self.slot_bytes = -(-self._payload_bytes // _CACHE_LINE_BYTES) * _CACHE_LINE_BYTES
        if capacity_bytes < self.slot_bytes:
            needed = f"one {format.name} page of this layout takes {self.slot_bytes} bytes"
            raise ConfigError(f"host.capacity_bytes is {capacity_bytes}, but {needed}; raise it")
        limit, whose = memory_limit()
        if capacity_bytes > limit:
            raise ConfigError(f"host.capacity_bytes is {capacity_bytes}, but {whose} is {limit} bytes; lower it")

        slots = capacity_bytes // self.slot_bytes
        self._arena = _Arena(slots * self.slot_bytes, mlock, pin)
        self._bytes = self._arena.bytes.reshape(slots, self.slot_bytes)[:, : self._payload_bytes]
        self._reserved = np.zeros(slots, dtype=np.bool_)
        self._key: list[PageKey | None] = [None] * slots
        self._checksum = np.zeros(slots, dtype=np.uint64)
        self._free = list(range(slots - 1, -1, -1))
        self._closed = False

    @property
    def bytes_used(self) -> int:
        return (self.capacity_slots - len(self._free)) * self.slot_bytes

    @property
    def free_slots(self) -> int:
        return 0 if self._closed else len(self._free)

    @property
    def capacity_slots(self) -> int:
        return len(self._key)

    def reserve(self, count: int) -> list[int] | None:
        if count > self.free_slots:
            return None
        slots = [self._free.pop() for _ in range(count)]
        self._reserved[slots] = True
        return slots

    def free(self, slots: Sequence[int]) -> None:
        self._check_reserved(slots)
        if len(set(slots)) != len(slots):
            raise IntegrityError(f"host: a slot is freed twice in one call: {list(slots)}")
        for slot in slots:
            self._reserved[slot] = False
            self._key[slot] = None
            self._free.append(slot)

    def store(self, slots: Sequence[int], pages: Sequence[PageId], payloads: Sequence[Payload]) -> list[Refused | None]:
        self._check_reserved(slots)
        return [self._write(*copy) for copy in zip(slots, pages, payloads, strict=True)]

    def load(self, slots: Sequence[int], keys: Sequence[PageKey], staging: NDArray[np.uint8]) -> list[Payload | Refused]:  # noqa: ARG002
        return [self._read(*copy) for copy in zip(slots, keys, strict=True)]

    def check_integrity(self) -> None:
        if sorted(self._free) != np.flatnonzero(~self._reserved).tolist():
            raise IntegrityError("host: the free list is not the list of slots that are not reserved")
        strays = [slot for slot in self._free if self._key[slot] is not None]
        if strays:
            raise IntegrityError(f"host: free slots hold copies: {strays}")

    def report(self) -> dict[str, object]:
        """What was achieved: sizes in bytes; mlock, pin and huge pages as what is true now. Reads /proc, some milliseconds."""
        return {
            "format": self.format.name,
            "capacity_bytes": self.capacity_bytes,
            "bytes_used": self.bytes_used,
            "slot_bytes": self.slot_bytes,
            "free_slots": self.free_slots,
            **self._arena.report(),
        }

    def close(self) -> None:
        """Unpin and release the arena, whose memory goes once the last view of it is gone. Later stores and loads are refused."""
        if not self._closed:
            self._closed = True
            self._key = [None] * self.capacity_slots
            self._bytes = self._bytes[:0].copy()
            self._arena.close()

    def _check_reserved(self, slots: Sequence[int]) -> None:
        for slot in slots:
            if not 0 <= slot < self.capacity_slots or not self._reserved[slot]:
                raise IntegrityError(f"host: slot {slot} is not reserved")

    def _write(self, slot: int, page: PageId, payload: Payload) -> Refused | None:
        if self._closed:
            return Refused("closed")
        if payload.dtype != np.uint8 or payload.shape != (self._payload_bytes,):
            return Refused("format")
        payload = np.ascontiguousarray(payload)
        if self._key[slot] is not None:
            raise IntegrityError(f"host: slot {slot} already holds a copy; free it before storing another one")
        # Of the source, not of the arena: a copy that went wrong on the way must not prove itself right.
        self._checksum[slot] = xxhash.xxh3_64_intdigest(payload.data)
        self._bytes[slot] = payload
        self._key[slot] = page.key
        return None

    def _read(self, slot: int, key: PageKey) -> Payload | Refused:
        if self._closed:
            return Refused("closed")
        if not 0 <= slot < self.capacity_slots or self._key[slot] != key:
            return Refused("key")
        payload = self._bytes[slot]
        return payload if xxhash.xxh3_64_intdigest(payload.data) == self._checksum[slot] else Refused("checksum")


class _Arena:
    """`size_bytes` of zeroed anonymous memory, with huge pages, locked and pinned as far as asked for and possible."""

    def __init__(self, size_bytes: int, mlock: Switch, pin: Switch) -> None:
        try:
            memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise ConfigError(f"host.capacity_bytes: the system refuses {size_bytes} bytes: {error.strerror}; lower it") from error
        self.bytes: NDArray[np.uint8] = np.frombuffer(memory, dtype=np.uint8)
        self.huge_pages_advised = _advise_huge_pages(memory)
        self.locked = mlock != "off" and self._lock(required=mlock == "on")
        self._pinned_chunks: list[int] = []
        if pin != "off":
            self._pin(required=pin == "on")

    @property
    def address(self) -> int:
        return self.bytes.ctypes.data

    def report(self) -> dict[str, object]:
        return {
            "arena_bytes": self.bytes.nbytes,
            "mlock": self.locked,
            "pinned": bool(self._pinned_chunks),
            "huge_pages_advised": self.huge_pages_advised,
            "huge_page_bytes": _huge_page_bytes(self.address, self.bytes.nbytes),
        }

    def close(self) -> None:
        """Unpin; drop the memory, which unlocks it."""
        self._unpin()
        self.locked = False
        self.bytes = np.zeros(0, dtype=np.uint8)

    def _lock(self, required: bool) -> bool:
        if _libc.mlock(ctypes.c_void_p(self.address), ctypes.c_size_t(self.bytes.nbytes)) == 0:
            return True
        why = os.strerror(ctypes.get_errno())
        # A refused mlock may have locked a part.
        _libc.munlock(ctypes.c_void_p(self.address), ctypes.c_size_t(self.bytes.nbytes))
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        limit = f"RLIMIT_MEMLOCK is {'unlimited' if soft == resource.RLIM_INFINITY else f'{soft} bytes'}"
        if required:
            advice = "raise the limit (`ulimit -l`), grant CAP_IPC_LOCK, or set host.mlock to auto or off"
            raise ConfigError(f"host.mlock is on, but {self.bytes.nbytes} bytes cannot be locked: {why} ({limit}); {advice}")
        _log.info("host tier: %d bytes are not locked in memory: %s (%s)", self.bytes.nbytes, why, limit)
        return False

    def _pin(self, required: bool) -> None:
        if not torch.cuda.is_available():
            if required:
                raise ConfigError("host.pin is on, but CUDA is not available here; set host.pin to auto or off")
            return
        runtime = _cuda_runtime()
        for start in range(0, self.bytes.nbytes, _PIN_CHUNK_BYTES):
            size = min(_PIN_CHUNK_BYTES, self.bytes.nbytes - start)
            code = int(runtime.cudaHostRegister(self.address + start, size, _PORTABLE))
            if code != 0:
                self._unpin()
                why = f"cudaHostRegister failed with error {code} after {start} of {self.bytes.nbytes} bytes"
                if required:
                    raise ConfigError(f"host.pin is on, but {why}; lower host.capacity_bytes, or set host.pin to auto or off")
                _log.info("host tier: not pinned: %s", why)
                return
            self._pinned_chunks.append(self.address + start)

    def _unpin(self) -> None:
        for address in self._pinned_chunks:
            _cuda_runtime().cudaHostUnregister(address)
        self._pinned_chunks = []


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def memory_limit() -> tuple[int, str]:
    """The most bytes of memory this process can ever have, and what says so."""
    limits = [(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "the physical memory of this machine")]
    for group in (_CGROUPS, *_own_cgroups()):
        try:
            text = (group / "memory.max").read_text().strip()
        except OSError:
            continue
        if text != "max":
            limits.append((int(text), f"the limit in {group / 'memory.max'}"))
    return min(limits)


def _own_cgroups() -> list[Path]:
    """This process's control group (version 2) and those above it, as folders."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    names = [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    return [_CGROUPS / part for name in names for part in (Path(name), *Path(name).parents)]


def _advise_huge_pages(memory: mmap.mmap) -> bool:
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return False
    return True


def _huge_page_bytes(address: int, size_bytes: int) -> int:
    """How much of the memory at `address` the kernel backs with huge pages now."""
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return 0
    total, inside = 0, False
    for line in lines:
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            start, _, end = name.partition("-")
            inside = int(start, 16) < address + size_bytes and address < int(end, 16)
        elif inside and name == "AnonHugePages:":
            total += int(rest.split()[0]) * 1024
    return min(total, size_bytes)
