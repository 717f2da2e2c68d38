"""The write side of a disk store: records are composed in the caller's turn and written behind its back, while it makes the next ones.

State, of all callers together: the sequence numbers, under `_lock`. Of each caller's thread: a `_Side`, which is scratch memory in two
halves, one of which is filled while the other is being written, and a thread that writes them in turn. What the medium refuses is erased,
so that no half of a record is left, and said per record.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from weakref import WeakSet

import numpy as np

from kvtier.formats.base import Format, Payload
from kvtier.io.files import Bytes, page_aligned
from kvtier.io.pool import stay_on
from kvtier.layout import PageLayout
from kvtier.repeated import RepeatedWarning
from kvtier.tiers.base import PageId, Refused
from kvtier.tiers.disk import record
from kvtier.tiers.disk.batches import put
from kvtier.tiers.disk.directory import FULL_ERRNOS
from kvtier.tiers.disk.plan import records_at_once
from kvtier.tiers.disk.segments import Segments
from kvtier.tiers.disk.slots import SlotBook
from kvtier.tiers.disk.tidying import Tally, Tidier

_SCRATCH_BYTES = 8 << 20
"""Of each thread that stores, both halves together."""
_log = logging.getLogger(__name__)

Outcome = int | Refused
"""Bytes of the record on disk, or why there is none."""


@dataclass
class Writing:
    """Records on their way to the disk, numbered from `first`; `parts` are those written together."""

    slots: Sequence[int]
    first: int
    parts: list[Future[list[Outcome]]] = field(default_factory=list)


class _Side:
    """What one thread that stores has for itself: two halves `[rows, slot_bytes]` of scratch memory, and a thread that writes them."""

    def __init__(self, rows: int, slot_bytes: int, cpus: Sequence[int]) -> None:
        self._halves = page_aligned(2 * rows * slot_bytes).reshape(2, rows, slot_bytes)
        self._writes: list[Future[list[Outcome]] | None] = [None, None]
        self._turn = 0
        self._thread = ThreadPoolExecutor(1, "kvtier-disk-write", lambda: stay_on(cpus))

    def half(self) -> Bytes:
        """The half that was used longest ago, once it is written."""
        self._turn ^= 1
        if (write := self._writes[self._turn]) is not None:
            wait([write])
        half: Bytes = self._halves[self._turn]
        return half

    def start(self, write: Callable[[], list[Outcome]]) -> Future[list[Outcome]]:
        """Have the thread write the half taken last, after what it has to write already."""
        future = self._thread.submit(write)
        self._writes[self._turn] = future
        return future

    def stop(self) -> None:
        """End the thread."""
        self._thread.shutdown()


class RecordWriter:
    """Writes copies of one store, in records numbered from `next_sequence` on. `path` is for the log.

    `power`: each `finish` syncs what it wrote.
    """

    def __init__(
        self,
        path: str,
        segments: Segments,
        book: SlotBook,
        tidier: Tidier,
        tally: Tally,
        layout: PageLayout,
        format: Format,
        next_sequence: int,
        power: bool,
    ) -> None:
        self.next_sequence = next_sequence
        self._path = path
        self._segments = segments
        self._book = book
        self._tidier = tidier
        self._tally = tally
        self._layout = layout
        self._format = format
        self._format_hash = record.format_hash(format.name)
        self._most_payload_bytes = format.payload_bytes(layout)
        self._power = power
        self._lock = threading.Lock()
        self._in_flight: set[int] = set()
        self._full_logged = False
        self._warnings = RepeatedWarning(_log)
        self._own = threading.local()
        self._sides: WeakSet[_Side] = WeakSet()

    @property
    def finished_sequence(self) -> int:
        """All records up to this number are written, or never will be."""
        with self._lock:
            return min(self._in_flight, default=self.next_sequence) - 1

    def begin(
        self, slots: Sequence[int], pages: Sequence[PageId], payloads: Sequence[Payload], digests: Sequence[bytes] | None, ahead: bool
    ) -> Writing:
        """Compose and start to write one record per slot; `finish` must follow. What the payloads are in is free again afterwards.

        IntegrityError if one of the slots holds a copy. Without `ahead`, the caller has nothing else to do: its own thread writes the last
        records, which saves waking another.
        """
        side = self._side()
        known = [None] * len(slots) if digests is None else digests
        at_once = records_at_once(self._segments.slot_bytes, _SCRATCH_BYTES)
        writing = Writing(slots, self._begin_sequence(len(slots)))
        try:
            for start in range(0, len(slots), at_once):
                part = slice(start, start + at_once)
                rows = side.half()[: len(slots[part])]
                lengths, stale, crowded = self._compose(slots[part], writing.first + start, pages[part], payloads[part], known[part], rows)
                write = partial(self._write, slots[part], lengths, stale, crowded, rows)
                if ahead or part.stop < len(slots):
                    writing.parts.append(side.start(write))
                else:
                    wait(writing.parts)
                    last: Future[list[Outcome]] = Future()
                    last.set_result(write())
                    writing.parts.append(last)
        except BaseException:
            self._end(writing)
            raise
        return writing

    def finish(self, writing: Writing) -> list[Refused | None]:
        """Wait until all is written; per record None, or why it is not there. To be called once."""
        try:
            wait(writing.parts)
            written = [outcome for part in writing.parts for outcome in part.result()]
            if self._power:
                written = self._make_durable(writing.slots, written)
            for slot, outcome in zip(writing.slots, written, strict=True):
                if isinstance(outcome, int):
                    self._book.wrote(slot, outcome)
        finally:
            self._end(writing)
        results = [outcome if isinstance(outcome, Refused) else None for outcome in written]
        if self._full_logged and None in results and self._book.usable_bytes == self._book.capacity_bytes:
            self._full_logged = False
            _log.info("disk store %s: there is room again", self._path)
        return results

    def stop(self) -> None:
        """End the threads. Everything that was begun has been finished."""
        for side in list(self._sides):
            side.stop()

    def _side(self) -> _Side:
        """What the calling thread has for itself; goes with it."""
        if not hasattr(self._own, "side"):
            rows = records_at_once(self._segments.slot_bytes, _SCRATCH_BYTES)
            self._own.side = _Side(rows, self._segments.slot_bytes, self._segments.engine.cpus)
            with self._lock:
                self._sides.add(self._own.side)
        side: _Side = self._own.side
        return side

    def _begin_sequence(self, count: int) -> int:
        with self._lock:
            first = self.next_sequence
            self.next_sequence += count
            self._in_flight.add(first)
            return first

    def _end(self, writing: Writing) -> None:
        wait(writing.parts)
        with self._lock:
            self._in_flight.discard(writing.first)

    def _compose(
        self,
        slots: Sequence[int],
        first: int,
        pages: Sequence[PageId],
        payloads: Sequence[Payload],
        digests: Sequence[bytes | None],
        rows: Bytes,
    ) -> tuple[list[int], list[int], bool]:
        """Put records into `rows`: their bytes (0: the payload is none of this format), how far earlier ones in their slots may reach, and
        whether the blocks of freed copies should be given back first."""
        lengths, stale, crowded = [0] * len(slots), [0] * len(slots), False
        for i, (slot, page, payload, digest) in enumerate(zip(slots, pages, payloads, digests, strict=True)):
            if self._fits(payload):
                lengths[i] = self._compose_one(first + i, page, payload, digest, rows[i])
                stale[i], more = self._book.claim(slot, lengths[i])
                crowded |= more
        return lengths, stale, crowded

    def _fits(self, payload: Payload) -> bool:
        whole = payload.nbytes == self._most_payload_bytes or not self._format.fixed_size
        return payload.dtype == np.uint8 and payload.ndim == 1 and payload.nbytes <= self._most_payload_bytes and whole

    def _compose_one(self, sequence: int, page: PageId, payload: Payload, digest: bytes | None, row: Bytes) -> int:
        payload = np.ascontiguousarray(payload)
        checksum = record.payload_checksum(payload) if digest is None else digest
        header = record.Header(sequence, page, self._layout.fingerprint, self._format_hash, payload.nbytes, checksum)
        return len(record.compose(header, payload, row))

    def _write(self, slots: Sequence[int], lengths: Sequence[int], stale: Sequence[int], crowded: bool, rows: Bytes) -> list[Outcome]:
        """Write composed records; their bytes, or why not, when nothing of them is left."""
        if crowded:
            self._tidier.tidy()
        errors = put(self._segments, slots, lengths, stale, rows)
        if any(error is not None and error.errno in FULL_ERRNOS for error in errors) and self._tidier.tidy():
            # Freed copies that were still on disk may have been all that was in the way.
            again = [length if error is not None else 0 for length, error in zip(lengths, errors, strict=True)]
            errors = put(self._segments, slots, again, stale, rows)
        return [
            self._failed(slot, error) if error is not None else length or Refused("format")
            for slot, length, error in zip(slots, lengths, errors, strict=True)
        ]

    def _failed(self, slot: int, error: OSError) -> Refused:
        """Make what was written of a record invisible and say why it was refused."""
        self._book.failed(slot, self._tidier.erase(slot))
        if error.errno not in FULL_ERRNOS:
            self._tally.add("io errors")
            what = "disk store %s: cannot write: %s; pages that cannot be kept are computed again. Look after the disk, or change disk.path"
            self._warnings.say(error.errno, what, self._path, error)
            return Refused(f"io: {error.strerror}")
        self._tally.add("disk full")
        self._book.disk_is_full()
        if not self._full_logged:
            self._full_logged = True
            used = self._book.usable_bytes
            _log.warning("disk store %s: disk full at %d bytes of copies; trying again later", self._path, used)
        return Refused("disk full")

    def _make_durable(self, slots: Sequence[int], written: list[Outcome]) -> list[Outcome]:
        """Sync the segments just written; records of a segment that cannot be synced are withdrawn."""
        segments = {self._segments.segment_of(slot) for slot, outcome in zip(slots, written, strict=True) if isinstance(outcome, int)}
        broken: dict[int, OSError] = {}
        for segment in segments:
            try:
                self._segments.sync(segment)
            except OSError as error:
                broken[segment] = error
        outcomes: list[Outcome] = []
        for slot, outcome in zip(slots, written, strict=True):
            fault = broken.get(self._segments.segment_of(slot))
            outcomes.append(self._failed(slot, fault) if fault and isinstance(outcome, int) else outcome)
        return outcomes
