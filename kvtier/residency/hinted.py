"""What hints brought up, or are bringing, and nobody used yet: it counts against the prefetch budget. And the hints that wait for room.

State: a count, a column of the page table that says from which tier each page came, and the waiting hints. All under the lock of
`kvtier.residency`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from kvtier.pages import NO_TIER, PageTable, Rows

MOST_WAITING = 8
"""Hints that wait for room at a time; the oldest is given up for a new one. Each looks again whenever a request ends."""


class Waiting(Protocol):
    """A hint that waits for room."""

    @property
    def is_over(self) -> bool:
        """Whether it is too late for its pages."""


class Hinted:
    """At most `budget()` pages at a time. Lock held for every call."""

    def __init__(self, table: PageTable, budget: Callable[[], int]) -> None:
        self._table = table
        self._budget = budget
        self.count = 0
        """How many there are."""
        self.waiting: dict[Waiting, Callable[[], None]] = {}
        """Whom `room_came` calls."""

    @property
    def room(self) -> int:
        """Pages that may still be brought up before those already brought are used."""
        return max(0, self._budget() - self.count)

    def mark(self, rows: Rows, source: int) -> None:
        """These pages are being brought up from tier `source` on a hint."""
        self._table.prefetched_from[rows] = source
        self.count += len(rows)

    def unmark(self, rows: Rows) -> int:
        """These pages are claimed, gone or failed: they no longer count; how many did."""
        if not self.count:
            return 0
        marked = rows[self._table.prefetched_from[rows] != NO_TIER]
        self._table.prefetched_from[marked] = NO_TIER
        self.count -= len(marked)
        return len(marked)

    def wait_for_room(self, hint: Waiting, again: Callable[[], None]) -> None:
        """Call `again` once, when pages were let go of, unless `hint` gives up before, or its time is over."""
        for other in [other for other in self.waiting if other.is_over]:
            del self.waiting[other]
        self.waiting[hint] = again
        if len(self.waiting) > MOST_WAITING:
            del self.waiting[next(iter(self.waiting))]

    def give_up(self, hint: Waiting) -> None:
        """`hint` does not wait any more."""
        self.waiting.pop(hint, None)

    def room_came(self) -> None:
        """A request let go of its pages: whoever waits looks again, the oldest hint first."""
        waiting, self.waiting = self.waiting, {}
        for again in waiting.values():
            again()
