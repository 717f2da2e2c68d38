"""First in, first out, leaves first: what a plain ring buffer of pages does. Folklore; the base line under all others.

Use it where uses cannot be reported. Not where a page's uses say something: here they count for nothing. (With leaves first it is
close to LRU on prefix caches all the same, since most uses of a prefix hang younger pages below it, and those hold it.)
"""

from __future__ import annotations

from kvtier.policy.queued import QueuedPolicy


class FIFO(QueuedPolicy):
    """The score is the time of arrival, in seconds. Ties: deeper first."""

    name = "fifo"

    def entered(self, pages: list[int]) -> None:
        for page in pages:
            self.worth[page] = self.latest

    def used(self, pages: list[int]) -> None:
        return
