"""The disk tier itself: carries records between memory and segment files, and brings a store back after a restart.

Bookkeeping (`reserve`, `free`, counters) is in `SlotBook` with a lock of its own. `store`, `load`, `tidy` and `checkpoint` may run in
several threads at once, each slot in one of them; `_lock` guards what they share (sequences in flight, counters) and is never held
across I/O. `recover` and `close` are called once, by the owner.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from kvtier.cuda.surface import Accelerator
from kvtier.errors import ConfigError, DeviceError, StoreError
from kvtier.formats.base import Format, Payload
from kvtier.io.files import Bytes, FileEngine, page_aligned
from kvtier.io.pooled import DEPTH
from kvtier.io.probe import Chosen, EngineChoice, choose_engine, existing_part
from kvtier.keys import PageKey
from kvtier.layout import PageLayout
from kvtier.tiers.base import Loaded, PageId, Refused, Tier
from kvtier.tiers.disk import record
from kvtier.tiers.disk.batches import check_staging, fetch, put
from kvtier.tiers.disk.direct import DirectRecords, check_direct, find_reader
from kvtier.tiers.disk.directory import FULL_ERRNOS, Description, StoreDirectory, reopened
from kvtier.tiers.disk.recovery import Survey, scan, select
from kvtier.tiers.disk.segments import Segments
from kvtier.tiers.disk.slots import SlotBook

Durability = Literal["process", "power"]
DiskEngine = EngineChoice | Literal["gds"]

_SEGMENT_BYTES = 256 << 20
_MOST_SEGMENTS = 256
_SCAN_THREADS = 8
_SCRATCH_BYTES = 8 << 20
_log = logging.getLogger(__name__)


class DiskTier(Tier):
    """Copies in `path`, at most `capacity_bytes` of them, found again by `recover` after a restart or a crash.

    `namespace` (see `kvtier.keys.namespace`) keeps copies of different models apart. `durability`: "process" survives the death of
    this process at any instant; "power" also survives a power failure, at the price of one fdatasync per `store` call. Records are
    4096-aligned; formats of variable size are charged what each copy takes where the file system can deallocate.

    A store that is not new gives no slots until `recover` was called. `tidy` and `checkpoint` want to be called now and then by a
    worker: the first makes freed copies unfindable for good, the second shortens the next start after a crash.

    `engine` is a name for `kvtier.io.probe.choose_engine`, with `depth` requests at once, or an engine, from then on the tier's. Stores
    written by one engine open with every other. `cpus`: those that an engine made here keeps its threads on, any without. The engine "gds"
    is `direct`, and records can also be read straight into the memory of `gpu` (`reading_directly`).

    Raises ConfigError (path, capacity or engine impossible), StoreLocked, LayoutError (store of another layout), StoreError (foreign,
    damaged, newer, or of another format or namespace). Nothing new is left there then, and what was there stays.
    """

    name = "disk"

    def __init__(
        self,
        path: str | os.PathLike[str],
        layout: PageLayout,
        format: Format,
        capacity_bytes: int,
        namespace: bytes,
        durability: Durability = "process",
        engine: FileEngine | DiskEngine = "auto",
        depth: int = DEPTH,
        clock: Callable[[], float] = time.monotonic,
        cpus: Sequence[int] = (),
        gpu: Accelerator | None = None,
    ) -> None:
        if durability not in get_args(Durability):
            raise ConfigError(f"disk.durability is {durability!r}; expected one of {', '.join(get_args(Durability))}")
        self.layout = layout
        self.format = format
        self.capacity_bytes = capacity_bytes
        self.slot_bytes = record.record_bytes(format.payload_bytes(layout))
        self._most_payload_bytes = format.payload_bytes(layout)
        self._format_hash = record.format_hash(format.name)
        self._durability = durability
        if capacity_bytes < self.slot_bytes:
            needed = f"one {format.name} page of this layout takes {self.slot_bytes} bytes on disk"
            raise ConfigError(f"disk.capacity_bytes is {capacity_bytes}, but {needed}; raise it")

        self._lock = threading.Lock()
        self._quiet = threading.Condition(self._lock)
        self._running = 0
        self._closed = False
        self._in_flight: set[int] = set()
        self._checkpointing = False
        self._full_logged = False
        self._scratch = threading.local()
        self.counters: Counter[str] = Counter()
        """Records "recovered", "discarded: <reason>", "read directly", "not proven directly", slots "tidied"; failures "disk full",
        "io errors", "refused: <reason>"."""

        reader = None
        if engine == "gds":
            check_direct(format, layout)
            try:
                reader, engine = find_reader(gpu, existing_part(Path(path)), depth), "direct"
            except DeviceError as error:
                raise ConfigError(f"disk.io_engine is gds, but {error}; use auto") from error
        chosen = choose_engine(existing_part(Path(path)), engine, depth, cpus) if isinstance(engine, str) else Chosen(engine)
        self._instead = chosen.instead
        try:
            self._directory = StoreDirectory(Path(path))
            try:
                self._description, self._was_clean = self._open(namespace)
            except BaseException:
                self._directory.give_up()
                raise
        except BaseException:
            chosen.engine.stop()
            raise
        self._next_sequence = self._description.synced_sequence + 1
        self._segments = Segments(self._directory, chosen.engine, self._description.segment_slots, self.slot_bytes)
        sizes = (self._description.segment_slots, self.slot_bytes, depth)
        self._direct = DirectRecords(reader, self._directory, *sizes) if reader is not None else None
        self._recovered = not self._segments.numbers()
        if not self._segments.punches:
            _log.info("disk store %s: this file system cannot punch holes; every copy takes %d bytes", path, self.slot_bytes)
        self._book = SlotBook(self.slot_bytes, capacity_bytes, self._segments.punches, clock)

    def _open(self, namespace: bytes) -> tuple[Description, bool]:
        """The description now on disk, marked as in use, and whether the store had been closed in order."""
        segment_bytes = max(_SEGMENT_BYTES, self.capacity_bytes // _MOST_SEGMENTS)
        segment_slots = max(1, segment_bytes // self.slot_bytes)
        wanted = Description(self.layout, self.format.name, namespace.hex(), self.slot_bytes, segment_slots, self.capacity_bytes)
        found = self._directory.describe(wanted)
        self._directory.check_space(self.capacity_bytes)
        description = reopened(found or wanted, self.capacity_bytes)
        try:
            self._directory.write(description)
        except OSError as error:
            raise StoreError(f"disk store {self._directory.path}: cannot write its description: {error.strerror}") from error
        return description, found is None or found.clean

    @property
    def bytes_used(self) -> int:
        return self._book.used_bytes

    @property
    def usable_bytes(self) -> int:
        """`capacity_bytes`, or what the tier held when the disk turned out to be full (tried again after 30 s)."""
        return self._book.usable_bytes

    @property
    def free_slots(self) -> int:
        return self._book.free_slots if self._recovered and not self._closed else 0

    @property
    def capacity_slots(self) -> int:
        return self._book.usable_bytes // self.slot_bytes

    def reserve(self, count: int) -> list[int] | None:
        if not self._recovered or self._closed:
            return None
        return self._book.reserve(count)

    def free(self, slots: Sequence[int]) -> None:
        """Give slots back. Their copies cannot be loaded any more; they are gone for good, restarts included, once `tidy` ran or,
        for a slot reserved again before that, once its new copy is stored."""
        self._book.free(slots)

    def store(self, slots: Sequence[int], pages: Sequence[PageId], payloads: Sequence[Payload]) -> list[Refused | None]:
        self._book.check_held(slots)
        with self._operation() as open_:
            if not open_:
                return [Refused("closed")] * len(slots)
            if not len(slots) == len(pages) == len(payloads):
                raise ValueError(f"{len(slots)} slots, {len(pages)} pages and {len(payloads)} payloads; expected as many of each")
            first = self._begin_sequence(len(slots))
            try:
                written: list[int | Refused] = []
                at_once = max(1, _SCRATCH_BYTES // self.slot_bytes)
                for start in range(0, len(slots), at_once):
                    part = slice(start, start + at_once)
                    written += self._write(slots[part], first + start, pages[part], payloads[part])
                if self._durability == "power":
                    written = self._make_durable(slots, written)
                for slot, outcome in zip(slots, written, strict=True):
                    if isinstance(outcome, int):
                        self._book.wrote(slot, outcome)
            finally:
                with self._lock:
                    self._in_flight.discard(first)
            results = [outcome if isinstance(outcome, Refused) else None for outcome in written]
            if self._full_logged and None in results and self.usable_bytes == self.capacity_bytes:
                self._full_logged = False
                _log.info("disk store %s: there is room again", self._directory.path)
            return results

    def load(self, slots: Sequence[int], keys: Sequence[PageKey], staging: NDArray[np.uint8]) -> list[Payload | Refused]:
        loaded = dict(self.load_each(slots, keys, staging))
        return [loaded[index] for index in range(len(slots))]

    def load_each(self, slots: Sequence[int], keys: Sequence[PageKey], staging: NDArray[np.uint8]) -> Loaded:
        """As of every tier; while the caller works on one payload, the next are being read. `close` waits for the generator's end."""
        check_staging(staging, len(slots), self.slot_bytes)
        return self._load_each(slots, keys, staging)

    def _load_each(self, slots: Sequence[int], keys: Sequence[PageKey], staging: NDArray[np.uint8]) -> Loaded:
        with self._operation() as open_:
            lengths = [self._book.stored_bytes(slot) if open_ else 0 for slot in slots]
            for index, length in enumerate(lengths):
                if length == 0:
                    yield index, self._refused("key" if open_ else "closed")
            if not any(lengths):
                return
            with contextlib.closing(fetch(self._segments, slots, lengths, staging)) as fetched:
                for index, found in fetched:
                    if isinstance(found, OSError):
                        yield index, self._refused(f"io: {found.strerror}")
                    elif len(found) < lengths[index]:
                        yield index, self._refused("truncated")
                    else:
                        yield index, self._verified(found, keys[index])

    @property
    def reads_directly(self) -> bool:
        """Whether records can be read straight into a GPU's memory."""
        return self._direct is not None

    @contextlib.contextmanager
    def reading_directly(self) -> Iterator[DirectRecords | None]:
        """What reads records straight into a GPU's memory, none of which has proved itself (`proves`); `close` waits for the end of this.

        None where `reads_directly` says no, and once the tier was closed.
        """
        with self._operation() as open_:
            yield self._direct if open_ else None

    def stored_bytes(self, slots: Sequence[int]) -> list[int]:
        """Bytes of the record in each of these slots; 0 where there is none."""
        return [self._book.stored_bytes(slot) for slot in slots]

    def proves(self, header: Bytes, key: PageKey, checksum: bytes) -> bool:
        """Whether a record that begins with `header`, and whose payload has this xxh3-128, is the copy of `key` that `load` would give."""
        found = record.parse(header)
        return found is not None and found.page.key == key and self._fault(found) is None and found.payload_checksum == checksum

    def read_directly(self, proven: int, unproven: int) -> None:
        """Count records that were read directly: those that proved themselves, and those that are left to `load`, which says why."""
        self._count("read directly", proven)
        if unproven:
            self._count("not proven directly", unproven)

    def recover(self) -> Iterator[tuple[int, PageId]]:
        """Copies found on disk, parents before children. Later calls give none.

        After a clean close headers are enough; otherwise the payload of every record that was not known to be synced is verified as
        well. Newest copies win, over older ones of the same key and over those that no longer fit. StoreError if the segment files
        cannot be read.
        """
        if self._recovered:
            return iter(())
        survey = self._survey()
        most_slots = survey.slots if self._segments.punches else min(survey.slots, self.capacity_bytes // self.slot_bytes)
        within = [(slot, header) for slot, header in survey.valid if slot < most_slots]
        survey.reasons["capacity"] += len(survey.valid) - len(within)
        kept, dropped, reasons = select(within, self.capacity_bytes, self._cost_bytes)
        stale = sorted({*dropped, *(slot for slot in survey.debris if slot < most_slots)})
        if most_slots < survey.slots:
            self._segments.cut(most_slots)
        self._book.adopt(most_slots, {slot: record.record_bytes(header.payload_bytes) for slot, header in kept}, stale)
        self._next_sequence = max(self._next_sequence, survey.last_sequence + 1)
        self._count("recovered", len(kept))
        for reason, count in (survey.reasons + reasons).items():
            self._count(f"discarded: {reason}", count)
        self._recovered = True
        self.tidy()
        if not self._was_clean:
            self._trim(kept)
        kept.sort(key=lambda item: (item[1].page.depth, item[1].sequence))
        return iter([(slot, header.page) for slot, header in kept])

    def tidy(self) -> int:
        """Erase freed copies from the disk; returns how many. For a worker thread; safe beside every other call."""
        erased = 0
        with self._operation() as open_:
            for _ in range(self._book.pending if open_ else 0):
                slot = self._book.next_pending()
                if slot is None:
                    break
                gone = self._erase(slot)
                self._book.tidied(slot, gone)
                erased += gone
        self._count("tidied", erased)
        return erased

    def checkpoint(self) -> bool:
        """Make all finished stores survive a power failure and say so in `store.json`; False if that failed or is already being done.

        For a worker thread; safe beside every other call.
        """
        with self._operation() as open_:
            with self._lock:
                if not open_ or self._checkpointing:
                    return False
                self._checkpointing = True
            try:
                return self._checkpoint(clean=False)
            finally:
                self._checkpointing = False

    def check_integrity(self) -> None:
        self._book.check_integrity()

    def report(self) -> dict[str, object]:
        """What this tier achieved and how it stands, for stats and `kvtier doctor`. Sizes in bytes."""
        with self._lock:
            counters = dict(self.counters)
        return {
            "path": str(self._directory.path),
            "format": self.format.name,
            "engine": self._segments.engine.name if self._direct is None else "gds",
            "direct_reader": None if self._direct is None else self._direct.reader.name,
            "engine_instead": self._instead,
            "io_depth": self._segments.engine.depth,
            "io_cpus": list(self._segments.engine.cpus),
            "durability": self._durability,
            "punch_holes": self._segments.punches,
            "capacity_bytes": self.capacity_bytes,
            "usable_bytes": self.usable_bytes,
            "bytes_used": self.bytes_used,
            "slot_bytes": self.slot_bytes,
            "free_slots": self.free_slots,
            "pending_slots": self._book.pending,
            "segments": len(self._segments),
            "synced_sequence": self._description.synced_sequence,
            "counters": counters,
        }

    def close(self) -> None:
        """Wait for running calls, tidy, sync, mark the store clean, unlock. Later stores and loads are refused."""
        if self._closed:
            return
        self.tidy()
        with self._quiet:
            self._closed = True
            self._quiet.wait_for(lambda: self._running == 0)
        if self._recovered:
            self._checkpoint(clean=self._book.pending == 0)
        self._segments.close()
        if self._direct is not None:
            self._direct.close()
        self._segments.engine.stop()
        self._directory.close()

    @contextlib.contextmanager
    def _operation(self) -> Iterator[bool]:
        """Keeps `close` from taking the files away; yields False if it already has."""
        with self._lock:
            open_ = not self._closed
            self._running += open_
        try:
            yield open_
        finally:
            with self._quiet:
                self._running -= open_
                self._quiet.notify_all()

    def _count(self, what: str, count: int = 1) -> None:
        with self._lock:
            self.counters[what] += count

    def _begin_sequence(self, count: int) -> int:
        with self._lock:
            first = self._next_sequence
            self._next_sequence += count
            self._in_flight.add(first)
            return first

    def _write(self, slots: Sequence[int], first: int, pages: Sequence[PageId], payloads: Sequence[Payload]) -> list[int | Refused]:
        """Write as many records as the scratch holds, numbered from `first`; their bytes, or why not, when nothing of them is left."""
        rows = self._scratch_rows()[: len(slots)]
        lengths, stale, crowded = [0] * len(slots), [0] * len(slots), False
        for i, (page, payload) in enumerate(zip(pages, payloads, strict=True)):
            if self._fits(payload):
                lengths[i] = self._compose(first + i, page, payload, rows[i])
                stale[i], more = self._book.claim(slots[i], lengths[i])
                crowded |= more
        if crowded:
            self.tidy()
        errors = put(self._segments, slots, lengths, stale, rows)
        if any(error is not None and error.errno in FULL_ERRNOS for error in errors) and self.tidy():
            # Freed copies that were still on disk may have been all that was in the way.
            again = [length if error is not None else 0 for length, error in zip(lengths, errors, strict=True)]
            errors = put(self._segments, slots, again, stale, rows)
        return [
            self._failed(slot, error) if error is not None else length or Refused("format")
            for slot, length, error in zip(slots, lengths, errors, strict=True)
        ]

    def _fits(self, payload: Payload) -> bool:
        whole = payload.nbytes == self._most_payload_bytes or not self.format.fixed_size
        return payload.dtype == np.uint8 and payload.ndim == 1 and payload.nbytes <= self._most_payload_bytes and whole

    def _compose(self, sequence: int, page: PageId, payload: Payload, row: Bytes) -> int:
        payload = np.ascontiguousarray(payload)
        checksum = record.payload_checksum(payload)
        header = record.Header(sequence, page, self.layout.fingerprint, self._format_hash, payload.nbytes, checksum)
        return len(record.compose(header, payload, row))

    def _scratch_rows(self) -> Bytes:
        """This thread's memory for records on their way to the disk, `[rows, slot_bytes]`."""
        if not hasattr(self._scratch, "rows"):
            count = max(1, _SCRATCH_BYTES // self.slot_bytes)
            self._scratch.rows = page_aligned(count * self.slot_bytes).reshape(count, self.slot_bytes)
        rows: Bytes = self._scratch.rows
        return rows

    def _failed(self, slot: int, error: OSError) -> Refused:
        """Make what was written of a record invisible and say why it was refused."""
        self._book.failed(slot, self._erase(slot))
        if error.errno not in FULL_ERRNOS:
            self._count("io errors")
            _log.warning("disk store %s: cannot write: %s", self._directory.path, error)
            return Refused(f"io: {error.strerror}")
        self._count("disk full")
        self._book.disk_is_full()
        if not self._full_logged:
            self._full_logged = True
            _log.warning("disk store %s: disk full at %d bytes of copies; trying again later", self._directory.path, self.usable_bytes)
        return Refused("disk full")

    def _erase(self, slot: int) -> bool:
        """Punch a slot, so that no record is found in it; False if the medium fails."""
        try:
            self._segments.erase(slot)
        except OSError as error:
            self._count("io errors")
            _log.warning("disk store %s: cannot erase a freed copy: %s", self._directory.path, error)
            return False
        return True

    def _make_durable(self, slots: Sequence[int], written: list[int | Refused]) -> list[int | Refused]:
        """Sync the segments just written; records of a segment that cannot be synced are withdrawn."""
        segments = {self._segments.segment_of(slot) for slot, outcome in zip(slots, written, strict=True) if isinstance(outcome, int)}
        broken: dict[int, OSError] = {}
        for segment in segments:
            try:
                self._segments.sync(segment)
            except OSError as error:
                broken[segment] = error
        outcomes: list[int | Refused] = []
        for slot, outcome in zip(slots, written, strict=True):
            fault = broken.get(self._segments.segment_of(slot))
            outcomes.append(self._failed(slot, fault) if fault and isinstance(outcome, int) else outcome)
        return outcomes

    def _verified(self, data: Bytes, key: PageKey) -> Payload | Refused:
        header = record.parse(data)
        if header is None:
            return self._refused("checksum")
        if header.page.key != key:
            return self._refused("key")
        fault = self._fault(header)
        if fault is not None:
            return self._refused(fault)
        payload = record.payload_of(header, data)
        return self._refused(payload.reason) if isinstance(payload, Refused) else payload

    def _refused(self, reason: str) -> Refused:
        self._count(f"refused: {reason}")
        return Refused(reason)

    def _fault(self, header: record.Header) -> str | None:
        """What keeps a sound header from being one of this tier's copies."""
        if (header.layout_fingerprint, header.format_hash) != (self.layout.fingerprint, self._format_hash):
            return "format"
        if header.payload_bytes > self._most_payload_bytes or (self.format.fixed_size and header.payload_bytes != self._most_payload_bytes):
            return "truncated"
        return None

    def _cost_bytes(self, header: record.Header) -> int:
        return record.record_bytes(header.payload_bytes) if self._segments.punches else self.slot_bytes

    def _survey(self) -> Survey:
        """All segment files, several at once. StoreError if one cannot be read."""
        trusted = None if self._was_clean else self._description.synced_sequence
        found = Survey()
        numbers = self._segments.numbers()
        try:
            with ThreadPoolExecutor(_SCAN_THREADS, thread_name_prefix="kvtier-scan") as pool:
                for survey in pool.map(lambda segment: scan(self._segments, segment, self._fault, trusted), numbers):
                    found.merge(survey)
        except OSError as error:
            raise StoreError(f"disk store {self._directory.path}: cannot read its segments: {error.strerror}") from error
        if not self._was_clean:
            self._segments.mark_dirty(numbers)  # verified, but perhaps still only in the page cache
        return found

    def _trim(self, kept: Sequence[tuple[int, record.Header]]) -> None:
        """Punch behind every kept record: a power failure can keep a record and lose the punch before it."""
        try:
            for slot, header in kept:
                self._segments.trim(slot, record.record_bytes(header.payload_bytes))
        except OSError as error:
            self._count("io errors")
            _log.warning("disk store %s: cannot give back blocks behind its records: %s", self._directory.path, error)

    def _checkpoint(self, clean: bool) -> bool:
        with self._lock:
            synced = min(self._in_flight, default=self._next_sequence) - 1
        dirty = self._segments.take_dirty()
        try:
            for segment in sorted(dirty):
                self._segments.sync(segment)
            description = replace(self._description, synced_sequence=synced, clean=clean)
            self._directory.write(description)
        except OSError as error:
            self._segments.mark_dirty(dirty)
            self._count("io errors")
            _log.warning("disk store %s: checkpoint failed: %s", self._directory.path, error)
            return False
        self._description = description
        return True
