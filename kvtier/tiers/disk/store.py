"""The disk tier itself: carries records between memory and segment files, and brings a store back after a restart.

Bookkeeping (`reserve`, `free`) is in `SlotBook` with a lock of its own, the sides are `RecordReader` and `RecordWriter`, how it comes back
is in `opening.py` and `recovery.py`. `store`, `load`, `tidy` and `checkpoint` may run in several threads at once, each slot in one of them;
`Calls` knows how many run. `recover` and `close` are called once, by the owner.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from kvtier.cuda.surface import Accelerator
from kvtier.errors import ConfigError, StoreError
from kvtier.forked import tell_children
from kvtier.formats.base import Format, Payload
from kvtier.io.files import Bytes, FileEngine
from kvtier.io.pooled import DEPTH
from kvtier.keys import PageKey
from kvtier.layout import PageLayout
from kvtier.tiers.base import FinishStore, Loaded, PageId, Placed, Refused, Tier
from kvtier.tiers.disk import record
from kvtier.tiers.disk.calls import Calls
from kvtier.tiers.disk.checkpoints import Checkpoints
from kvtier.tiers.disk.direct import DirectRecords
from kvtier.tiers.disk.opening import DiskEngine, check_directory, open_directory, open_engine, slot_bytes_of
from kvtier.tiers.disk.reading import RecordReader
from kvtier.tiers.disk.recovery import find_copies, missing_files, trim
from kvtier.tiers.disk.segments import Segments
from kvtier.tiers.disk.slots import SlotBook
from kvtier.tiers.disk.tidying import Tally, Tidier
from kvtier.tiers.disk.writer import RecordWriter

Durability = Literal["process", "power"]

_log = logging.getLogger(__name__)


class DiskTier(Tier):
    """Copies in `path`, at most `capacity_bytes` of them, found again by `recover` after a restart or a crash.

    `namespace` (see `kvtier.keys.namespace`) keeps copies of different models apart. `durability`: "process" survives the death of
    this process at any instant; "power" also survives a power failure, at the price of one fdatasync per `store` call. Records are
    4096-aligned; formats of variable size are charged what each copy takes where the file system can deallocate.

    A store that is not new gives no slots until `recover` was called. `tidy` and `checkpoint` want to be called now and then by a
    worker: the first makes freed copies unfindable for good, the second shortens the next start after a crash.

    `engine` is a name for `kvtier.io.probe.choose_engine`, with `depth` requests at once, or an engine, from then on the tier's. Stores
    written by one engine open with every other. `cpus`: those that an engine made here keeps its threads on, any without; at most
    `decoders` of them decode pages at once (`place_some`), the others read meanwhile. The engine "gds" is `direct`, and records can also be
    read straight into the memory of `gpu` (`reading_directly`).

    Raises ConfigError (path, capacity or engine impossible), StoreLocked, LayoutError (store of another layout), StoreError (foreign,
    damaged, newer, or of another format or namespace). Nothing new is left there then, and what was there stays. In a forked child the tier
    is closed; the store stays the parent's.
    """

    name = "disk"

    @staticmethod
    def check(path: str | os.PathLike[str], layout: PageLayout, format: Format, capacity_bytes: int, namespace: bytes) -> None:
        """Raises what opening it would for a store of others, or for too little room: for whoever takes memory for other tiers first."""
        check_directory(Path(path), layout, format, namespace, slot_bytes_of(layout, format, capacity_bytes), capacity_bytes)

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
        decoders: int = 1,
    ) -> None:
        if durability not in get_args(Durability):
            raise ConfigError(f"disk.durability is {durability!r}; expected one of {', '.join(get_args(Durability))}")
        self.layout = layout
        self.format = format
        self.capacity_bytes = capacity_bytes
        self.slot_bytes = slot_bytes_of(layout, format, capacity_bytes)
        self._durability = durability
        self._calls = Calls()
        self._tally = Tally()
        self.counters = self._tally.counts
        """Records "recovered", "discarded: <reason>", "read directly", "not proven directly", slots "tidied"; failures
        "disk full", "io errors", "refused: <reason>"."""

        chosen, reader = open_engine(Path(path), layout, format, engine, depth, cpus, gpu)
        self._instead = chosen.instead
        try:
            opened = open_directory(Path(path), layout, format, namespace, self.slot_bytes, capacity_bytes)
        except BaseException:
            chosen.engine.stop()
            raise
        self._directory, self._was_clean, description = opened.directory, opened.was_clean, opened.description
        self._segments = Segments(self._directory, chosen.engine, description.segment_slots, self.slot_bytes)
        sizes = (description.segment_slots, self.slot_bytes, depth)
        self._direct = DirectRecords(reader, self._directory, *sizes) if reader is not None else None
        segments = self._segments.numbers()
        self._recovered = not segments
        if missing := missing_files(segments, description.synced_sequence > 0):
            _log.warning("disk store %s: %s are gone, not by its doing; their pages are computed again", path, missing)
        if not self.refunds:
            rests = "" if format.fixed_size else f": {format.name} gains no room by its byte stage, so it rests (see disk.compress)"
            level = logging.WARNING if rests else logging.INFO
            _log.log(level, "disk store %s: this file system cannot punch holes; every copy takes %d bytes%s", path, self.slot_bytes, rests)
        self._book = SlotBook(self.slot_bytes, capacity_bytes, self._segments.punches, clock)
        owned = (str(self._directory.path), self._segments, self._book)
        self._tidier = Tidier(*owned, self._tally)
        self._reader = RecordReader(self._calls.one, self._segments, self._book, self._tally, layout, format, decoders)
        first = description.synced_sequence + 1
        self._writer = writer = RecordWriter(*owned, self._tidier, self._tally, layout, format, first, durability == "power")
        self._checkpoints = Checkpoints(self._directory, self._segments, description, self._tally, lambda: writer.finished_sequence)
        tell_children(self)

    def after_fork_in_child(self) -> None:
        """Closed from now on; the store stays the parent's."""
        self._calls.after_fork_in_child()

    @property
    def bytes_used(self) -> int:
        return self._book.used_bytes

    @property
    def used_slots(self) -> int:
        return self._book.used_slots

    @property
    def usable_bytes(self) -> int:
        """`capacity_bytes`, or what the tier held when the disk turned out to be full (tried again after 30 s)."""
        return self._book.usable_bytes

    @property
    def refunds(self) -> bool:  # type: ignore[override]
        return self._segments.punches

    @property
    def free_slots(self) -> int:
        return self._book.free_slots if self._recovered and not self._calls.closed else 0

    @property
    def capacity_slots(self) -> int:
        return self._book.usable_bytes // self.slot_bytes

    def reserve(self, count: int) -> list[int] | None:
        if not self._recovered or self._calls.closed:
            return None
        return self._book.reserve(count)

    def free(self, slots: Sequence[int]) -> None:
        """Give slots back. Their copies cannot be loaded any more; they are gone for good, restarts included, once `tidy` ran or,
        for a slot reserved again before that, once its new copy is stored."""
        self._book.free(slots)

    def store(
        self, slots: Sequence[int], pages: Sequence[PageId], payloads: Sequence[Payload], digests: Sequence[bytes] | None = None
    ) -> list[Refused | None]:
        return self._begin_store(slots, pages, payloads, digests, ahead=False)()

    def begin_store(
        self, slots: Sequence[int], pages: Sequence[PageId], payloads: Sequence[Payload], digests: Sequence[bytes] | None = None
    ) -> FinishStore:
        """As of every tier; the records are written by threads of this one. `close` waits until all that was begun is finished."""
        return self._begin_store(slots, pages, payloads, digests, ahead=True)

    def _begin_store(
        self, slots: Sequence[int], pages: Sequence[PageId], payloads: Sequence[Payload], digests: Sequence[bytes] | None, ahead: bool
    ) -> FinishStore:
        self._book.check_held(slots)
        with contextlib.ExitStack() as stack:
            if not stack.enter_context(self._calls.one()):
                return lambda: [Refused("closed")] * len(slots)
            if not len(slots) == len(pages) == len(payloads) == len(slots if digests is None else digests):
                raise ValueError(f"{len(slots)} slots, {len(pages)} pages and {len(payloads)} payloads; expected as many of each")
            writing = self._writer.begin(slots, pages, payloads, digests, ahead)
            running = stack.pop_all()

        def finish() -> list[Refused | None]:
            with running:
                return self._writer.finish(writing)

        return finish

    def load(self, slots: Sequence[int], keys: Sequence[PageKey], staging: NDArray[np.uint8]) -> list[Payload | Refused]:
        loaded = dict(self.load_each(slots, keys, staging))
        return [loaded[index] for index in range(len(slots))]

    def load_each(self, slots: Sequence[int], keys: Sequence[PageKey], staging: NDArray[np.uint8]) -> Loaded:
        """As of every tier; while the caller works on one payload, the next are being read. `close` waits for the generator's end."""
        return self._reader.load_each(slots, keys, staging)

    def place_some(
        self, slots: Sequence[int], keys: Sequence[PageKey], staging: NDArray[np.uint8], memory: torch.Tensor, rows: Sequence[int]
    ) -> Placed:
        """As of every tier; where there are compiled kernels, each read is verified and decoded by threads that read, while others read."""
        return self._reader.place_some(slots, keys, staging, memory, rows)

    def place_ahead(
        self, slots: Sequence[int], keys: Sequence[PageKey], staging: NDArray[np.uint8], memory: torch.Tensor, rows: Sequence[int]
    ) -> Placed | None:
        """As of every tier: where threads of compiled code read and decode, from files that are open."""
        return self._reader.place_ahead(slots, keys, staging, memory, rows)

    @property
    def reads_ahead(self) -> bool:  # type: ignore[override]
        return self._reader.reads_ahead

    @property
    def reads_directly(self) -> bool:
        """Whether records can be read straight into a GPU's memory."""
        return self._direct is not None

    @contextlib.contextmanager
    def reading_directly(self) -> Iterator[DirectRecords | None]:
        """What reads records straight into a GPU's memory, none of which has proved itself (`proves`); `close` waits for the end of this.

        None where `reads_directly` says no, and once the tier was closed.
        """
        with self._calls.one() as open_:
            yield self._direct if open_ else None

    def stored_bytes(self, slots: Sequence[int]) -> list[int]:
        """Bytes of the record in each of these slots; 0 where there is none."""
        return self._book.stored_bytes(slots)

    def proves(self, header: Bytes, key: PageKey, checksum: bytes) -> bool:
        """Whether a record that begins with `header`, and whose payload has this xxh3-128, is the copy of `key` that `load` would give."""
        return self._reader.proves(header, key, checksum)

    def read_directly(self, proven: int, unproven: int) -> None:
        """Count records that were read directly: those that proved themselves, and those that are left to `load`, which says why."""
        self._tally.add("read directly", proven)
        if unproven:
            self._tally.add("not proven directly", unproven)

    def recover(self) -> Iterator[tuple[int, PageId]]:
        """Copies found on disk, parents before children. Later calls give none.

        After a clean close headers are enough; otherwise the payload of every record that was not known to be synced is verified as
        well. Newest copies win, over older ones of the same key and over those that no longer fit. StoreError if the segment files
        cannot be read.
        """
        if self._recovered:
            return iter(())
        trusted = None if self._was_clean else self._checkpoints.description.synced_sequence
        try:
            found = find_copies(self._segments, self._reader.fault, trusted, self.capacity_bytes, self.slot_bytes)
        except OSError as error:
            raise StoreError(f"disk store {self._directory.path}: cannot read its segments: {error.strerror}") from error
        self._book.adopt(found.slots, {slot: record.record_bytes(header.payload_bytes) for slot, header in found.kept}, found.stale)
        self._writer.next_sequence = max(self._writer.next_sequence, found.last_sequence + 1)
        self._tally.add("recovered", len(found.kept))
        for reason, count in found.reasons.items():
            self._tally.add(f"discarded: {reason}", count)
        self._recovered = True
        self.tidy()
        if not self._was_clean:
            self._trim(found.kept)
        found.kept.sort(key=lambda item: (item[1].page.depth, item[1].sequence))
        return iter([(slot, header.page) for slot, header in found.kept])

    def tidy(self) -> int:
        """Erase freed copies from the disk; returns how many. For a worker thread; safe beside every other call."""
        with self._calls.one() as open_:
            return self._tidier.tidy() if open_ else 0

    def checkpoint(self) -> bool:
        """Make all finished stores survive a power failure and say so in `store.json`; False if that failed or is already being done.

        For a worker thread; safe beside every other call.
        """
        with self._calls.one() as open_:
            return open_ and self._checkpoints.make()

    def check_integrity(self) -> None:
        self._book.check_integrity()

    def report(self) -> dict[str, object]:
        """What this tier achieved and how it stands, for stats and `kvtier doctor`. Sizes in bytes."""
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
            "synced_sequence": self._checkpoints.description.synced_sequence,
            "counters": self._tally.copy(),
        }

    def close(self) -> None:
        """Wait for running calls, tidy, sync, mark the store clean, unlock. Later stores and loads are refused."""
        if self._calls.closed:
            return
        self.tidy()
        self._calls.close()
        if self._recovered:
            self._checkpoints.write(clean=self._book.pending == 0)
        self._writer.stop()
        self._segments.close()
        if self._direct is not None:
            self._direct.close()
        self._segments.engine.stop()
        self._directory.close()

    def _trim(self, kept: Sequence[tuple[int, record.Header]]) -> None:
        try:
            trim(self._segments, kept)
        except OSError as error:
            self._tally.add("io errors")
            _log.warning("disk store %s: cannot give back blocks behind its records: %s", self._directory.path, error)
