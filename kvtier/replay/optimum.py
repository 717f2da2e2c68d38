"""The ceiling: what a tier would find that knows the future and may decline a page (Belady 1966, MIN with bypass).

Not an `EvictionPolicy`: no live cache can run it. After each request the tier keeps the pages that are wanted again soonest, of all it
held and all the request brought; of pages wanted at the same time the deepest goes first, so what is kept is always whole prefixes.

Pages wanted next by the same request are a prefix of it, so a tier's content is one number per future request: how many pages are kept
for it. Letting the least useful pages go is lowering the numbers of the requests furthest away; that number is what the request will
find. So the work grows with the requests, not with the pages.
"""

from __future__ import annotations

from heapq import heappop, heappush

import numpy as np

from kvtier.replay.trace import Column, Trace

OPTIMUM = "optimum"
"""What the ceiling is called where policies are named."""


class Future:
    """When each page is wanted again, for all requests of a trace. Made once, used for every capacity."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        requests = np.repeat(np.arange(trace.requests), trace.lengths)
        order = np.argsort(trace.pages, kind="stable")
        again = trace.pages[order[1:]] == trace.pages[order[:-1]]
        current, following = order[:-1][again], order[1:][again]
        # Pages of one request that are wanted by one later request: (request, later request) -> how many.
        pairs, counts = np.unique(requests[current] * trace.requests + requests[following], return_counts=True)
        self._now, self._later = np.divmod(pairs, trace.requests)
        self._counts = counts

    def hit_pages(self, capacity: int) -> Column:
        """Pages that each request finds in a tier of `capacity` pages, `[requests]`."""
        kept = [0] * self.trace.requests
        found = np.zeros(self.trace.requests, np.int64)
        used = 0
        furthest: list[int] = []
        bounds = np.searchsorted(self._now, np.arange(self.trace.requests + 1)).tolist()
        laters, counts = self._later.tolist(), self._counts.tolist()
        for request in range(self.trace.requests):
            found[request] = kept[request]
            used -= kept[request]
            for entry in range(bounds[request], bounds[request + 1]):
                later = laters[entry]
                if not kept[later]:
                    heappush(furthest, -later)
                kept[later] += counts[entry]
                used += counts[entry]
            while used > capacity:
                later = -furthest[0]
                dropped = min(kept[later], used - capacity)
                kept[later] -= dropped
                used -= dropped
                if not kept[later]:
                    heappop(furthest)
        return found
