"""What goes wrong around a cache: full and failing disks, killed processes, flipped bits, impossible configurations."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtier.cache import TieredKVCache
from kvtier.config import load_config
from kvtier.errors import ConfigError, KVTierError, StoreError
from kvtier.pages import READY
from tests.cache.rig import (
    DEVICE,
    DISK,
    HOST,
    LAYOUT,
    PAGE,
    assert_right,
    flip_in_host,
    flip_on_disk,
    hold,
    kvtier_threads,
    make_cache,
    make_config,
    push_out,
    put,
    run,
    tiers_of,
)
from tests.tiers.faults import FaultyEngine


def with_faults(cache) -> FaultyEngine:
    """Replace the engine of the disk tier, whose files stay open."""
    engine = FaultyEngine()
    cache._residency.tiers[-1]._segments.engine = engine
    return engine


def refused(cache, tier):
    return cache.stats()["tiers"][tier]["refused"]


def evicted(cache, tier):
    return cache.stats()["tiers"][tier]["evicted"]


def nothing_left_open(store: Path) -> None:
    assert kvtier_threads() == []
    open_files = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]
    assert not [name for name in open_files if name.startswith(str(store))]


# The disk fails


@pytest.mark.parametrize(("code", "reason"), [(errno.ENOSPC, "disk full"), (errno.EIO, f"io: {os.strerror(errno.EIO)}")])
def test_a_disk_that_takes_no_more_costs_its_pages_and_nothing_else(tmp_path, code, reason):
    with make_cache(tmp_path / "store", host_pages=4) as cache:
        put(cache, run(1, 4))
        push_out(cache)
        engine = with_faults(cache)
        engine.write_errno = code
        engine.write_budget = 0
        for start in range(20, 26):
            assert put(cache, run(start, 8)) == 32, "the engine gets its room all the same"
            cache.settle(20)
            cache.check_integrity()
            with hold(cache, run(start, 8)) as lease:
                assert lease.tokens == 32
                assert_right(lease, run(start, 8))
        assert refused(cache, "disk")[reason] > 0
        assert evicted(cache, "host")["no room below"] > 0
        engine.write_budget = None
        if code == errno.ENOSPC:
            cache._residency.tiers[DISK]._book._lowered_at_s = time.monotonic() - 60  # type: ignore[attr-defined]
        put(cache, run(40, 8))
        push_out(cache)
        push_out(cache, 700)
        assert all(DISK in tiers for tiers in tiers_of(cache, run(40, 8))), "there is room again"
        cache.check_integrity()


def test_a_disk_that_fails_under_write_through_leaves_the_warm_copies_alone(tmp_path):
    with make_cache(tmp_path / "store", host_pages=None, disk__write_policy="write_through") as cache:
        with_faults(cache).write_budget = 0
        put(cache, run(1, 4))
        cache.settle(20)
        cache.flush()
        assert tiers_of(cache, run(1, 4)) == [{DEVICE}] * 4
        cache.check_integrity()


def test_a_disk_that_cannot_sync_still_closes(tmp_path):
    cache = make_cache(tmp_path / "store", disk__durability="power")
    with_faults(cache).sync_errno = errno.EIO
    put(cache, run(1, 4))
    cache.close()
    nothing_left_open(tmp_path)
    with make_cache(tmp_path / "store", disk__durability="power") as cache:
        found = cache.lookup(run(1, 4)).tokens
        with hold(cache, run(1, 4)) as lease:
            assert lease.tokens == found
            assert_right(lease, run(1, 4))


# Bits flip


@pytest.mark.parametrize("byte", [0, 8, 100, 260, 2000])
def test_a_flipped_bit_on_disk_is_a_counted_miss_and_a_shorter_prefix(tmp_path, byte):
    with make_cache(tmp_path / "store", host_pages=None, disk__format="raw") as cache:
        put(cache, run(1, 4))
        push_out(cache)
        flip_on_disk(cache, cache._residency.table.row(cache.lookup(run(1, 4)).keys[2]), byte)
        with hold(cache, run(1, 4)) as lease:
            assert lease.tokens == 8
            assert_right(lease, run(1, 4))
        cache.check_integrity()
        assert sum(refused(cache, "disk").values()) == 1
        assert cache.lookup(run(1, 4)).tokens == 8
        assert put(cache, run(1, 4)) == 16
        push_out(cache)
        with hold(cache, run(1, 4)) as lease:
            assert lease.tokens == 16
            assert_right(lease, run(1, 4))


@pytest.mark.parametrize("formats", [("q8", "q4"), ("raw", "raw+lz4"), ("fp8", "q8+lz4")])
def test_flipped_bits_everywhere_are_misses_never_bytes(tmp_path, formats):
    """In every copy below the device, whatever the formats: nothing comes up, everything is counted, nothing is left behind."""
    with make_cache(tmp_path / "store", host__format=formats[0], disk__format=formats[1], host__write_policy="write_through") as cache:
        put(cache, run(1, 4))
        put(cache, run(2, 4))
        cache.flush()
        push_out(cache)
        table = cache._residency.table
        for tier, flip in ((HOST, flip_in_host), (DISK, flip_on_disk)):
            for row in np.flatnonzero(table.state[tier] == READY).tolist():
                if table.state[DEVICE, row] != READY:
                    flip(cache, row, 300, 255)
        for _ in range(2):
            for start in (1, 2):
                with hold(cache, run(start, 4)) as lease:
                    assert lease.tokens == 0
            cache.settle(20)
            cache.check_integrity()
        assert cache.lookup(run(1, 4)).tokens == 0
        assert sum(refused(cache, "host").values()) > 0


def test_a_bad_host_copy_costs_one_miss_while_the_disk_still_has_a_good_one(tmp_path):
    with make_cache(tmp_path / "store", host__write_policy="write_through", disk__write_policy="write_through") as cache:
        put(cache, run(1, 4))
        push_out(cache)
        flip_in_host(cache, cache._residency.table.row(cache.lookup(run(1, 4)).keys[1]))
        hold(cache, run(1, 4)).release()
        cache.settle(20)
        with hold(cache, run(1, 4)) as lease:
            assert lease.tokens == 16
            assert_right(lease, run(1, 4))


def test_a_store_cut_short_while_in_use_is_misses(tmp_path):
    with make_cache(tmp_path / "store", host_pages=None, disk__format="raw") as cache:
        put(cache, run(1, 4))
        push_out(cache)
        for segment in (tmp_path / "store").glob("segment-*"):
            os.truncate(segment, 3 * 4096 + 100)
        with hold(cache, run(1, 4)) as lease:
            assert lease.tokens < 16
            assert_right(lease, run(1, 4))
        cache.check_integrity()
        assert sum(refused(cache, "disk").values()) > 0


# The process dies


VICTIM = """
    import sys
    from pathlib import Path
    from tests.cache.rig import make_cache, put, run, tiers_of
    cache = make_cache(Path(sys.argv[1]), device_pages=8, host_pages=8, disk_pages=400, {more})
    for start in range(1, 90):
        put(cache, run(start, 3))
        if start > 4:
            put(cache, run(start - 4, 5))
        cache.settle()
        for number in range(max(1, start - 5), start + 1):
            for page, tiers in enumerate(tiers_of(cache, run(number, 5))):
                if 2 in tiers:
                    print("on disk", number, page, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kill_after_lines", [5, 60, 300])
def test_what_was_seen_on_disk_is_found_after_kill_9_with_the_right_bytes(tmp_path, kill_after_lines):
    more: dict[str, Any] = {"host__write_policy": "write_through", "disk__write_policy": "write_through"}
    script = textwrap.dedent(VICTIM).format(more=", ".join(f"{key}={value!r}" for key, value in more.items()))
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", script, str(tmp_path / "store")]
    seen: set[tuple[int, int]] = set()
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True, bufsize=1) as victim:
        assert victim.stdout is not None
        for line in victim.stdout:
            seen.add((int(line.split()[2]), int(line.split()[3])))
            if len(seen) >= kill_after_lines:
                victim.send_signal(signal.SIGKILL)
                break
        assert victim.wait(20) == -signal.SIGKILL
    assert len(seen) >= kill_after_lines
    with make_cache(tmp_path / "store", disk_pages=400, device_pages=8, **more) as cache:
        cache.check_integrity()
        for number, page in sorted(seen):
            assert DISK in tiers_of(cache, run(number, 5))[page]
        for number in {number for number, _ in seen}:
            reach = 1 + max(page for other, page in seen if other == number)
            with hold(cache, run(number, 5)) as lease:
                assert lease.tokens >= reach * PAGE
                assert_right(lease, run(number, 5))


# Impossible wishes


IMPOSSIBLE: dict[str, dict[str, object]] = {
    "device of less than a page": {"device.capacity_bytes": LAYOUT.page_bytes - 1},
    "host of less than a page": {"host.capacity_bytes": 100},
    "disk of less than a page": {"disk.capacity_bytes": 4095},
    "device larger than any memory": {"device.capacity_bytes": "4000TiB"},
    "host larger than any memory": {"host.capacity_bytes": "4000TiB"},
    "disk larger than any disk": {"disk.capacity_bytes": "4000000TiB"},
    "staging larger than any memory": {"mover.staging_bytes": "4000TiB"},
    "path is a file": {"disk.path": "FOLDER/file"},
    "path under a file": {"disk.path": "FOLDER/file/store"},
    "a GPU that is not there": {"device.place": "cuda:99"},
    "bands that make no sense": {"policy.name": "a2cr-classic", "policy.hysteresis": 0.9},
}


@pytest.mark.parametrize("wish", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_an_impossible_wish_is_one_clear_error_and_leaves_nothing_open(tmp_path, wish):
    (tmp_path / "file").write_text("not a directory")
    wish = {key: value.replace("FOLDER", str(tmp_path)) if isinstance(value, str) else value for key, value in wish.items()}
    sound = {
        name: section for name, section in make_config(tmp_path / "store").model_dump(exclude_unset=True).items() if section is not None
    }
    with pytest.raises(ConfigError) as error:
        TieredKVCache(load_config(None, env={}, base=sound, overrides=wish), LAYOUT)
    message = str(error.value)
    assert "\n" not in message
    assert next(iter(wish)).split(".")[0] in message
    nothing_left_open(tmp_path)
    make_cache(tmp_path / "store").close()


def test_a_store_of_others_is_left_alone(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match="thesis"):
        make_cache(tmp_path / "store")
    assert os.listdir(tmp_path / "store") == ["thesis.tex"]
    nothing_left_open(tmp_path)


def test_a_store_whose_segments_cannot_be_read_is_an_error_and_is_unlocked(tmp_path, monkeypatch):
    with make_cache(tmp_path / "store") as cache:
        put(cache, run(1, 4))
    with monkeypatch.context() as patch:
        patch.setattr("kvtier.tiers.disk.recovery.scan", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "bad disk")))
        with pytest.raises(KVTierError):
            make_cache(tmp_path / "store")
    nothing_left_open(tmp_path)
    with make_cache(tmp_path / "store") as cache:
        assert cache.lookup(run(1, 4)).tokens == 16
