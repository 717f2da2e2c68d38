"""Warnings that may come by the thousand, such as one for every page that a failing disk refuses: said at once, then now and then.

Thread-safe; state: per kind, when it was said last and how often it was not said since. Kinds are few (tiers times reasons), so they are
kept for ever.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable

EVERY_S = 60.0
"""A kind of warning that goes on is said so often."""


class RepeatedWarning:
    """Warnings of one module. `clock` gives seconds."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._lock = threading.Lock()
        self._said: dict[Hashable, tuple[float, int]] = {}

    def say(self, kind: Hashable, message: str, *arguments: object) -> None:
        """Log this, unless `kind` was said less than EVERY_S ago; then the next one tells how many were not."""
        now = self._clock()
        with self._lock:
            last, unsaid = self._said.get(kind, (float("-inf"), 0))
            said = now - last >= EVERY_S
            self._said[kind] = (now, 0) if said else (last, unsaid + 1)
        if said:
            more = f" (and {unsaid} more like it in the last {now - last:.0f} s)" if unsaid else ""
            self._log.warning(message + more, *arguments)
