"""Metrics of a cache for Prometheus, in the user's own registry, through the package `prometheus_client` (`pip install 'kvtier[metrics]'`).

    from prometheus_client import REGISTRY, start_http_server

    REGISTRY.register(CacheCollector(cache))
    start_http_server(9400)

In vLLM the connector puts them into vLLM's own `/metrics`. What there is: `kvtier.series`, docs/operations.md. State: none beside the
caches; nothing is counted here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from kvtier.cache import TieredKVCache
from kvtier.errors import Closed, needing
from kvtier.series import COUNTERS, GAUGES

with needing("metrics", "exporting metrics to Prometheus", "prometheus_client"):
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric


class CacheCollector:
    """The metrics of one cache, or of several by name, which is then their label `cache`; for the `register` of a registry.

    One collector a registry: names may be there once. Every scrape asks `TieredKVCache.stats`, in the thread that scrapes. A cache that is
    closed has no samples any more.
    """

    def __init__(self, caches: TieredKVCache | Mapping[str, TieredKVCache]) -> None:
        self._labels = ("cache",) if isinstance(caches, Mapping) else ()
        self._caches = {(name,): cache for name, cache in caches.items()} if isinstance(caches, Mapping) else {(): caches}

    def describe(self) -> list[Metric]:
        """The metrics without samples: what a registry looks at to see that names are there once."""
        return self._families({})

    def collect(self) -> list[Metric]:
        """The metrics as they are now."""
        answers: dict[tuple[str, ...], dict[str, Any]] = {}
        for labels, cache in self._caches.items():
            with contextlib.suppress(Closed):  # others of the registry still have something to say
                answers[labels] = cache.stats(machine=False)
        return self._families(answers)

    def _families(self, answers: Mapping[tuple[str, ...], Mapping[str, Any]]) -> list[Metric]:
        families: list[Metric] = []
        for kind, table in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for series in table:
                family = kind(f"kvtier_{series.name}", series.text, labels=[*self._labels, *series.labels])
                for labels, stats in answers.items():
                    for more, number in series.samples(stats):
                        family.add_metric([*labels, *more], number)
                families.append(family)
        return families
