"""Which streams have used some memory last, so that others wait for them on the device and no thread has to.

An engine computes on streams of its own, kvtier copies on side streams. Who writes to memory that an engine may still be reading, or reads
what it may still be writing, first lets its stream wait for the last use of every other stream. Thread-safe; the lock is never held while
anything waits.
"""

from __future__ import annotations

import threading

from kvtier.cuda.surface import Event, Stream


class Fences:
    """The last use of one pool's memory by each stream."""

    def __init__(self) -> None:
        self._last: dict[int, Event] = {}
        self._lock = threading.Lock()

    def used(self, stream: Stream) -> None:
        """What was launched on `stream` so far may use the memory."""
        event = stream.record()
        with self._lock:
            self._last[stream.key] = event

    def before(self, stream: Stream) -> None:
        """What is launched on `stream` from now on happens after every use noted by other streams."""
        for event in self._open(stream.key):
            stream.wait(event)

    def finish(self) -> None:
        """Let the calling thread sleep until every use noted so far is over: before memory is given back."""
        for event in self._open(None):
            event.wait()

    def _open(self, own: int | None) -> list[Event]:
        """Uses of other streams that are not over; those that are, are forgotten."""
        with self._lock:
            for key in [key for key, event in self._last.items() if event.done()]:
                del self._last[key]
            return [event for key, event in self._last.items() if key != own]
