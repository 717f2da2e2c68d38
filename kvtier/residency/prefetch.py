"""One hint on its way: the cold pages of a prefix, brought up at low priority, given up without harm.

The budget (bytes prefetched and not yet used) is kept by `kvtier.residency.hinted`; a page counts until it is claimed, evicted or given up.
What finds no room is tried again when requests let go of pages, each page once. State: which pages are still wanted, under the cache's
lock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kvtier.errors import Closed
from kvtier.keys import PageKey
from kvtier.mover.transfer import Priority, Transfer
from kvtier.pages import DEVICE, READY, Rows

if TYPE_CHECKING:
    from kvtier.residency.copying import Shortfall
    from kvtier.residency.residency import Residency


class Prefetch:
    """A running hint. `cancel` and `wait` may be called from any thread."""

    def __init__(self, residency: Residency, keys: Sequence[PageKey], deadline: float | None) -> None:
        self._residency = residency
        self._keys = keys
        self._has_deadline = deadline is not None
        self._until_s = time.monotonic() + (deadline or 0.0)
        self._wanted = np.ones(len(keys), np.bool_)
        self._transfers: list[Transfer] = []
        self._over_budget = self._outranked = 0
        self._cancelled = False
        self._done = threading.Event()

    @classmethod
    def begin(cls, residency: Residency, keys: Sequence[PageKey], deadline: float | None) -> Prefetch:
        """See `TieredKVCache.prefetch`; what is on the device already counts as used. Takes the lock."""
        with residency.lock:
            table = residency.table
            rows = table.find(keys)
            residency.touch(rows[table.state[DEVICE][rows] == READY], DEVICE)
        hint = cls(residency, keys, deadline)
        residency.start(hint.run())
        return hint

    @property
    def pages(self) -> int:
        """Pages on their way or brought so far."""
        return sum(len(transfer.moves) for transfer in self._transfers)

    @property
    def is_over(self) -> bool:
        """Whether its deadline has passed."""
        return self._has_deadline and time.monotonic() >= self._until_s

    def cancel(self) -> None:
        """Take back what is still queued or waits for room. Transfers that started, or that a request waits for by now, go on."""
        self._cancelled = True
        with self._residency.lock:
            self._residency.hinted.give_up(self)
        self._cancel_queued()

    def wait(self, timeout: float | None = None) -> bool:
        """Block until what there was room for is there, or given up; False on timeout."""
        if self._residency.left_behind is not None:
            self._residency.left_behind.refuse()
        return self._done.wait(timeout)

    async def run(self) -> None:
        """Carry it out as far as there is room. On the mover's loop."""
        residency, left_s = self._residency, max(0.0, self._until_s - time.monotonic())
        timer = residency.mover.loop.call_later(left_s, self.cancel) if self._has_deadline else None
        try:
            if self._cancelled:
                return
            with residency.lock:
                rows = residency.table.find(self._keys)
                wanted = rows[self._wanted[: len(rows)]]
            short = await residency.copying.lift_ahead(wanted, self._launched, left_s)
            with residency.lock:
                self._note(rows, short)
                if len(short.rows) and not self._cancelled:
                    residency.hinted.wait_for_room(self, self._again)
        finally:
            if timer is not None:
                timer.cancel()  # it would keep the hint until then
            self._done.set()

    def _note(self, rows: Rows, short: Shortfall) -> None:
        """What is still wanted, and why it did not come at first; what came later is taken off these counts. Lock held."""
        self._wanted[:] = False
        self._wanted[: len(rows)] = np.isin(rows, short.rows)
        counts = self._residency.metrics.prefetch
        if not self._done.is_set():
            self._over_budget, self._outranked = short.over_budget, short.outranked
            counts.over_budget += short.over_budget
            counts.outranked += short.outranked
            return
        outranked = min(short.begun, self._outranked)
        over_budget = min(short.begun - outranked, self._over_budget)
        self._outranked, self._over_budget = self._outranked - outranked, self._over_budget - over_budget
        counts.outranked -= outranked
        counts.over_budget -= over_budget

    def _again(self) -> None:
        """Pages were let go of. Lock held."""
        if self.is_over:
            self._cancelled = True
            return
        try:
            self._residency.start(self.run())
        except Closed:
            self._cancelled = True

    def _launched(self, transfers: list[Transfer]) -> None:
        self._transfers += transfers
        if self._cancelled:
            self._cancel_queued()

    def _cancel_queued(self) -> None:
        for transfer in self._transfers:
            self._residency.mover.cancel(transfer, only=Priority.PREFETCH)
