"""Which pages hints brought up, or are bringing, that nobody used yet: what counts against the prefetch budget.

State: a count, and a column of the page table that says from which tier each page came. Both under the lock of `kvtier.residency`.
"""

from __future__ import annotations

from collections.abc import Callable

from kvtier.pages import NO_TIER, PageTable, Rows


class Hinted:
    """At most `budget()` pages at a time. Lock held for every call."""

    def __init__(self, table: PageTable, budget: Callable[[], int]) -> None:
        self._table = table
        self._budget = budget
        self._count = 0

    def __bool__(self) -> bool:
        """Whether there are any."""
        return self._count > 0

    @property
    def room(self) -> int:
        """Pages that may still be brought up before those already brought are used."""
        return max(0, self._budget() - self._count)

    def mark(self, rows: Rows, source: int) -> None:
        """These pages are being brought up from tier `source` on a hint."""
        self._table.prefetched_from[rows] = source
        self._count += len(rows)

    def unmark(self, rows: Rows) -> int:
        """These pages are claimed, gone or failed: they no longer count; how many did."""
        if not self._count:
            return 0
        marked = rows[self._table.prefetched_from[rows] != NO_TIER]
        self._table.prefetched_from[marked] = NO_TIER
        self._count -= len(marked)
        return len(marked)
