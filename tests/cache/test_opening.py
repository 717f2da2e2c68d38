"""What an open cache needs to be told, and what it says when that is missing, or when nobody closes it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvtier.cache import TieredKVCache
from kvtier.errors import ConfigError, LayoutError, LeaseError
from tests.cache.rig import LAYOUT, PAGE, hold, make_cache, put, run

ENDS_OPEN = """
import sys
from pathlib import Path
from tests.cache.rig import make_cache, put, run
through = {"host__write_policy": "write_through", "disk__write_policy": "write_through"}
cache = make_cache(Path(sys.argv[1]), **(through if "through" in sys.argv else {}))
put(cache, run(1, 5))
cache.settle(20)
if "closed" in sys.argv:
    cache.close()
if "forked" in sys.argv or "dropped" in sys.argv:
    import os
    if "dropped" in sys.argv:  # what is behind it lives on
        del cache
    if os.fork():
        os.wait()
        if "forked" in sys.argv:
            cache.close()
"""


@pytest.mark.parametrize(("how", "lost"), [("open", True), ("closed", False), ("through", False), ("forked", False), ("dropped", True)])
def test_a_process_that_ends_with_an_open_cache_says_what_is_lost(tmp_path, how, lost):
    done = subprocess.run([sys.executable, "-c", ENDS_OPEN, str(tmp_path / "store"), how], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = f"the process ends with an open cache: 5 pages that are not in its store {tmp_path / 'store'} yet are lost"
    assert done.stderr.count(told) == done.stderr.count("lost") == int(lost)


def test_pages_of_another_size_than_the_configuration_says_are_refused():
    with pytest.raises(ConfigError, match=r"pages\.page_tokens is 64, but the layout has pages of 4 tokens"):
        make_cache(pages__page_tokens=64)
    make_cache(pages__page_tokens=PAGE).close()
    make_cache().close()


def test_a_disk_without_room_is_found_before_memory_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr("kvtier.residency.opening.open_pool", lambda *_: pytest.fail("memory was taken"))
    with pytest.raises(ConfigError, match=r"disk\.capacity_bytes is .*; lower it, or free"):
        make_cache(tmp_path / "store", disk__capacity_bytes="4000000TiB")
    assert list(tmp_path.iterdir()) == []


def test_a_store_for_models_without_a_name_is_warned_about(tmp_path, caplog):
    make_cache(tmp_path / "store").close()
    assert f"disk store {tmp_path / 'store'}: model.name is not set" in caplog.text
    caplog.clear()
    make_cache(tmp_path / "other", model__name="some").close()
    make_cache().close()
    assert "model.name" not in caplog.text


def test_what_is_no_layout_no_tenant_and_no_time_is_one_clear_error():
    with pytest.raises(LayoutError, match="layout is a tuple; expected a kvtier.PageLayout"):
        TieredKVCache.open(None, (2, 2, 16, 2, 64))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="overrides are a list"):
        TieredKVCache.open(None, LAYOUT, ["host=null"])  # type: ignore[arg-type]
    with make_cache() as cache:
        put(cache, run(1, 2))
        for salt in (None, b"north", 7):
            with pytest.raises(LayoutError, match="salt is a .*; expected the tenant's name as a string"):
                cache.lookup(run(1, 2), salt)  # type: ignore[arg-type]
        for time in (-5, float("nan")):
            with pytest.raises(LeaseError, match="ttl is .* expected 0 or more"):
                cache.pin(cache.lookup(run(1, 2)), ttl=time)
            with pytest.raises(LeaseError, match="deadline is .* expected 0 or more"):
                cache.prefetch(run(1, 2), deadline=time)


def test_a_lease_that_is_dropped_without_a_release_is_warned_about_and_none_tells_tokens():
    with make_cache() as cache:
        put(cache, run(7, 2))
        match, lease = cache.lookup(run(7, 2)), hold(cache, run(7, 2))
        assert repr(match) == "Match(8 tokens, pages {'device': 2, 'host': 0})"
        assert repr(lease) == "Lease(8 tokens, 2 pages, ready)"
        with pytest.warns(ResourceWarning, match=r"Lease\(8 tokens, 2 pages, ready\) was never released"):
            del lease  # CPython ends it here
        kept = hold(cache, run(7, 2))
        kept.release()
        assert repr(kept) == "Lease(8 tokens, 2 pages, released)"
