"""How many I/Os a batch of copies becomes, and how large: pure functions over slot numbers.

Neighbouring slots whose rows of memory are neighbours too share one I/O up to a chunk size. Larger chunks cost less CPU per byte; more of
them keep the disk busy and let the first pages be used while the last are on their way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LEAST_CHUNK_BYTES, MOST_CHUNK_BYTES = 256 << 10, 1 << 20
READ_BYTES = 448 << 10
"""The largest shared read: large enough for the speed of a disk, small enough that the first records are there early, and that the last
ones, which come together, are few."""
_CHUNKS_PER_REQUEST_UNDER_WAY = 2


@dataclass(frozen=True, slots=True)
class Run:
    """One I/O: `length` bytes at `offset` of segment file `segment`, for the copies `first` to `first + count - 1` of the batch."""

    segment: int
    offset: int
    first: int
    count: int
    length: int

    def alone(self, index: int, slot_bytes: int, length: int) -> Run:
        """The I/O of `length` bytes that carries only copy `index`, one of this run's."""
        return Run(self.segment, self.offset + (index - self.first) * slot_bytes, index, 1, length)


def chunk_bytes(total_bytes: int, depth: int) -> int:
    """The largest shared I/O of a batch of `total_bytes`: small enough that `depth` requests under way are always to be had, within
    LEAST_CHUNK_BYTES and MOST_CHUNK_BYTES."""
    return min(max(total_bytes // (_CHUNKS_PER_REQUEST_UNDER_WAY * depth), LEAST_CHUNK_BYTES), MOST_CHUNK_BYTES)


def plan(slots: Sequence[int], lengths: Sequence[int], slot_bytes: int, segment_slots: int, most_bytes: int) -> list[Run]:
    """The I/Os that carry the first `lengths[i]` bytes of slot `slots[i]` to or from row i of memory, for every i, in order of i.

    A length of 0 asks for nothing. Copies i and i + 1 share an I/O if their slots are neighbours in one segment, copy i fills its slot,
    and all that share it make at most `most_bytes`; one copy alone may be longer.
    """
    runs: list[Run] = []
    end = len(slots)
    first = 0
    while first < end:
        length = lengths[first]
        if length == 0:
            first += 1
            continue
        slot = slots[first]
        place = slot % segment_slots
        most_count = min(end - first, segment_slots - place)
        count = 1
        while (
            count < most_count
            and lengths[first + count - 1] == slot_bytes
            and slots[first + count] == slot + count
            and 0 < lengths[first + count] <= most_bytes - length
        ):
            length += lengths[first + count]
            count += 1
        runs.append(Run(slot // segment_slots, place * slot_bytes, first, count, length))
        first += count
    return runs


def records_at_once(slot_bytes: int, scratch_bytes: int) -> int:
    """Records in one half of a writer's scratch memory: while these are written, the next are composed in the other. One at least."""
    return max(1, scratch_bytes // 2 // slot_bytes)
