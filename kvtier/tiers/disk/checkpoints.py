"""Checkpoints: all records that were written by then survive a power failure, and the description of the store says so.

State: the description, which is replaced whole, by one checkpoint at a time.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace

from kvtier.tiers.disk.directory import Description, StoreDirectory
from kvtier.tiers.disk.segments import Segments
from kvtier.tiers.disk.tidying import Tally

_log = logging.getLogger(__name__)


class Checkpoints:
    """Of one store. `finished`: the sequence number up to which all records are written."""

    def __init__(
        self, directory: StoreDirectory, segments: Segments, description: Description, tally: Tally, finished: Callable[[], int]
    ) -> None:
        self.description = description
        self._directory = directory
        self._segments = segments
        self._tally = tally
        self._finished = finished
        self._making = threading.Lock()

    def make(self) -> bool:
        """One while the store is in use; False if that failed or is already being done."""
        if not self._making.acquire(blocking=False):
            return False
        try:
            return self.write(clean=False)
        finally:
            self._making.release()

    def write(self, clean: bool) -> bool:
        """Sync what was written and describe it; `clean`: the store is being closed in order. False, and one line in the log, if that
        failed. When nobody makes another."""
        synced = self._finished()
        dirty = self._segments.take_dirty()
        try:
            for segment in sorted(dirty):
                self._segments.sync(segment)
            description = replace(self.description, synced_sequence=synced, clean=clean)
            self._directory.write(description)
        except OSError as error:
            self._segments.mark_dirty(dirty)
            self._tally.add("io errors")
            _log.warning("disk store %s: checkpoint failed: %s", self._directory.path, error)
            return False
        self.description = description
        return True
