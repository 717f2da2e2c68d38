"""The calls of a store that are under way: its end waits for them, and later ones find it closed.

State: how many run, and whether the store is open; under a lock of their own, which is never held across I/O.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Calls:
    """Of one store. Any thread may call anything."""

    def __init__(self) -> None:
        self.closed = False
        self._quiet = threading.Condition(threading.Lock())
        self._running = 0

    @contextmanager
    def one(self) -> Iterator[bool]:
        """Keeps `close` from taking the files away; yields False if it already has."""
        with self._quiet:
            open_ = not self.closed
            self._running += open_
        try:
            yield open_
        finally:
            with self._quiet:
                self._running -= open_
                self._quiet.notify_all()

    def close(self) -> None:
        """Let no more begin, and wait for those that run."""
        with self._quiet:
            self.closed = True
            self._quiet.wait_for(lambda: self._running == 0)

    def after_fork_in_child(self) -> None:
        """Closed from now on, whatever other threads were doing: the files are the parent's."""
        self.closed = True
        self._quiet = threading.Condition(threading.Lock())
