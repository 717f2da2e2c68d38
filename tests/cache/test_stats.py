"""What `stats` says, and that asking disturbs nobody."""

from __future__ import annotations

import threading

import pytest
import torch

from kvtier.cache import TieredKVCache
from tests.cache.rig import (
    DEEP,
    HOST,
    LAYOUT,
    Gate,
    grow,
    hold,
    kv_of,
    make_cache,
    push_out,
    put,
    run,
    until,
)


def test_stats_has_the_keys_that_are_documented(tmp_path):
    with make_cache(tmp_path / "store") as cache:
        put(cache, run(1, 4))
        push_out(cache)
        hold(cache, run(1, 4)).release()
        stats = cache.stats()
        assert set(stats) >= {
            "layout",
            "policy",
            "tiers",
            "links",
            "prefetch",
            "lookups",
            "tokens_asked",
            "attention_ignored",
            "pages",
            "leased_pages",
        }
        assert set(stats["tiers"]) == {"device", "host", "disk"}
        for tier in stats["tiers"].values():
            wanted = {"format", "capacity_bytes", "bytes_used", "pressure", "pages", "pages_in", "pages_served", "hit_tokens"}
            assert set(tier) >= wanted | {"pages_recovered", "evicted", "refused", "achieved"}
            assert set(tier) >= {"capacity_slots", "used_slots", "leased_slots", "moving_slots"}
        for link in stats["links"].values():
            assert set(link) >= {"transfers", "pages", "bytes", "seconds", "gb_per_s", "queued_bytes"}
        assert stats["links"]["host->device"]["pages"] == 4
        assert stats["lookups"] == 1
        assert stats["tokens_asked"] == 16
        assert stats["tiers"]["host"]["hit_tokens"] == 16


def test_stats_does_not_hold_the_lock_while_it_asks_the_machine(pool, monkeypatch):
    with make_cache() as cache:
        host = cache._residency.tiers[HOST]
        asked, go_on = threading.Event(), threading.Event()
        report = host.report

        def slow_report():
            asked.set()
            assert go_on.wait(20)
            return report()

        monkeypatch.setattr(host, "report", slow_report)
        stats = pool.submit(cache.stats)
        assert asked.wait(10)
        assert pool.submit(put, cache, run(1, 2)).result(5) == 8
        go_on.set()
        stats.result(20)


def slots(cache: TieredKVCache, *which: str) -> dict[str, tuple[int, ...]]:
    """Per tier, how many slots of each of these kinds there are."""
    return {name: tuple(tier[f"{kind}_slots"] for kind in which) for name, tier in cache.stats(machine=False)["tiers"].items()}


def test_tiers_say_how_full_they_are(tmp_path):
    with make_cache(tmp_path / "store", host_pages=6) as cache:
        assert slots(cache, "capacity", "used") == {"device": (8, 0), "host": (6, 0), "disk": (64, 0)}
        put(cache, run(1, 4))
        assert slots(cache, "used") == {"device": (4,), "host": (0,), "disk": (0,)}
        push_out(cache)
        assert slots(cache, "used", "moving") == {"device": (8, 0), "host": (4, 0), "disk": (0, 0)}
        push_out(cache, 700)
        kept = cache.stats()["tiers"]
        assert [kept[name]["used_slots"] for name in kept] == [kept[name]["pages"] for name in kept]
        assert kept["device"]["used_slots"] == 8
        assert kept["host"]["used_slots"] == 6
        assert kept["disk"]["used_slots"] >= 4 + 8 - 6
        assert kept["device"]["bytes_used"] == kept["device"]["capacity_bytes"] == 8 * LAYOUT.page_bytes
        assert kept["host"]["bytes_used"] == kept["host"]["capacity_bytes"]
        assert 0 < kept["disk"]["bytes_used"] < kept["disk"]["capacity_bytes"]
        cache.clear()
        assert slots(cache, "used") == {"device": (0,), "host": (0,), "disk": (0,)}


def test_copies_on_disk_are_counted_again_after_a_restart(tmp_path):
    with make_cache(tmp_path / "store", layout=DEEP) as cache:
        cache.put(run(1, 5), torch.zeros_like(kv_of(run(1, 5), layout=DEEP)))  # which takes far less than five slots' bytes
    with make_cache(tmp_path / "store", layout=DEEP) as cache:
        assert slots(cache, "used")["disk"] == (5,)
        cache.check_integrity()


def test_leased_copies_are_counted_where_the_lease_keeps_them():
    with make_cache(device_pages=8) as cache:
        put(cache, run(1, 4))
        with hold(cache, run(1, 4)) as first, hold(cache, run(1, 2)):
            assert slots(cache, "leased") == {"device": (4,), "host": (0,)}
            grow(cache, first, [7, 8])
            assert slots(cache, "leased", "used") == {"device": (5, 5), "host": (0, 0)}, "a page that is open is held, too"
        assert slots(cache, "leased", "used") == {"device": (0, 4), "host": (0, 0)}
        push_out(cache)
        kept = cache._reader.hold(cache.lookup(run(1, 4)))
        assert slots(cache, "leased") == {"device": (0,), "host": (4,)}, "nobody brings them up"
        kept.release()
        assert slots(cache, "leased") == {"device": (0,), "host": (0,)}


def test_what_moves_and_what_waits_for_it_are_told(monkeypatch):
    with make_cache(host__write_policy="write_through", mover__workers=1) as cache:
        put(cache, run(1, 4))
        put(cache, run(2, 2))
        push_out(cache)
        gate = Gate(monkeypatch, cache._residency.tiers[HOST], "load")
        first = cache.acquire(cache.lookup(run(1, 4)))
        assert gate.reached.wait(20)
        assert slots(cache, "moving", "leased") == {"device": (4, 4), "host": (4, 4)}
        link = cache.stats()["links"]["host->device"]
        assert (link["transfers"], link["queued_bytes"]) == (0, 0), "the first one is under way"
        second = cache.acquire(cache.lookup(run(2, 2)))
        until(lambda: cache.stats()["links"]["host->device"]["queued_bytes"])
        assert cache.stats()["links"]["host->device"]["queued_bytes"] == 2 * LAYOUT.page_bytes
        assert slots(cache, "moving") == {"device": (6,), "host": (6,)}
        gate.open()
        for lease in (first, second):
            lease.wait(20)
            lease.release()
        cache.settle(20)
        assert slots(cache, "moving", "leased") == {"device": (0, 0), "host": (0, 0)}
        assert cache.stats()["links"]["host->device"]["queued_bytes"] == 0


def test_without_the_machine_nothing_is_asked_of_it(monkeypatch):
    with make_cache() as cache:
        monkeypatch.setattr(cache._residency.tiers[HOST], "report", lambda: pytest.fail("asked"))
        assert cache.stats(machine=False)["tiers"]["host"]["achieved"] == {}
