"""The host tier: one arena of equal slots in this process's memory, taken at start, locked and pinned where the machine allows.

`reserve`, `free` and the counters are called under the cache's lock. `store` and `load` run in several threads, each slot in one of
them; they touch only that slot's bytes and columns. Layout and format are fixed for the tier's life, so a copy proves itself by its
key and an xxh3-64 checksum of its bytes, both compared in every `load`.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, repeat

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvtier.cuda.registration import Registration
from kvtier.cuda.surface import Accelerator, Addresses
from kvtier.errors import ConfigError, IntegrityError
from kvtier.formats.base import Format, Payload
from kvtier.formats.digests import short_digest
from kvtier.keys import PageKey
from kvtier.layout import PageLayout
from kvtier.memory.arena import Arena, Switch
from kvtier.numa.placement import PAGE_BYTES
from kvtier.numa.topology import UNKNOWN_NODE
from kvtier.tiers.base import PageId, Refused, Tier
from kvtier.tiers.host_layers import LayerNodes
from kvtier.tiers.host_moves import NodeMoves, Pair, carry
from kvtier.tiers.host_nodes import HostNodes, NumaMode, choose_nodes

_CACHE_LINE_BYTES = 64
_MOST_SPARES = 16
_SPARE_SHARE = 64  # of the slots, one in so many is kept free for moves between nodes
_UINT8 = np.dtype(np.uint8)
_log = logging.getLogger(__name__)


class HostTier(Tier):
    """Copies in host memory, `capacity_bytes // slot_bytes` of them, gone when the process ends.

    `mlock`: keep the arena from being swapped. `pin`: register it with `accelerator`, the GPU that pages come from; "auto" as far as that
    goes. `huge_pages`: see `Arena`. Each "auto" (tried, else done without), "on" (or ConfigError) or "off". `numa`, `numa_nodes`: see
    `choose_nodes`, and `LayerNodes` for "layers"; `near` is the torch device that pages come from. Slots on the nearest node are given out
    first; where there are several nodes, a few slots stay free so that pages can change places. `load` returns views of the arena: valid
    until the slot is freed, not to be written to.

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
        unit = PAGE_BYTES if numa == "layers" else _CACHE_LINE_BYTES
        self.slot_bytes = -(-self._payload_bytes // unit) * unit
        if capacity_bytes < self.slot_bytes:
            needed = f"one {format.name} page of this layout takes {self.slot_bytes} bytes"
            raise ConfigError(f"host.capacity_bytes is {capacity_bytes}, but {needed}; raise it")
        slots = capacity_bytes // self.slot_bytes
        self._nodes: HostNodes | LayerNodes
        if numa == "layers":
            if huge_pages == "on":
                raise ConfigError(
                    "host.numa is layers, which cuts pages of KV every 4 KiB, and host.huge_pages is on; set one of them to auto"
                )
            huge_pages = "off"
            self._nodes = LayerNodes(numa_nodes, format.layer_bytes(layout), self.slot_bytes, slots)
        else:
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
        self._rooms: dict[int, Payload] = {}
        """By slot, the view of its memory that somebody makes a payload in."""
        # Free slots of each NUMA node, nearest first; a slot over a boundary counts to the nearer one.
        self._firsts, self._nodes_of = [0], [UNKNOWN_NODE]
        if isinstance(self._nodes, HostNodes) and self._nodes.segments:
            self._firsts = [-(-segment.start // self.slot_bytes) for segment in self._nodes.segments]
            self._nodes_of = [self._nodes.node_at(first * self.slot_bytes) for first in self._firsts]
        several = len(set(self._nodes_of)) > 1
        self._moves = NodeMoves(self.node_of, sorted(set(self._nodes_of))) if several else None
        self._spares = min(_MOST_SPARES, max(1, slots // _SPARE_SHARE), slots - 1) if several else 0
        self._free = [list(range(end - 1, first - 1, -1)) for first, end in zip(self._firsts, [*self._firsts[1:], slots], strict=True)]
        self.all_direct = bool(self.direct(range(slots)).all())
        self._closed = False

    @property
    def bytes_used(self) -> int:
        return (len(self._key) - sum(map(len, self._free))) * self.slot_bytes

    @property
    def free_slots(self) -> int:
        return 0 if self._closed else max(0, sum(map(len, self._free)) - self._spares)

    @property
    def capacity_slots(self) -> int:
        return len(self._key) - self._spares

    @property
    def worker_nodes(self) -> tuple[int, ...]:
        """Nodes that threads which read and write this memory should run on; none where it does not matter or is not known."""
        return self._nodes.worker_nodes

    def node_of(self, slot: int, layer: int | None = None) -> int:
        """The node a slot, or this layer of its page, is on; -1 where that is not one, or not known."""
        if isinstance(self._nodes, LayerNodes):
            return UNKNOWN_NODE if layer is None else self._nodes.node_of_layer(layer)
        return self._nodes_of[bisect_right(self._firsts, slot) - 1]

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
            self._rooms.pop(slot, None)
            self._free[bisect_right(self._firsts, slot) - 1].append(slot)
        if self._moves is not None:
            self._moves.freed(slots)

    def store(
        self, slots: Sequence[int], pages: Sequence[PageId], payloads: Sequence[Payload], digests: Sequence[bytes] | None = None
    ) -> list[Refused | None]:
        self._check_reserved(slots)
        return [self._write(*copy) for copy in zip(slots, pages, payloads, digests or repeat(None, len(slots)), strict=True)]

    def load(self, slots: Sequence[int], keys: Sequence[PageKey], staging: NDArray[np.uint8]) -> list[Payload | Refused]:  # noqa: ARG002
        if self._moves is not None:
            self._moves.accessed(slots)
        return [self._read(*copy) for copy in zip(slots, keys, strict=True)]

    def direct(self, slots: Sequence[int]) -> Addresses:
        places = self._address + np.asarray(slots, np.int64) * self.slot_bytes
        return np.where(self._registration.covers(places, self._payload_bytes), places, 0)

    def rooms(self, slots: Sequence[int]) -> list[Payload] | None:
        rooms: list[Payload] | None = None if self._closed else [self._bytes[slot] for slot in slots]
        self._rooms.update(zip(slots, rooms or (), strict=False))
        return rooms

    # -- moves between nodes: lock held, but for `plan_moves` and `carry` ------------------------------------------------------------

    @property
    def moves_pages(self) -> bool:
        """Whether there are several nodes that pages can move between."""
        return self._moves is not None

    def key_of(self, slot: int) -> PageKey | None:
        """The key of the page in a slot; None if there is none."""
        return self._key[slot]

    def plan_moves(self, may_move: Callable[[int], bool], now: float) -> list[Pair]:
        """Which slots should move, as (slot, node it should be on), in an order in which each finds room; none where there is one node.

        `may_move`: whether nobody needs the page of a slot where it is. One plan at a time; without the lock, so a wish: what it says of
        slots may be over.
        """
        if self._moves is None or self._closed:
            return []
        room: dict[int, int] = {}
        for node, free in zip(self._nodes_of, self._free, strict=True):
            room[node] = room.get(node, 0) + len(free)
        return [(move.page, move.target) for move in self._moves.plan(room, may_move, len(self._key), now)]

    def reserve_on(self, node: int) -> int | None:
        """A free slot on a node, also one of those kept for moves; None if there is none."""
        for own, free in zip(self._nodes_of, self._free, strict=True):
            if own == node and free:
                slot = free.pop()
                self._reserved[slot] = True
                return slot
        return None

    def carry(self, pairs: Sequence[Pair], node: int) -> list[bool]:
        """Copy the first slot of each pair into the second, which is reserved and on `node`; which arrived as they were. Moves bytes, for
        workers: without the lock, while nobody frees either slot."""
        if self._closed:
            return [False] * len(pairs)
        return carry(pairs, self._bytes, [self._checksum[source] for source, _ in pairs], node)

    def moved(self, pair: Pair, now: float) -> None:
        """The second slot takes the first one's place; the first is to be freed by the caller."""
        source, target = pair
        self._key[target], self._checksum[target] = self._key[source], self._checksum[source]
        if self._moves is not None:
            self._moves.moved(pair, self._payload_bytes, now)

    def gave_up(self) -> None:
        """A planned move was not made, because somebody needed the page or it did not arrive."""
        if self._moves is not None:
            self._moves.given_up += 1

    def move_counts(self, now: float) -> Mapping[str, object] | None:
        """What moved between nodes; None where nothing can."""
        return None if self._moves is None else self._moves.report(now)

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
            "numa_moves": self.move_counts(time.monotonic()),
        }

    def close(self) -> None:
        """Unpin and release the arena, whose memory goes once the last view of it is gone. Later stores and loads are refused."""
        if not self._closed:
            self._closed = True
            self._key = [None] * len(self._key)
            self._rooms.clear()
            self._bytes = self._bytes[:0].copy()
            self._registration.undo()
            self._arena.close()

    def _check_reserved(self, slots: Sequence[int]) -> None:
        for slot in slots:
            if not 0 <= slot < len(self._key) or not self._reserved[slot]:
                raise IntegrityError(f"host: slot {slot} is not reserved")

    def _write(self, slot: int, page: PageId, payload: Payload, digest: bytes | None) -> Refused | None:
        if self._closed:
            return Refused("closed")
        if payload.dtype != _UINT8 or payload.shape != (self._payload_bytes,):
            return Refused("format")
        if self._key[slot] is not None:
            raise IntegrityError(f"host: slot {slot} already holds a copy; free it before storing another one")
        made_here = self._rooms.pop(slot, None) is payload
        payload = np.ascontiguousarray(payload)
        # Of what was made, not of a copy of it: one that went wrong on the way must not prove itself right.
        self._checksum[slot] = short_digest(payload, digest)
        if not made_here:
            self._bytes[slot] = payload
        self._key[slot] = page.key
        return None

    def _read(self, slot: int, key: PageKey) -> Payload | Refused:
        if self._closed:
            return Refused("closed")
        if not 0 <= slot < len(self._key) or self._key[slot] != key:
            return Refused("key")
        payload = self._bytes[slot]
        return payload if xxhash.xxh3_64_intdigest(payload.data) == self._checksum[slot] else Refused("checksum")
