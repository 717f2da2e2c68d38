"""Pages of the host tier that move to the node they are used from: which, by the rule of `kvtier.numa.migration`, and what came of it.

`accessed` and `freed` are called by any thread: they leave a note. Everything else belongs to whoever plans, one at a time and without the
cache's lock, because a plan may take a while; so a plan is a wish, and looked at again under the lock before it is carried out. `carry`
moves bytes and touches only slots that are its own (the target) or held by its caller (the source).
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import count

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvtier.numa.binding import get_current_numa_node, this_machine
from kvtier.numa.migration import AccessHistory, MigrationRule, PlannedMove
from kvtier.numa.topology import UNKNOWN_NODE
from kvtier.numa.transfers import NodeStream, Part, Piece

_NOTES = 1 << 12
_SAMPLED = 16  # slots of one call that are noted, each for its neighbours too
_PAGES = 1 << 12
_FREED = -2
_WINDOW_S = 60.0
Pair = tuple[int, int]
"""The slot a page is in and the one it goes to."""


class NodeMoves:
    """What is known of the accesses to slots. `node_of` a slot; `nodes` that slots are on."""

    def __init__(self, node_of: Callable[[int], int], nodes: Sequence[int], rule: MigrationRule | None = None) -> None:
        self.rule = rule or MigrationRule()
        self.pages = self.bytes = self.given_up = self.local = self.remote = 0
        self._node_of = node_of
        self._nodes = tuple(nodes)
        self._history = AccessHistory(self.rule, _PAGES)
        self._notes: deque[tuple[Sequence[int], int, int]] = deque(maxlen=_NOTES)
        """Slots, the node that accessed them (_FREED: their pages are gone), and for how many each stands."""
        self._offset = count()
        self._latest: deque[float] = deque()
        self._looked_at = 0

    def accessed(self, slots: Sequence[int]) -> None:
        """The calling thread reads these slots now. Of many, some stand for all, others each time."""
        step = -(-len(slots) // _SAMPLED) or 1
        self._notes.append((slots[next(self._offset) % step :: step], get_current_numa_node(), step))

    def freed(self, slots: Sequence[int]) -> None:
        """The pages of these slots are gone."""
        self._notes.append((slots, _FREED, 0))

    def plan(self, room: Mapping[int, int], may_move: Callable[[int], bool], slots: int, now: float) -> list[PlannedMove]:
        """The moves (of slots) that pay now. `room`: free slots by node; `slots`: how many there are; `may_move`: nobody needs this one."""
        for _ in range(len(self._notes)):
            seen, node, each = self._notes.popleft()
            for slot in seen if node != UNKNOWN_NODE else ():
                if node == _FREED:
                    self._history.forget(slot)
                    continue
                self._history.record(slot, node, now, each)
                if self._node_of(slot) == node:
                    self.local += each
                else:
                    self.remote += each
        self._history.fade(now)

        def node_of(slot: int) -> int | None:
            return self._node_of(slot) if may_move(slot) else None

        return self.rule.plan(self._history, node_of, room, self._idle(may_move, slots), this_machine().distance, now)

    def moved(self, pair: Pair, size_bytes: int, now: float) -> None:
        """The page is now in the second slot."""
        self._history.moved(pair[0], now, pair[1])
        self.pages += 1
        self.bytes += size_bytes
        self._latest.append(now)
        while self._latest[0] < now - _WINDOW_S:
            self._latest.popleft()

    def report(self, now: float) -> dict[str, object]:
        """Pages moved, per second of the last minute too, `given_up`: somebody needed the page meanwhile; share of accesses from the node
        of the page."""
        recent = sum(moment >= now - _WINDOW_S for moment in list(self._latest))
        total = self.local + self.remote
        return {
            "pages": self.pages,
            "bytes": self.bytes,
            "given_up": self.given_up,
            "per_s": round(recent / _WINDOW_S, 4),
            "local_share": round(self.local / total, 4) if total else None,
        }

    def _idle(self, may_move: Callable[[int], bool], slots: int) -> dict[int, list[int]]:
        """Some slots of each node that nobody accessed lately. Each call looks at others, so that a plan takes no long look."""
        found: dict[int, list[int]] = {node: [] for node in self._nodes}
        for step in range(min(slots, 16 * self.rule.batch_pages)):
            slot = (self._looked_at + step) % slots
            here = found[self._node_of(slot)]
            if len(here) < self.rule.batch_pages and slot not in self._history and may_move(slot):
                here.append(slot)
        self._looked_at = (self._looked_at + 16 * self.rule.batch_pages) % max(1, slots)
        return found


def carry(pairs: Sequence[Pair], memory: NDArray[np.uint8], checksums: Sequence[int], node: int) -> list[bool]:
    """Copy the first slot of each pair into the second, of `memory` `[slots, payload_bytes]`, with CPUs of `node`; which arrived as they
    should (`checksums`, one per pair, of the source)."""
    hashes = [xxhash.xxh3_64() for _ in pairs]
    stride, start = memory.strides[0], memory.ctypes.data

    def work(parts: list[Part]) -> None:
        for part in parts:
            source = np.frombuffer(memoryview((ctypes.c_ubyte * part.length).from_address(part.address)), np.uint8)
            hashes[part.tag].update(source.data)
            memory[pairs[part.tag][1], part.offset : part.offset + part.length] = source

    with NodeStream(node, this_machine()) as stream:
        stream.carry([Piece(tag, start + pair[0] * stride, memory.shape[1]) for tag, pair in enumerate(pairs)], work)
    return [each.intdigest() == checksum for each, checksum in zip(hashes, checksums, strict=True)]
