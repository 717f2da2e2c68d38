"""The host tier: one arena of equal slots in this process's memory, taken at start, locked and pinned where the machine allows.

`reserve`, `free` and the counters are called under the cache's lock. `store` and `load` run in several threads, each slot in one of
them; they touch only that slot's bytes and columns. Layout and format are fixed for the tier's life, so a copy proves itself by its
key and an xxh3-64 checksum of its bytes, both compared in every `load`.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Sequence
from itertools import chain

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvtier.cuda.registration import Registration
from kvtier.cuda.surface import Accelerator, Addresses
from kvtier.errors import ConfigError, IntegrityError
from kvtier.formats.base import Format, Payload
from kvtier.keys import PageKey
from kvtier.layout import PageLayout
from kvtier.memory.arena import Arena, Switch
from kvtier.tiers.base import PageId, Refused, Tier
from kvtier.tiers.host_nodes import NumaMode, choose_nodes

_CACHE_LINE_BYTES = 64
_UINT8 = np.dtype(np.uint8)
_log = logging.getLogger(__name__)


class HostTier(Tier):
    """Copies in host memory, `capacity_bytes // slot_bytes` of them, gone when the process ends.

    `mlock`: keep the arena from being swapped. `pin`: register it with `accelerator`, the GPU that pages come from; "auto" as far as that
    goes. `huge_pages`: see `Arena`. Each "auto" (tried, else done without), "on" (or ConfigError) or "off". `numa`, `numa_nodes`: see
    `choose_nodes`; `near` is the torch device that pages come from. Slots on the nearest node are given out first.
    `load` returns views of the arena: valid until the slot is freed, not to be written to.

    Raises ConfigError for a capacity below one page or beyond the memory that this machine (or container) has left, for formats whose
    payloads vary in size, and for an "on" that cannot be met.
    """

    name = "host"
    in_memory = True

    def __init__(
        self,
        layout: PageLayout,
        format: Format,
        capacity_bytes: int,
        mlock: Switch = "auto",
        pin: Switch = "auto",
        huge_pages: Switch = "auto",
        numa: NumaMode = "auto",
        numa_nodes: Sequence[int] = (),
        near: str = "cpu",
        accelerator: Accelerator | None = None,
    ) -> None:
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
        slots = capacity_bytes // self.slot_bytes
        self._nodes = choose_nodes(numa, numa_nodes, near, slots * self.slot_bytes)
        self._arena = Arena(slots * self.slot_bytes, huge_pages, mlock, place=self._nodes.place, section="host")
        self._address = self._arena.bytes.ctypes.data
        self._registration = Registration(None if pin == "off" else accelerator, self._address, self._arena.bytes.nbytes, self.slot_bytes)
        if pin != "off" and self._registration.why:
            if pin == "on":
                self._registration.undo()
                self._arena.close()
                raise ConfigError(
                    f"host.pin is on, but {self._registration.why}; lower host.capacity_bytes, or set host.pin to auto or off"
                )
            _log.info("host tier: %d bytes pinned: %s", self._registration.registered_bytes, self._registration.why)
        self._bytes = self._arena.bytes.reshape(slots, self.slot_bytes)[:, : self._payload_bytes]
        self._reserved = bytearray(slots)
        self._key: list[PageKey | None] = [None] * slots
        self._checksum = [0] * slots
        # Free slots of each NUMA node, nearest first; a slot over a boundary counts to the nearer one.
        self._firsts = [-(-segment.start // self.slot_bytes) for segment in self._nodes.segments] or [0]
        self._free = [list(range(end - 1, first - 1, -1)) for first, end in zip(self._firsts, [*self._firsts[1:], slots], strict=True)]
        self.all_direct = bool(self.direct(range(slots)).all())
        self._closed = False

    @property
    def bytes_used(self) -> int:
        return (self.capacity_slots - sum(map(len, self._free))) * self.slot_bytes

    @property
    def free_slots(self) -> int:
        return 0 if self._closed else sum(map(len, self._free))

    @property
    def capacity_slots(self) -> int:
        return len(self._key)

    def reserve(self, count: int) -> list[int] | None:
        if count > self.free_slots:
            return None
        slots: list[int] = []
        for free in self._free:
            slots += [free.pop() for _ in range(min(count - len(slots), len(free)))]
        for slot in slots:
            self._reserved[slot] = True
        return slots

    def free(self, slots: Sequence[int]) -> None:
        self._check_reserved(slots)
        if len(set(slots)) != len(slots):
            raise IntegrityError(f"host: a slot is freed twice in one call: {list(slots)}")
        for slot in slots:
            self._reserved[slot] = False
            self._key[slot] = None
            self._free[bisect_right(self._firsts, slot) - 1].append(slot)

    def store(self, slots: Sequence[int], pages: Sequence[PageId], payloads: Sequence[Payload]) -> list[Refused | None]:
        self._check_reserved(slots)
        return [self._write(*copy) for copy in zip(slots, pages, payloads, strict=True)]

    def load(self, slots: Sequence[int], keys: Sequence[PageKey], staging: NDArray[np.uint8]) -> list[Payload | Refused]:  # noqa: ARG002
        return [self._read(*copy) for copy in zip(slots, keys, strict=True)]

    def direct(self, slots: Sequence[int]) -> Addresses:
        places = self._address + np.asarray(slots, np.int64) * self.slot_bytes
        return np.where(self._registration.covers(places, self._payload_bytes), places, 0)

    def payload_at(self, slot: int) -> Payload:
        payload: Payload = self._bytes[slot]
        return payload

    def check_integrity(self) -> None:
        free = sorted(chain(*self._free))
        if free != [slot for slot, taken in enumerate(self._reserved) if not taken]:
            raise IntegrityError("host: the free list is not the list of slots that are not reserved")
        strays = [slot for slot in free if self._key[slot] is not None]
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
            "pinned": bool(self._registration.registered_bytes),
            "pinned_bytes": self._registration.registered_bytes,
            "pinned_chunks": self._registration.chunks,
            "why_not_pinned": self._registration.why,
            **self._arena.report(),
            **self._nodes.report(self._arena.bytes.ctypes.data, self._arena.bytes.nbytes),
        }

    def close(self) -> None:
        """Unpin and release the arena, whose memory goes once the last view of it is gone. Later stores and loads are refused."""
        if not self._closed:
            self._closed = True
            self._key = [None] * self.capacity_slots
            self._bytes = self._bytes[:0].copy()
            self._registration.undo()
            self._arena.close()

    def _check_reserved(self, slots: Sequence[int]) -> None:
        for slot in slots:
            if not 0 <= slot < self.capacity_slots or not self._reserved[slot]:
                raise IntegrityError(f"host: slot {slot} is not reserved")

    def _write(self, slot: int, page: PageId, payload: Payload) -> Refused | None:
        if self._closed:
            return Refused("closed")
        if payload.dtype != _UINT8 or payload.shape != (self._payload_bytes,):
            return Refused("format")
        if self._key[slot] is not None:
            raise IntegrityError(f"host: slot {slot} already holds a copy; free it before storing another one")
        payload = np.ascontiguousarray(payload)
        # Of the source, not of the arena: a copy that went wrong on the way must not prove itself right.
        self._checksum[slot] = xxhash.xxh3_64_intdigest(payload.data)
        if payload.base is not self._bytes.base or payload.ctypes.data != self._address + slot * self.slot_bytes:
            self._bytes[slot] = payload  # else a GPU wrote it here itself, where `direct` told it to
        self._key[slot] = page.key
        return None

    def _read(self, slot: int, key: PageKey) -> Payload | Refused:
        if self._closed:
            return Refused("closed")
        if not 0 <= slot < self.capacity_slots or self._key[slot] != key:
            return Refused("key")
        payload = self._bytes[slot]
        return payload if xxhash.xxh3_64_intdigest(payload.data) == self._checksum[slot] else Refused("checksum")
