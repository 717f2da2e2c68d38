"""What the leases of one cache that attend in place share: the router, what both ways took so far, and the threads of the memory nodes.

Made with the cache; threads start with the first lease. What was learned belongs to the residency's lock, the threads to `_starting`.
"""

from __future__ import annotations

import threading

from kvtier.attention.in_place import make_pool
from kvtier.attention.learned import LearnedCosts
from kvtier.attention.router import Router
from kvtier.errors import LeaseError
from kvtier.leases.in_place import InPlaceLease
from kvtier.leases.lease import Match
from kvtier.leases.reading import Reader
from kvtier.numa.executor import NumaThreadPool
from kvtier.residency import Residency


class Routing:
    """Makes `InPlaceLease`s as `routing` in the configuration says."""

    def __init__(self, residency: Residency, reader: Reader) -> None:
        self._residency = residency
        self._reader = reader
        self._costs = LearnedCosts()
        self._starting = threading.Lock()
        self._pool: NumaThreadPool | None = None
        routing = residency.config.routing
        self._threads_per_node = routing.threads_per_node
        self._router = Router(
            {each.name: each.fetch_above for each in routing.workloads},
            routing.mode,
            routing.attention_weight,
            routing.utilisation_weight,
            routing.queue_weight,
            routing.measured_weight,
        )

    def acquire(self, match: Match, workload: str, device_utilisation: float | None) -> InPlaceLease:
        """See `TieredKVCache.acquire_in_place`."""
        if device_utilisation is not None and not 0 <= device_utilisation <= 1:
            raise LeaseError(f"acquire_in_place: device_utilisation is {device_utilisation}; expected a share from 0 to 1")
        with self._starting:
            if self._pool is None:
                self._pool = make_pool(self._threads_per_node)
        return InPlaceLease(self._residency, self._reader.hold(match), self._pool, self._router, self._costs, workload, device_utilisation)

    def report(self) -> dict[str, object]:
        """What both ways took, and what the threads did, for `TieredKVCache.stats`."""
        return {"learned": self._costs.as_json(), "threads": None if self._pool is None else self._pool.executor.report()}

    def close(self) -> None:
        """Stop the threads, if any were started."""
        if self._pool is not None:
            self._pool.close()
