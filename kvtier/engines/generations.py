"""Key prefixes for engines whose weights may change while they run: what was kept under other weights must not be found under these.

Begins without a prefix: keys of the weights that the store itself knows by their fingerprint. After a change nobody here knows what the
weights are, so each generation has a name that no other process has: this one finds what it keeps, the next one does not.
State: the names and the threads seen, under a lock of its own; called from the engine's storage threads.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable


class Generations:
    """`version` tells what the engine calls its weights now; whenever that is not what it was, at first `at_start`, a generation begins.

    An engine says so while its storage threads still carry what the old weights computed, and then throws away what it has and goes on
    with new threads. What was kept between the two is of either kind: if a flush follows a change, another generation begins with it.
    """

    def __init__(self, version: Callable[[], object], at_start: object) -> None:
        self._version = version
        self._seen = at_start
        self._prefix = b""
        self._threads: set[threading.Thread] = set()
        self._unsettled = False
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Whatever was kept is to be forgotten, perhaps because the weights are others."""
        with self._lock:
            self._begin()

    def _begin(self) -> None:
        self._prefix = uuid.uuid4().bytes

    def prefix(self) -> bytes:
        """What the keys of now start with."""
        thread = threading.current_thread()
        with self._lock:
            version = self._version()
            if thread not in self._threads and not all(known.is_alive() for known in self._threads):
                self._threads.clear()
                if self._unsettled:
                    self._unsettled = False
                    self._begin()
            self._threads.add(thread)
            if version != self._seen:
                self._seen, self._unsettled = version, True
                self._begin()
            return self._prefix
