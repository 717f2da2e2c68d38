"""S3-FIFO: three queues. New pages pass through a small one; those used there go on to the main one, the others leave, and are let
straight into the main queue when they come back soon.

Source: Yang, Zhang, Qiu, Yue, Rashmi, "FIFO queues are all you need for cache eviction", SOSP 2023: small queue a tenth of the tier,
two uses to get on, counts up to 3, a ghost queue as long as the tier. A page with children whose turn it is cannot leave; it goes on.

For small tiers before one-shot traffic. Not for tiers that hold a tenth or more of the distinct pages: a new conversation is gone from
the small queue before its next turn.
"""

from __future__ import annotations

from collections import OrderedDict

from kvtier.policy.ghosts import Ghosts
from kvtier.policy.queued import QueuedPolicy
from kvtier.policy.queues import NOBODY

SMALL, MAIN = 0, 1
SMALL_SHARE = 0.1
"""Of the tier."""
MOST_USES = 3
USES_TO_GET_ON = 2


class S3FIFO(QueuedPolicy):
    """No page has a score of its own but its queue and place; `score` is when it got its place, in seconds.

    Remembers one ghost for every page it holds.
    """

    name = "s3-fifo"
    queues = 2

    def __init__(self) -> None:
        super().__init__()
        self._uses: list[int] = self.column(0)
        self._small: OrderedDict[int, None] = OrderedDict()
        """The small queue, inner pages included; the tail of a request comes before its head."""
        self._ghosts: Ghosts[bool] = Ghosts(1)

    def entered(self, pages: list[int]) -> None:
        for page in reversed(pages):
            self._uses[page] = 0
            self.worth[page] = self.latest
            if self._ghosts.recall(self.called[page]):
                self.move(page, MAIN, self.latest, self.latest)
            else:
                self._small[page] = None

    def used(self, pages: list[int]) -> None:
        for page in pages:
            self._uses[page] = min(MOST_USES, self._uses[page] + 1)

    def candidate(self) -> int:
        while True:
            small, main = self.head(SMALL), self.head(MAIN)
            page = main
            if small != NOBODY and (main == NOBODY or self.sizes[SMALL] >= SMALL_SHARE * len(self)):
                page = small
            uses = self._uses[page] if page != NOBODY else 0
            if page == small and uses >= USES_TO_GET_ON:
                self.change(self._uses, page, 0)
            elif page == main and uses > 0:
                self.change(self._uses, page, uses - 1)
            else:
                return page
            self.move(page, MAIN, self.latest, self.latest)

    def left(self, pages: list[int], evicted: bool) -> None:
        for page in pages:
            self._small.pop(page, None)
        small = [page for page in pages if self.queue[page] == SMALL]
        if evicted and small:
            self._ghosts.leave([(self.called[page], True) for page in small], len(self))
            self._get_on(max(self.time[page] for page in small))

    def _get_on(self, time: float) -> None:
        """Pages older than `time` had their turn in the small queue. Those that are still in it have children: they go on, as used."""
        while self._small:
            page = next(iter(self._small))
            if self.queue[page] == SMALL:
                if self.time[page] >= time:
                    return
                self._uses[page] = 0
                self.move(page, MAIN, self.latest, self.latest)
            del self._small[page]
