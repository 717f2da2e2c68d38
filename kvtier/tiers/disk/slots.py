"""Who has which disk slot and how many bytes that takes: plain bookkeeping, no I/O.

Every method may be called from any thread; one internal lock guards all columns and is never held across anything slow. A slot is
CLEAN (nothing on disk), HELD (reserved, with or without a copy), PENDING (freed, its old record still on disk) or TIDYING (being
punched right now). `reserve` prefers pending slots: overwriting in place needs no new disk blocks and saves the punch.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from kvtier.errors import IntegrityError

CLEAN, HELD, PENDING, TIDYING = range(4)
RETRY_FULL_S = 30.0


class SlotBook:
    """Slots of `slot_bytes` address space each, numbered from 0 and growing on demand, within `capacity_bytes` of disk.

    `refunds`: whether a copy smaller than its slot is charged only its own bytes. That needs a file system that deallocates; without
    it a slot always costs `slot_bytes` and there are only `capacity_bytes // slot_bytes` of them.
    """

    def __init__(self, slot_bytes: int, capacity_bytes: int, refunds: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self.slot_bytes = slot_bytes
        self.capacity_bytes = capacity_bytes
        self._refunds = refunds
        self._clock = clock
        self._lock = threading.Lock()
        self._most_slots = None if refunds else capacity_bytes // slot_bytes
        self._state = bytearray()
        self._stored = array("q")
        """Record bytes of the copy in each slot, 0 if there is none."""
        self._on_disk = array("q")
        """Bytes from the start of each slot that may hold data, stale or not."""
        self._clean: list[int] = []
        self._pending: deque[int] = deque()
        self._used_slots = 0
        self._used_bytes = 0
        self._stored_bytes = 0
        self._disk_bytes = 0
        self._usable_bytes = capacity_bytes
        self._lowered_at_s: float | None = None

    @property
    def used_slots(self) -> int:
        """How many slots are held."""
        return self._used_slots

    @property
    def used_bytes(self) -> int:
        """Charged bytes of all held slots."""
        return self._used_bytes

    @property
    def usable_bytes(self) -> int:
        """`capacity_bytes`, or less for RETRY_FULL_S after the disk turned out to be full."""
        with self._lock:
            return self._usable()

    @property
    def free_slots(self) -> int:
        """How many slots `reserve` could give now."""
        with self._lock:
            return self._free_slots()

    @property
    def pending(self) -> int:
        """Freed slots whose old record is still on disk."""
        return len(self._pending)

    def reserve(self, count: int) -> list[int] | None:
        """`count` slots charged `slot_bytes` each, or None and nothing changed. Ascending, so that neighbours can share an I/O."""
        with self._lock:
            if count > self._free_slots():
                return None
            slots = sorted(self._take() for _ in range(count))
            for slot in slots:
                self._state[slot] = HELD
            self._used_slots += count
            self._used_bytes += count * self.slot_bytes
            return slots

    def free(self, slots: Sequence[int]) -> None:
        """Give held slots back, all or none. IntegrityError if one of them is not held."""
        with self._lock:
            self._check_held(slots)
            if len(set(slots)) != len(slots):
                raise IntegrityError(f"disk: a slot is freed twice in one call: {list(slots)}")
            self._used_slots -= len(slots)
            for slot in slots:
                self._used_bytes -= self._charge(slot)
                self._set_stored(slot, 0)
                self._retire(slot)

    def check_held(self, slots: Sequence[int]) -> None:
        """IntegrityError unless all `slots` are held."""
        with self._lock:
            self._check_held(slots)

    def stored_bytes(self, slots: Sequence[int]) -> list[int]:
        """Record bytes of the copy in each of these slots, 0 where there is none."""
        stored, end = self._stored, len(self._stored)
        return [stored[slot] if 0 <= slot < end else 0 for slot in slots]

    def claim(self, slot: int, record_bytes: int) -> tuple[int, bool]:
        """A record is about to be written. Returns the bytes a former record left in the slot, and whether disk blocks should be
        given back first because those of freed copies, added to all others, exceed the capacity. IntegrityError if `slot` has a copy."""
        with self._lock:
            if self._stored[slot]:
                raise IntegrityError(f"disk: slot {slot} already holds a copy; free it before storing another one")
            stale = self._on_disk[slot]
            self._set_on_disk(slot, max(stale, record_bytes))
            return stale, self._disk_bytes > self.capacity_bytes

    def wrote(self, slot: int, record_bytes: int) -> None:
        """The record is whole and nothing stale is left behind it; the difference to `slot_bytes` is refunded."""
        with self._lock:
            self._set_on_disk(slot, record_bytes)
            self._used_bytes -= self._charge(slot)
            self._set_stored(slot, record_bytes)
            self._used_bytes += self._charge(slot)

    def failed(self, slot: int, erased: bool) -> None:
        """The record was not written; `erased` says whether nothing of it is left on disk. The slot stays held, without a copy."""
        with self._lock:
            self._set_on_disk(slot, 0 if erased else self.slot_bytes)

    def disk_is_full(self) -> None:
        """Shrink the usable capacity to the copies held now, so that callers evict; `usable_bytes` says for how long."""
        with self._lock:
            self._usable_bytes = min(self._usable(), self._stored_bytes)
            self._lowered_at_s = self._clock()

    def next_pending(self) -> int | None:
        """The pending slot freed longest ago, now the caller's to erase until `tidied`; None if there is none."""
        with self._lock:
            if not self._pending:
                return None
            slot = self._pending.popleft()
            self._state[slot] = TIDYING
            return slot

    def tidied(self, slot: int, erased: bool) -> None:
        """End of `next_pending`: the slot is clean, or pending again because it could not be erased."""
        with self._lock:
            if erased:
                self._set_on_disk(slot, 0)
            self._retire(slot)

    def adopt(self, slots: int, kept: Mapping[int, int], stale: Sequence[int]) -> None:
        """Start with `slots` slots found on disk: `kept` maps those with a copy to record bytes, `stale` ones await tidying."""
        with self._lock:
            self._state = bytearray(slots)
            self._stored = array("q", bytes(8 * slots))
            self._on_disk = array("q", bytes(8 * slots))
            self._used_slots = len(kept)
            for slot, record_bytes in kept.items():
                self._state[slot] = HELD
                self._set_on_disk(slot, record_bytes)
                self._set_stored(slot, record_bytes)
                self._used_bytes += self._charge(slot)
            for slot in stale:
                self._set_on_disk(slot, self.slot_bytes)
                self._retire(slot)
            self._clean = [slot for slot in range(slots - 1, -1, -1) if self._state[slot] == CLEAN]

    def check_integrity(self) -> None:
        """IntegrityError if the columns, lists and sums disagree."""
        with self._lock:
            by_state: list[set[int]] = [set(), set(), set(), set()]
            for slot, state in enumerate(self._state):
                by_state[state].add(slot)
            claims = {
                "clean slots": (sorted(self._clean), sorted(by_state[CLEAN])),
                "pending slots": (sorted(self._pending), sorted(by_state[PENDING])),
                "slots used": (self._used_slots, len(by_state[HELD])),
                "bytes used": (self._used_bytes, sum(self._charge(slot) for slot in by_state[HELD])),
                "bytes stored": (self._stored_bytes, sum(self._stored)),
                "bytes on disk": (self._disk_bytes, sum(self._on_disk)),
                "copies in slots nobody holds": (0, sum(self._stored[slot] > 0 for slot in set(range(len(self._state))) - by_state[HELD])),
                "clean slots with data": (0, sum(self._on_disk[slot] for slot in by_state[CLEAN])),
            }
            for what, (found, expected) in claims.items():
                if found != expected:
                    raise IntegrityError(f"disk: {what}: {found}, expected {expected}")
            if not 0 <= self._used_bytes <= self.capacity_bytes:
                raise IntegrityError(f"disk: {self._used_bytes} bytes used of {self.capacity_bytes}")

    def _check_held(self, slots: Sequence[int]) -> None:
        for slot in slots:
            if not 0 <= slot < len(self._state) or self._state[slot] != HELD:
                raise IntegrityError(f"disk: slot {slot} is not reserved")

    def _charge(self, slot: int) -> int:
        return (self._stored[slot] if self._refunds else 0) or self.slot_bytes

    def _set_stored(self, slot: int, record_bytes: int) -> None:
        self._stored_bytes += record_bytes - self._stored[slot]
        self._stored[slot] = record_bytes

    def _set_on_disk(self, slot: int, on_disk: int) -> None:
        self._disk_bytes += on_disk - self._on_disk[slot]
        self._on_disk[slot] = on_disk

    def _retire(self, slot: int) -> None:
        if self._on_disk[slot]:
            self._state[slot] = PENDING
            self._pending.append(slot)
        else:
            self._state[slot] = CLEAN
            self._clean.append(slot)

    def _usable(self) -> int:
        if self._lowered_at_s is not None and self._clock() - self._lowered_at_s >= RETRY_FULL_S:
            self._lowered_at_s = None
            self._usable_bytes = self.capacity_bytes
        return self._usable_bytes

    def _free_slots(self) -> int:
        slots_left = (self._usable() - self._used_bytes) // self.slot_bytes
        if self._most_slots is not None:
            slots_left = min(slots_left, len(self._pending) + len(self._clean) + self._most_slots - len(self._state))
        return max(0, slots_left)

    def _take(self) -> int:
        if self._pending:
            return self._pending.pop()
        if self._clean:
            return self._clean.pop()
        self._state.append(CLEAN)
        self._stored.append(0)
        self._on_disk.append(0)
        return len(self._state) - 1
