"""Laws checked: what Prometheus scrapes of a cache is what `stats` says, in its conventions, as the page on operations shows it."""

from __future__ import annotations

import importlib
import re
import sys
import urllib.request
from pathlib import Path

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from kvtier.errors import MissingExtra
from kvtier.prometheus import CacheCollector
from kvtier.series import COUNTERS, GAUGES
from tests.cache.rig import LAYOUT, hold, make_cache, push_out, put, run

PAGE = Path(__file__).parents[1] / "docs" / "operations.md"


def registry_of(caches) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(CacheCollector(caches))
    return registry


def scraped(text: str) -> dict[str, float]:
    """The value of each sample, named as Prometheus writes it."""
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sample.labels.items())
            assert f"{sample.name}{{{labels}}}" not in samples
            samples[f"{sample.name}{{{labels}}}"] = sample.value
    return samples


def scrape(registry: CollectorRegistry) -> dict[str, float]:
    return scraped(generate_latest(registry).decode())


@pytest.fixture
def used(tmp_path):
    """A cache whose pages were put, evicted, restored, and are held."""
    with make_cache(tmp_path / "store") as cache:
        put(cache, run(1, 4))
        push_out(cache)
        with hold(cache, run(1, 4)):
            cache.settle(20)
            yield cache


def test_what_is_scraped_is_what_happened(used):
    found = scrape(registry_of(used))
    page = LAYOUT.page_bytes
    expected = {
        "kvtier_tier_capacity_bytes{tier=device}": 8 * page,
        "kvtier_tier_used_bytes{tier=device}": 8 * page,
        "kvtier_tier_capacity_slots{tier=device}": 8,
        "kvtier_tier_used_slots{tier=device}": 8,
        "kvtier_tier_leased_slots{tier=device}": 4,
        "kvtier_tier_moving_slots{tier=device}": 0,
        "kvtier_tier_used_slots{tier=host}": 8,
        "kvtier_tier_used_bytes{tier=host}": 8 * page,
        "kvtier_tier_leased_slots{tier=host}": 0,
        "kvtier_tier_used_slots{tier=disk}": 0,
        "kvtier_link_queued_bytes{link=host->device}": 0,
        "kvtier_hit_tokens_total{tier=host}": 16,
        "kvtier_served_pages_total{tier=host}": 4,
        "kvtier_arrived_pages_total{tier=host}": 8,
        "kvtier_evicted_pages_total{tier=device,why=room needed}": 8,
        "kvtier_link_pages_total{link=host->device}": 4,
        "kvtier_link_bytes_total{link=host->device}": 4 * page,
        "kvtier_hit_requests_total{}": 1,
        "kvtier_declined_tokens_total{}": 0,
        "kvtier_prefetch_pages_total{outcome=issued}": 0,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert found["kvtier_link_seconds_total{link=host->device}"] > 0


def test_every_series_is_there_with_its_kind_and_meaning(used):
    families = {family.name: family for family in text_string_to_metric_families(generate_latest(registry_of(used)).decode())}
    assert set(families) == {f"kvtier_{series.name}" for series in (*GAUGES, *COUNTERS)}
    for kind, table in (("gauge", GAUGES), ("counter", COUNTERS)):
        for series in table:
            family = families[f"kvtier_{series.name}"]
            assert (family.type, family.documentation) == (kind, series.text)
            assert all(tuple(sample.labels) == series.labels for sample in family.samples)


def test_a_scrape_asks_nothing_of_the_machine(used, monkeypatch):
    for tier in used._residency.tiers:
        monkeypatch.setattr(tier, "report", lambda: pytest.fail("asked"))
    assert scrape(registry_of(used))


def test_several_caches_are_told_apart(used):
    with make_cache() as other:
        found = scrape(registry_of({"first": used, "second": other}))
    assert found["kvtier_tier_used_slots{cache=first,tier=device}"] == 8
    assert found["kvtier_tier_used_slots{cache=second,tier=device}"] == 0
    assert found["kvtier_hit_requests_total{cache=first}"] == 1


def test_a_registry_takes_one_collector(used):
    registry = registry_of(used)
    with pytest.raises(ValueError, match="kvtier_tier_used_bytes"):
        registry.register(CacheCollector(used))


def test_a_closed_cache_says_nothing_and_disturbs_nobody():
    with make_cache() as closed, make_cache() as other:
        registry = registry_of({"closed": closed, "open": other})
        closed.close()
        found = scrape(registry)
    assert "kvtier_tier_used_slots{cache=open,tier=host}" in found
    assert not [name for name in found if "cache=closed" in name]


def test_without_the_package_the_extra_is_named(monkeypatch):
    for module in [name for name in sys.modules if name.split(".")[0] == "prometheus_client"]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "kvtier.prometheus")
    with pytest.raises(MissingExtra, match=r"needs prometheus_client; pip install 'kvtier\[metrics\]'"):
        importlib.import_module("kvtier.prometheus")


def test_the_page_on_operations_serves_it(used, monkeypatch):
    block = next(block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "CacheCollector" in block)
    registry, start, servers = CollectorRegistry(), prometheus_client.start_http_server, []
    monkeypatch.setattr(prometheus_client, "REGISTRY", registry)
    monkeypatch.setattr(prometheus_client, "start_http_server", lambda port: servers.append(start(0, "127.0.0.1", registry)))
    exec(block, {"cache": used})
    [(server, thread)] = servers
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=20) as answer:
            assert scraped(answer.read().decode()) == pytest.approx(scrape(registry))
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
