"""Laws checked: any machine's /sys is read as it is: gaps in ids, nodes without CPUs or memory, offline CPUs, SMT, no NUMA at all."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import NumaError
from kvtier.numa.allowed import read_allowed
from kvtier.numa.ids import format_ids, parse_ids
from kvtier.numa.topology import read_topology
from tests.numa.machines import A3, GAPS, MEMORY_ONLY, NO_NUMA, OFFLINE, ONE_NODE, TWO_SOCKETS, Machine, NodeSpec, build, write

GIB = 1 << 30


@given(st.sets(st.integers(0, 5000)))
def test_lists_of_ids_survive_text(ids):
    assert parse_ids(format_ids(ids)) == tuple(sorted(ids))


@pytest.mark.parametrize("text", ["3-1", "a", "1,,2", "-1", "0-99999999", "1-"])
def test_what_is_no_list_is_refused(text):
    with pytest.raises(NumaError):
        parse_ids(text)


def test_two_sockets(tmp_path):
    topology = read_topology(build(tmp_path, TWO_SOCKETS))
    assert topology.numa
    assert topology.sockets == {0: (0,), 1: (1,)}
    assert topology.threads_per_core == 2
    assert topology.cpus[3].siblings == (2, 3)
    assert topology.distance(0, 1) == 21
    assert [cache.cpus for cache in topology.caches] == [tuple(range(8)), tuple(range(8, 16))]
    assert {cache.size_bytes for cache in topology.caches} == {32 << 20}
    node = topology.node(0)
    assert (node.memory_bytes, node.free_bytes) == (64 * GIB, 32 * GIB)
    assert [(pages.size_bytes, pages.total, pages.free) for pages in node.huge_pages] == [(2 << 20, 16, 16)]


def test_the_machine_of_the_source(tmp_path):
    topology = read_topology(build(tmp_path, A3))
    assert len(topology.cpus) == 320
    assert topology.sockets == {0: (0, 1), 1: (2, 3), 2: (4, 5), 3: (6, 7)}
    assert topology.nearest(2) == (2, 3, 0, 1, 4, 5, 6, 7)


def test_ids_with_gaps(tmp_path):
    topology = read_topology(build(tmp_path, GAPS))
    assert topology.node_ids == (0, 8, 64)
    assert (topology.distance(0, 8), topology.distance(64, 8)) == (20, 40)
    assert topology.node_of_cpu(4) == 64
    with pytest.raises(NumaError, match="no NUMA node 1; this machine has 0, 8, 64"):
        topology.node(1)


def test_a_node_without_cpus_is_served_by_the_nearest_with_some(tmp_path):
    topology = read_topology(build(tmp_path, MEMORY_ONLY))
    assert topology.cpu_nodes == (0, 1)
    assert topology.memory_nodes == (0, 1, 2)
    assert topology.cpus_nearest(2) == (0, 1)
    assert topology.nearest(1) == (1, 0, 2)


def test_a_node_without_memory_is_no_place_for_memory(tmp_path):
    topology = read_topology(build(tmp_path, Machine({0: NodeSpec([0]), 1: NodeSpec([1], gib=0)})))
    assert topology.memory_nodes == (0,)


def test_offline_cpus_are_not_there(tmp_path):
    topology = read_topology(build(tmp_path, OFFLINE))
    assert topology.node(0).cpus == (0, 2, 3)
    assert topology.node(1).cpus == (4, 5)
    with pytest.raises(NumaError, match="no online CPU 6"):
        topology.node_of_cpu(6)


def test_without_numa_there_is_one_node_with_everything(tmp_path):
    topology = read_topology(build(tmp_path, NO_NUMA))
    assert not topology.numa
    assert topology.node(0).cpus == (0, 1, 2, 3)
    assert topology.node(0).memory_bytes == 64 * GIB
    assert topology.distance(0, 0) == 10


def test_without_sysfs_there_is_a_clear_error(tmp_path):
    with pytest.raises(NumaError, match="needs Linux"):
        read_topology(tmp_path)


def test_this_machine_can_be_read():
    topology = read_topology()
    assert topology.cpus
    assert topology.memory_nodes


def test_cpusets_of_both_versions_limit_what_is_allowed(tmp_path):
    root = build(tmp_path, TWO_SOCKETS)
    topology = read_topology(root)
    free = read_allowed(topology, root)
    assert not free.restricts(topology)
    write(root / "proc/self/status", "Cpus_allowed_list:\t0-3\nMems_allowed_list:\t0-1")
    write(root / "proc/self/cgroup", "4:cpuset:/job\n0::/")
    write(root / "sys/fs/cgroup/cpuset/job/cpuset.effective_cpus", "0-9")
    version_1 = read_allowed(topology, root)
    assert (version_1.cpus, version_1.affinity) == (frozenset(range(10)), frozenset(range(4)))
    write(root / "proc/self/cgroup", "0::/outer/inner")
    write(root / "sys/fs/cgroup/outer/inner/cpuset.cpus.effective", "2-5")
    write(root / "sys/fs/cgroup/outer/inner/cpuset.mems.effective", "1")
    version_2 = read_allowed(topology, root)
    assert version_2.cpus == {2, 3, 4, 5}
    assert version_2.affinity == {2, 3}
    assert version_2.nodes == {1}
    assert version_2.restricts(topology)


def test_one_node_restricts_nothing(tmp_path):
    root = build(tmp_path, ONE_NODE)
    topology = read_topology(root)
    assert not read_allowed(topology, root).restricts(topology)


def test_numa_imports_neither_torch_nor_numpy_nor_the_cache():
    from pathlib import Path

    import kvtier.numa

    names = [f"kvtier.numa.{path.stem}" for path in Path(kvtier.numa.__file__).parent.glob("*.py") if path.stem != "__init__"]
    code = f"import sys, {', '.join(names)}; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'kvtier.cache', 'kvtier.pages')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
