"""Which streams have used some memory last, so that others wait for them on the device and no thread has to.

An engine computes on streams of its own, kvtier copies on side streams. Who writes to memory that an engine may still be reading, or reads
what it may still be writing, first lets its stream wait for the last use of every other stream. Thread-safe; the lock is never held while
anything waits. `drained` is for who may not go on before its own stream is done.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from kvtier.cuda.surface import Event, Stream
from kvtier.errors import DeviceError

log = logging.getLogger(__name__)


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


@contextmanager
def drained(stream: Stream) -> Iterator[None]:
    """Whatever is launched inside is over at the end, also if not all of it could be launched. DeviceError if any of it failed."""
    try:
        yield
    except BaseException:
        try:
            stream.record().wait()
        except DeviceError as error:
            log.warning("what was launched before failed too: %s", error)
        raise
    stream.record().wait()
