"""Freed copies leave the disk: each slot's record is punched, so that no restart finds it. And the tally of what a store went through.

The slots to tidy are the `SlotBook`'s; nothing is held across I/O. Safe beside every other call.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter

from kvtier.repeated import RepeatedWarning
from kvtier.tiers.disk.segments import Segments
from kvtier.tiers.disk.slots import SlotBook

_log = logging.getLogger(__name__)

MOST_FAILURES = 16
"""So many slots that cannot be erased end a pass: a medium that fails may take long to say so each time."""


class Tally:
    """Counts by name, from any thread."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, what: str, count: int = 1) -> None:
        """Count `what` so many times more."""
        with self._lock:
            self.counts[what] += count

    def copy(self) -> dict[str, int]:
        """The counts of this moment."""
        with self._lock:
            return dict(self.counts)


class Tidier:
    """Erases slots of one store; `path` is for the log."""

    def __init__(self, path: str, segments: Segments, book: SlotBook, tally: Tally) -> None:
        self._path = path
        self._segments = segments
        self._book = book
        self._tally = tally
        self._warnings = RepeatedWarning(_log)

    def tidy(self) -> int:
        """Erase what was freed before this call; returns how many copies that took.

        What cannot be erased comes last next time; after MOST_FAILURES of these the rest waits until then, too.
        """
        erased = failed = 0
        for _ in range(self._book.pending):
            slot = self._book.next_pending()
            if slot is None:
                break
            gone = self.erase(slot)
            self._book.tidied(slot, gone)
            erased += gone
            failed += not gone
            if failed == MOST_FAILURES:
                break
        self._tally.add("tidied", erased)
        return erased

    def erase(self, slot: int) -> bool:
        """Punch a slot, so that no record is found in it; False if the medium fails."""
        try:
            self._segments.erase(slot)
        except OSError as error:
            self._tally.add("io errors")
            what = "disk store %s: cannot erase freed copies, which is tried again and again: %s"
            self._warnings.say(error.errno, what, self._path, error)
            return False
        return True
