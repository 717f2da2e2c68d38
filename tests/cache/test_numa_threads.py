"""Laws checked on any machine: where the host tier is bound, workers and storage threads stay on its node, and stats say so; else not."""

from __future__ import annotations

import logging
import os
import threading

import pytest

from kvtier.errors import Closed, NumaError
from kvtier.mover import workers as workers_module
from kvtier.mover.workers import Workers
from kvtier.numa.binding import usable_cpus
from kvtier.numa.topology import read_topology
from tests.cache.rig import assert_right, hold, make_cache, push_out, put, run

TOPOLOGY = read_topology()
NODE = TOPOLOGY.memory_nodes[0]


def named_threads(before):
    """Names of threads that are not `before`, by system id: Python's, or, of threads that compiled code started, the system's."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    for thread in map(int, set(os.listdir("/proc/self/task")) - before):
        with open(f"/proc/self/task/{thread}/comm") as comm:
            names.setdefault(thread, comm.read().strip())
    return names


def test_workers_and_storage_threads_are_on_the_node_of_the_memory(tmp_path):
    before = set(os.listdir("/proc/self/task"))
    with make_cache(tmp_path / "d", host_pages=4, host__numa="explicit", host__numa_nodes=[NODE], mover__workers=2) as cache:
        for start in (1, 2, 3):
            put(cache, run(start, 6))
        cache.flush()
        push_out(cache)
        lease = hold(cache, run(1, 6))
        assert lease.tokens == len(run(1, 6))
        assert_right(lease, run(1, 6))
        lease.release()
        stats = cache.stats()
        cpus = sorted(usable_cpus(NODE, TOPOLOGY))
        assert stats["mover"]["numa"]["nodes"] == {NODE: {"threads": 4, "cpus": cpus}}, "2 workers, the spare, house-keeping"
        assert sum(stats["mover"]["numa"]["taken"].values()) > 0
        assert stats["tiers"]["disk"]["achieved"]["io_cpus"] == cpus
        assert stats["tiers"]["host"]["achieved"]["numa_moves"] is None
        kept = [thread for thread, name in named_threads(before).items() if name.startswith("kvtier-io")]
        assert kept
        assert all(os.sched_getaffinity(thread) == set(cpus) for thread in kept)
        cache.check_integrity()


def test_without_a_bound_tier_threads_run_anywhere(tmp_path):
    with make_cache(tmp_path / "d", host__numa="off") as cache:
        stats = cache.stats()
        assert stats["mover"] == {"workers": 2, "numa": None}
        assert stats["tiers"]["disk"]["achieved"]["io_cpus"] == []


def test_layers_serve_a_cache_like_any_other(tmp_path):
    from kvtier.layout import PageLayout

    wide = PageLayout(layers=4, planes=2, page_tokens=4, kv_heads=2, head_dim=64, dtype="fp32")
    with make_cache(layout=wide, host_pages=16, host__numa="layers", host__numa_nodes=[NODE]) as cache:
        put(cache, run(1, 6))
        push_out(cache)
        lease = hold(cache, run(1, 6))
        assert lease.tokens == len(run(1, 6))
        assert_right(lease, run(1, 6), layout=wide)
        lease.release()
        assert cache.stats()["tiers"]["host"]["achieved"]["numa"] == f"layers 0-3 on {NODE}"


def test_workers_that_cannot_be_bound_run_anywhere_and_say_so(monkeypatch, caplog):
    def refused(*_):
        raise NumaError("none of its CPUs is in the cpuset")

    monkeypatch.setattr(workers_module, "NodeExecutor", refused)
    with caplog.at_level(logging.WARNING):
        workers = Workers(2, (NODE,))
    assert "workers run anywhere: none of its CPUs" in caplog.text
    assert workers.submit(NODE, int, "7").result(10) == 7
    workers.shutdown()
    with pytest.raises(Closed):
        workers.submit(None, int)
