"""Segmented LRU: pages come on probation and are protected from their first use; four fifths of the tier are for protected pages.

Source: Karedla, Love, Wherry, "Caching strategies to improve disk system performance", IEEE Computer 27(3), 1994.

For scans over a small working set that is used again at once. Not for prefix caches of a few per cent of the distinct pages: what was
used twice and is dead stays until newer twice-used pages drive it out, and on the Mooncake conversation trace that loses to LRU.
"""

from __future__ import annotations

from collections import OrderedDict

from kvtier.policy.queued import QueuedPolicy
from kvtier.policy.queues import NOBODY

PROBATION, PROTECTED = 0, 1
PROTECTED_SHARE = 0.8
"""Of the tier; the usual choice. The source varies it."""


class SLRU(QueuedPolicy):
    """The score is the segment (0 probation, 1 protected). Ties: the least recently used, then deeper first."""

    name = "slru"
    queues = 2

    def __init__(self) -> None:
        super().__init__()
        self._protected: OrderedDict[int, None] = OrderedDict()
        """Least recently used first, inner pages included: also those leave the segment when it is full."""

    def entered(self, pages: list[int]) -> None:
        return

    def used(self, pages: list[int]) -> None:
        for page in reversed(pages):
            if self.queue[page] == PROBATION:
                self.move(page, PROTECTED, PROTECTED, self.latest)
            else:
                del self._protected[page]
                self.time[page] = self.latest
            self._protected[page] = None
        while self.sizes[PROTECTED] > PROTECTED_SHARE * self.full:
            oldest, _ = self._protected.popitem(last=False)
            self.move(oldest, PROBATION, PROBATION, self.latest)

    def candidate(self) -> int:
        page = self.head(PROBATION)
        return page if page != NOBODY else self.head(PROTECTED)

    def left(self, pages: list[int], evicted: bool) -> None:
        for page in pages:
            self._protected.pop(page, None)
