"""What `stats` says, and that asking disturbs nobody."""

from __future__ import annotations

import threading

from tests.cache.rig import (
    HOST,
    hold,
    make_cache,
    push_out,
    put,
    run,
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
        for link in stats["links"].values():
            assert set(link) >= {"transfers", "pages", "bytes", "seconds", "gb_per_s"}
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
