"""One hint on its way: the cold pages of a prefix, brought up at low priority, given up without harm.

The budget (bytes prefetched and not yet used) is kept by `kvtier.residency`; a page counts until it is claimed, evicted or given up.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvtier.keys import PageKey
from kvtier.mover.transfer import Priority, Transfer

if TYPE_CHECKING:
    from kvtier.residency import Residency


class Prefetch:
    """A running hint. `cancel` and `wait` may be called from any thread."""

    def __init__(self, residency: Residency, keys: Sequence[PageKey], within_s: float) -> None:
        self._residency = residency
        self._keys = keys
        self._within_s = within_s
        self._transfers: list[Transfer] = []
        self._cancelled = False
        self._done = threading.Event()

    @property
    def pages(self) -> int:
        """Pages on their way or brought so far; final after `wait`."""
        return sum(len(transfer.moves) for transfer in self._transfers)

    def cancel(self) -> None:
        """Take back what is still queued. Transfers that started, or that a request waits for by now, go on."""
        self._cancelled = True
        self._cancel_queued()

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the hint is carried out or given up; False on timeout."""
        return self._done.wait(timeout)

    async def run(self) -> None:
        """Carry it out. On the mover's loop."""
        residency = self._residency
        try:
            if not self._cancelled:
                with residency.lock:
                    rows = residency.table.find(self._keys).tolist()
                await residency.copying.lift(rows, Priority.PREFETCH, self._launched, self._within_s)
        finally:
            self._done.set()

    def _launched(self, transfers: list[Transfer]) -> None:
        self._transfers = transfers
        if self._cancelled:
            self._cancel_queued()

    def _cancel_queued(self) -> None:
        for transfer in self._transfers:
            self._residency.mover.cancel(transfer, only=Priority.PREFETCH)
