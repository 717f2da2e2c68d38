"""Adaptive replacement: a list of pages used once, one of pages used again, and a border between them that moves towards the list whose
ghosts come back.

Source: Megiddo, Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003. Two details differ: victims are chosen before
it is known which page comes (so the source's tie rule for a page of B2 falls away, and the border moves after the eviction), and the
tier's size is what was here when room was last needed.

For traffic that swings between scans and reuse; never far below LRU in small tiers. Not for tiers that hold a fifth or more of the
distinct pages: what was used twice crowds out what will be.
"""

from __future__ import annotations

from kvtier.policy.ghosts import Ghosts
from kvtier.policy.queued import QueuedPolicy
from kvtier.policy.queues import NOBODY

ONCE, AGAIN = 0, 1
"""T1 and T2 of the source; their ghosts are B1 and B2."""


class ARC(QueuedPolicy):
    """No page has a score of its own but its list and last use; `score` is the last use, in seconds.

    Remembers at most as many ghosts as the tier holds pages.
    """

    name = "arc"
    queues = 2

    def __init__(self) -> None:
        super().__init__()
        self.target = 0.0
        """Pages that `ONCE` should hold: p of the source."""
        self._ghosts: tuple[Ghosts[bool], Ghosts[bool]] = (Ghosts(1), Ghosts(1))

    def entered(self, pages: list[int]) -> None:
        once, again = self._ghosts
        for page in pages:
            name = self.called[page]
            self.worth[page] = self.latest
            if name in once:
                self.target = min(self.full, self.target + max(1.0, len(again) / len(once)))
                once.recall(name)
            elif name in again:
                self.target = max(0.0, self.target - max(1.0, len(once) / len(again)))
                again.recall(name)
            else:
                continue
            self.move(page, AGAIN, self.latest, self.latest)

    def used(self, pages: list[int]) -> None:
        for page in pages:
            if self.queue[page] == ONCE:
                self.move(page, AGAIN, self.latest, self.latest)
            else:
                self.worth[page] = self.time[page] = self.latest

    def candidate(self) -> int:
        once, again = self.head(ONCE), self.head(AGAIN)
        if once == NOBODY or (again != NOBODY and self.sizes[ONCE] <= self.target):
            return again
        return once

    def left(self, pages: list[int], evicted: bool) -> None:
        if not evicted:
            return
        for queue in (ONCE, AGAIN):
            self._ghosts[queue].leave([(self.called[page], True) for page in pages if self.queue[page] == queue], len(self))
        once, again = self._ghosts
        once.shrink(max(0, len(self) - self.sizes[ONCE]))
        again.shrink(max(0, len(self) - len(once)))
