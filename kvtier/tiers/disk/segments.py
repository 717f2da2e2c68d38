"""The segment files of a disk store: where slot number n is, and the I/O on it.

Any thread may call anything; `_lock` guards the open files and the set of segments written since the last sync, never I/O. Two threads
must not work on the same slot.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Sequence

from kvtier.io.files import Bytes, FileEngine, Request
from kvtier.tiers.disk.directory import StoreDirectory
from kvtier.tiers.disk.plan import Run


class Segments:
    """Slots of `slot_bytes`, `segment_slots` of them in each file; files appear when first needed. Methods raise OSError."""

    def __init__(self, directory: StoreDirectory, engine: FileEngine, segment_slots: int, slot_bytes: int) -> None:
        self.segment_slots = segment_slots
        self.slot_bytes = slot_bytes
        self.engine = engine
        self._directory = directory
        self._punches = engine.can_punch(directory.path)
        self._lock = threading.Lock()
        self._files: dict[int, int] = {}
        self._dirty: set[int] = set()

    @property
    def punches(self) -> bool:
        """Whether the file system can deallocate parts of a file."""
        return self._punches

    def __len__(self) -> int:
        return len(self._files)

    def numbers(self) -> list[int]:
        """The segments that exist as files, ascending."""
        return self._directory.segments()

    def file(self, segment: int) -> int:
        """The open file of a segment, created if missing."""
        with self._lock:
            file = self._files.get(segment)
        if file is not None:
            return file
        file = self.engine.open(self._directory.segment_path(segment))
        self._directory.sync()
        with self._lock:
            ours = self._files.setdefault(segment, file)
        if ours != file:
            self.engine.close(file)
        return ours

    def are_open(self, slots: Iterable[int]) -> bool:
        """Whether the files of all these slots are open, so that nobody waits for that."""
        with self._lock:
            return all(segment in self._files for segment in {slot // self.segment_slots for slot in slots})

    def segment_of(self, slot: int) -> int:
        """The segment a slot is in."""
        return slot // self.segment_slots

    def read(self, slot: int, buffer: Bytes) -> int:
        """Fill `buffer` from the start of the slot; returns the bytes read, fewer only where the file ends."""
        return self.engine.pread_into(self.file(self.segment_of(slot)), self._offset(slot), buffer)

    def shorten(self, slot: int, record_bytes: int, stale_bytes: int) -> None:
        """Give back what an earlier record, which may reach `stale_bytes` into the slot, would leave behind one of `record_bytes`."""
        if self._punches and stale_bytes > record_bytes:
            file = self.file(self.segment_of(slot))
            self.engine.punch(file, self._offset(slot) + record_bytes, stale_bytes - record_bytes)

    def allocate(self, runs: Iterable[Run]) -> None:
        """Ask for the disk blocks of writes to come, so that these need not wait for each other. On a full disk they will say so."""
        for run in runs:
            with contextlib.suppress(OSError):  # of opening the file, which the write will meet again
                self.engine.allocate(self.file(run.segment), run.offset, run.length)

    def write_all(self, runs: Sequence[Run], memory: Bytes) -> list[OSError | None]:
        """Write each run from its rows of `memory` (1-D, rows of `slot_bytes`); per run None or what failed."""
        results: list[OSError | None] = [None] * len(runs)
        requests: dict[int, Request] = {}
        for number, run in enumerate(runs):
            start = run.first * self.slot_bytes
            try:
                requests[number] = Request(self.file(run.segment), run.offset, memory[start : start + run.length])
            except OSError as error:
                results[number] = error
        for number, failure in zip(requests, self.engine.write_all(list(requests.values())), strict=True):
            results[number] = failure
        # Only after the change: were they marked before, a checkpoint could sync in between and forget them.
        self.mark_dirty(run.segment for run in runs)
        return results

    def trim(self, slot: int, record_bytes: int) -> None:
        """Give back what an earlier, longer record may have left behind the one in the slot."""
        if self._punches and record_bytes < self.slot_bytes:
            self.engine.punch(self.file(self.segment_of(slot)), self._offset(slot) + record_bytes, self.slot_bytes - record_bytes)

    def erase(self, slot: int) -> None:
        """Leave no record in the slot."""
        self.engine.punch(self.file(self.segment_of(slot)), self._offset(slot), self.slot_bytes)
        self.mark_dirty([self.segment_of(slot)])  # only now: marked before, a checkpoint could sync in between and forget it

    def sync(self, segment: int) -> None:
        """Make finished writes to one segment survive a power failure."""
        self.engine.sync(self.file(segment))

    def take_dirty(self) -> set[int]:
        """The segments changed since this was last asked; the caller syncs them or hands them back to `mark_dirty`."""
        with self._lock:
            dirty, self._dirty = self._dirty, set()
            return dirty

    def mark_dirty(self, segments: Iterable[int]) -> None:
        """These segments have changes that are not synced."""
        with self._lock:
            self._dirty.update(segments)

    def cut(self, slots: int) -> None:
        """Shorten the files so that only the first `slots` slots remain."""
        for segment in self.numbers():
            most_bytes = max(0, slots - segment * self.segment_slots) * self.slot_bytes
            if self.engine.size(self.file(segment)) > most_bytes:
                os.truncate(self._directory.segment_path(segment), most_bytes)

    def close(self) -> None:
        """Close all files; the object must not be used afterwards."""
        for file in self._files.values():
            self.engine.close(file)
        self._files.clear()

    def _offset(self, slot: int) -> int:
        return slot % self.segment_slots * self.slot_bytes
