"""Laws checked of what the connector tells vLLM: counts add up, over workers and over time; readings over workers only."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kvtier.engines.vllm.metrics import Counts, PrometheusMetrics


def reading(used, queued=0):
    sizes = {"capacity_bytes": 4096, "capacity_slots": 4, "leased_slots": 1, "moving_slots": 0}
    return {
        "tiers": {"host": sizes | {"bytes_used": used * 1024, "used_slots": used}},
        "links": {"host->device": {"queued_bytes": queued}},
    }


def step(*used, stored=0):
    """What vLLM hears of one step: all workers' counts together."""
    together = Counts()
    for rank, each in enumerate(used):
        counts = Counts()
        counts.add("stored_pages", stored)
        counts.read(rank, reading(each))
        together = together.aggregate(counts)
    return together


def test_the_log_has_counts_of_the_interval_and_the_last_reading():
    interval = step(1, 0, stored=2).aggregate(step(4, 2, stored=1)).aggregate(Counts({"waits": {"": 3}}))
    assert interval.reduce() == {"stored_pages": 6, "waits": 3, "tier_used_share host": 6 / 8}
    assert not interval.is_empty()


def test_metrics_have_all_workers_added_up_and_the_last_reading():
    registry = CollectorRegistry()
    kinds = {kind: partial(kind, registry=registry) for kind in (Gauge, Counter, Histogram)}
    metrics = PrometheusMetrics(SimpleNamespace(kv_transfer_config=None), kinds, ["model_name", "engine"], {0: ["m", "0"], 1: ["m", "1"]})
    for engine, told in ((0, step(1, 0, stored=2)), (0, step(4, 2, stored=1)), (0, Counts({"evicted_pages": {"host": 5}})), (1, step(3))):
        metrics.observe(told.to_dict(), engine)

    def value(name, engine="0", **labels):
        return registry.get_sample_value(f"vllm:kvtier_{name}", {"model_name": "m", "engine": engine, **labels})

    assert value("stored_pages_total") == 6
    assert value("evicted_pages_total", tier="host") == 5
    assert value("tier_used_slots", tier="host") == 6
    assert value("tier_used_bytes", tier="host") == 6 * 1024
    assert value("tier_capacity_bytes", tier="host") == 2 * 4096
    assert value("tier_leased_slots", tier="host") == 2
    assert value("link_queued_bytes", link="host->device") == 0
    assert value("tier_used_slots", "1", tier="host") == 3
