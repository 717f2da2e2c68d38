"""Long commands that are told to end: what they started is stopped, and their files go, as after Ctrl-C."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stopped_in_order() -> Iterator[None]:
    """While in here, SIGTERM ends this program as an exception does. For the main thread."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
