"""What a block store holds: which blocks, in which slots of the disk, who leaves when it is full, and what is let go or was lost.

All of it belongs to the store's lock, which callers hold: nothing here takes it, and nothing here moves bytes.
"""

from __future__ import annotations

import enum
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtier.keys import KEY_BYTES, PageKey
from kvtier.pages import ABSENT, NO_ROW, READY, WRITING, PageTable, Rows
from kvtier.policy import EvictionPolicy, SmoothedPressure
from kvtier.residency.protection import Protected
from kvtier.tiers.base import PageId
from kvtier.tiers.disk import DiskTier

_DISK = 0
"""The page table's one tier."""
_START = bytes(KEY_BYTES)
"""Stands before the first block of a sequence."""


class Presence(enum.Enum):
    """Whether a store has a block: not, not yet (it is being written), or ready to be read."""

    ABSENT = enum.auto()
    COMING = enum.auto()
    READY = enum.auto()


_PRESENCE = {ABSENT: Presence.ABSENT, WRITING: Presence.COMING, READY: Presence.READY}


class Chain(NamedTuple):
    """Where the blocks of a batch stand: they follow each other, the first one behind `depth` others, the last of which is `after`
    (None for a batch that begins a sequence, and only then)."""

    after: bytes | None
    depth: int


class Admitted(NamedTuple):
    """What becomes of a batch to be written: per key whether it is there or coming already; which others, by index, got rows."""

    there: list[bool]
    chosen: list[int]
    rows: Rows


class Contents:
    """The blocks of one store, by the caller's keys. `salt` is part of every key; `clock` gives seconds."""

    def __init__(self, disk: DiskTier, policy: EvictionPolicy, salt: bytes, clock: Callable[[], float]) -> None:
        self.table = PageTable(1, 1)
        self.policy = policy
        policy.names = self.table.names
        self.counts: Counter[str] = Counter()
        self._disk = disk
        self._salt = salt
        self._clock = clock
        self._pressure = SmoothedPressure()
        self._doomed: set[int] = set()
        """Rows to be dropped as soon as nobody writes or reads them; until then they count as absent."""
        self._lost: set[int] = set()
        """Those of them whose block did not verify."""

    def recover(self) -> None:
        """Take in what the disk holds from before."""
        table, found = self.table, []
        for slot, page in self._disk.recover():
            row = table.add(page)
            if table.state[_DISK, row] != ABSENT:
                self._disk.free([slot])
                continue
            table.begin([row], _DISK, [slot])
            table.commit([row], _DISK)
            found.append(row)
        rows = np.array(found, np.int64)
        self.policy.insert(rows, table.parent[rows], table.depth[rows], self._clock())
        self.counts["recovered"] += len(rows)

    # -- looking ---------------------------------------------------------------------------------------------------------------

    def find(self, keys: Iterable[bytes]) -> Rows:
        """The row of each key, NO_ROW where it has none."""
        return self.table.rows_of(self._names(keys))

    def presence(self, keys: Sequence[bytes]) -> list[Presence]:
        """Of each key."""
        return [_PRESENCE[state] for state in self._states(self.find(keys)).tolist()]

    def touch(self, keys: Iterable[bytes]) -> None:
        """These were used, all at once; those that are not there are passed over."""
        rows = self.find(keys)
        self._use(rows[self._states(rows) == READY])

    def slots(self, rows: Rows) -> list[int]:
        """Where these are on the disk, or will be."""
        slots: list[int] = self.table.slot[_DISK][rows].tolist()
        return slots

    # -- reading ---------------------------------------------------------------------------------------------------------------

    def hold(self, keys: Sequence[bytes]) -> tuple[list[int], Rows]:
        """Which keys, by index, can be read, and their rows, which stay where they are until `unhold`."""
        rows = self.find(keys)
        here = np.flatnonzero(self._states(rows) == READY)
        found = rows[here]
        self._use(found)
        self.counts["hits"] += len(found)
        self.counts["misses"] += len(keys) - len(found)
        self.table.hold(found, _DISK)
        return here.tolist(), found

    def unhold(self, rows: Rows) -> None:
        """These were read; the doomed among them go."""
        self.table.unhold(rows, _DISK)
        if self._doomed:
            self._bury(rows)

    def lose(self, rows: Iterable[int]) -> None:
        """The blocks of these held rows did not verify."""
        lost = set(rows)
        self._lost |= lost
        self._doomed |= lost

    # -- writing ---------------------------------------------------------------------------------------------------------------

    def admit(self, keys: Sequence[bytes], chain: Chain | None) -> Admitted:
        """Rows and slots for the blocks that are not there, the first ones first where room does not reach."""
        names = self._names(keys)
        rows = self.table.rows_of(names)
        states = self.table.state[_DISK][rows]
        missing, there = np.flatnonzero(states == ABSENT), np.flatnonzero(states != ABSENT)
        present = rows[there]
        self._doomed.difference_update(set(present.tolist()) - self._lost)
        known = [False] * len(keys)
        for index, row in zip(there.tolist(), present.tolist(), strict=True):
            known[index] = row not in self._doomed
        self._use(present[self._states(present) == READY])
        self.table.hold(present, _DISK)  # making room for the others must not take these
        targets = self._reserve(len(missing))
        self.unhold(present)
        chosen: list[int] = missing[: len(targets)].tolist()
        self.counts["no room"] += len(missing) - len(chosen)
        added = self._add(names, chosen, chain)
        self.table.begin(added, _DISK, targets)
        return Admitted(known, chosen, added)

    def commit(self, rows: Rows) -> None:
        """These are written."""
        self.table.commit(rows, _DISK)
        parents, depths, _ = self.table.links(rows)
        self.policy.insert(rows, parents, depths, self._clock())
        self.counts["stored"] += len(rows)
        self._bury(rows)

    def abandon(self, rows: Rows) -> None:
        """These will not be written."""
        self._doomed.difference_update(rows.tolist())
        self._disk.free(self.table.drop(rows, _DISK))

    # -- letting go ------------------------------------------------------------------------------------------------------------

    def delete(self, keys: Iterable[bytes]) -> int:
        """Let these go, as soon as nobody reads or writes them; how many that were there."""
        rows = self.find(keys)
        return self._doom(rows[self._states(rows) != ABSENT])

    def clear(self) -> int:
        """Let all go; how many there were."""
        return self._doom(np.flatnonzero(self.table.state[_DISK][: self.table.rows] != ABSENT))

    def check_integrity(self) -> None:
        """IntegrityError if any structure contradicts another."""
        self.table.check_integrity()
        self.policy.check_integrity()
        self._disk.check_integrity()
        self.table.check_tier(_DISK, self.policy)

    # -- inside ----------------------------------------------------------------------------------------------------------------

    def _names(self, keys: Iterable[bytes]) -> list[PageKey]:
        """What the store calls these blocks: of one length, and others under other facts."""
        return [hashlib.blake2b(key, digest_size=KEY_BYTES, key=self._salt).digest() for key in keys]

    def _states(self, rows: Rows) -> NDArray[np.uint8]:
        """ABSENT, WRITING or READY for each row."""
        states: NDArray[np.uint8] = self.table.state[_DISK][rows]
        if self._doomed:
            states[[row in self._doomed for row in rows.tolist()]] = ABSENT
        return states

    def _use(self, rows: Rows) -> None:
        if len(rows):
            self.table.use(rows)
            self.policy.touch(rows, self._clock())

    def _reserve(self, count: int) -> list[int]:
        """Slots for up to `count` blocks, evicting what must leave; fewer when no more can be had."""
        while count > 0:
            slots = self._disk.reserve(count)
            if slots is not None:
                return slots
            pressure = self._pressure.observe(self._disk.bytes_used, self._disk.capacity_bytes)
            missing, now = max(1, count - self._disk.free_slots), self._clock()
            with Protected(self.table, _DISK, now) as protected:
                victims = self.policy.evict(missing, protected, now, pressure)
            if victims is None:
                with Protected(self.table, _DISK, now) as protected:
                    likely = len(self.policy.peek(missing, protected, now, pressure))
                count = min(count - 1, self._disk.free_slots + likely)
                continue
            self.counts["evicted"] += len(victims)
            self._disk.free(self.table.drop(victims, _DISK))
        return []

    def _add(self, names: Sequence[PageKey], chosen: Sequence[int], chain: Chain | None) -> Rows:
        """Rows for the blocks of these indices, linked to those before them where that is known."""
        table, rows = self.table, []
        first = _START if chain is None or chain.after is None else self._names([chain.after])[0]
        for index in chosen:
            before = _START if chain is None else names[index - 1] if index else first
            parent = table.row(before)
            row, name = table.row(names[index]), names[index]
            if row == NO_ROW:
                depth = 0 if chain is None else int(table.depth[parent]) + 1 if parent != NO_ROW else chain.depth + index
                row = table.add(PageId(name, before, depth), parent)
            elif table.parent[row] == NO_ROW:  # known only as what stands before others
                depth = int(table.depth[row])
                if parent != NO_ROW and table.depth[parent] == depth - 1:
                    table.add(PageId(name, before, depth), parent)
                else:
                    table.parent_key[row] = before
            rows.append(row)
        return np.array(rows, np.int64)

    def _doom(self, rows: Rows) -> int:
        self._doomed.update(rows.tolist())
        self._bury(rows)
        return len(rows)

    def _bury(self, rows: Rows) -> None:
        """Drop the doomed among these that nobody reads or writes."""
        for row in rows.tolist():
            if row not in self._doomed or self.table.readers[_DISK, row] or self.table.state[_DISK, row] != READY:
                continue
            self._doomed.discard(row)
            self._lost.discard(row)
            one = np.array([row])
            self.policy.remove(one)
            self._disk.free(self.table.drop(one, _DISK))
