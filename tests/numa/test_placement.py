"""Laws checked where there are several nodes (`make test-numa` boots such a machine): every page is where it was asked to be.

Whoever touches runs on the wrong node, so that a binding that does nothing is seen.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvtier.errors import NumaError
from kvtier.numa import syscalls
from kvtier.numa.binding import bind_process_to_numa_node, get_current_numa_node, memory_policy, thread_on_numa_node
from kvtier.numa.capabilities import probe
from kvtier.numa.memory import HUGE_PAGE_BYTES, NodeMemory, bind_memory, first_touch, huge_pages_on, weighted_or_plain
from kvtier.numa.placement import PAGE_BYTES, move_memory, placement, read_numa_maps
from kvtier.numa.syscalls import MemoryPolicy, Mode
from kvtier.numa.topology import read_topology

TOPOLOGY = read_topology()
NODES = TOPOLOGY.memory_nodes
WITH_CPUS = [node for node in TOPOLOGY.cpu_nodes if node in NODES]
SIZE = 8 << 20
if len(NODES) < 2:
    pytest.skip("this machine has one memory node; `make test-numa` boots one with several", allow_module_level=True)


class Fresh:
    """Untouched memory."""

    def __init__(self, length: int = SIZE) -> None:
        self.mapping = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.mapping.madvise(mmap.MADV_NOHUGEPAGE)  # policies choose per page, and a huge one counts as one
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.mapping))
        self.length = length

    def touch_from(self, node: int) -> None:
        """Written to by a thread on `node`."""
        with thread_on_numa_node(node), memory_policy(MemoryPolicy()):
            ctypes.memset(self.address, 1, self.length)

    def nodes(self) -> dict[int, int]:
        seen = placement(self.address, self.length, None)
        assert seen.untouched == seen.unknown == 0
        return dict(seen.on)


def another(node: int) -> int:
    return next(other for other in WITH_CPUS if other != node)


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    affinity, policy = os.sched_getaffinity(0), syscalls.get_mempolicy()
    yield
    os.sched_setaffinity(0, affinity)
    syscalls.set_mempolicy(policy)


def test_this_machine_has_several_nodes_and_distances():
    assert all(TOPOLOGY.distance(a, b) > TOPOLOGY.distance(a, a) for a in NODES for b in NODES if a != b)


def test_without_a_policy_the_toucher_decides():
    for node in WITH_CPUS:
        memory = Fresh()
        memory.touch_from(node)
        assert memory.nodes() == {node: SIZE // PAGE_BYTES}


@pytest.mark.parametrize("mode", [Mode.BIND, Mode.PREFERRED])
@pytest.mark.parametrize("node", NODES)
def test_binding_beats_who_touches(node, mode):
    memory = Fresh()
    bind_memory(memory.address, SIZE, MemoryPolicy(mode, (node,)))
    memory.touch_from(another(node))
    assert memory.nodes() == {node: SIZE // PAGE_BYTES}


def test_interleave_spreads_evenly():
    memory = Fresh()
    bind_memory(memory.address, SIZE, MemoryPolicy(Mode.INTERLEAVE, NODES))
    memory.touch_from(WITH_CPUS[0])
    even = SIZE // PAGE_BYTES / len(NODES)
    assert set(memory.nodes()) == set(NODES)
    assert all(abs(count - even) <= even / 4 for count in memory.nodes().values())


def test_weighted_interleave_or_its_stand_in_uses_all_nodes():
    memory = Fresh()
    bind_memory(memory.address, SIZE, weighted_or_plain(NODES))
    memory.touch_from(WITH_CPUS[0])
    assert set(memory.nodes()) == set(NODES)


def test_segments_of_one_mapping_can_be_on_different_nodes():
    memory = Fresh(len(NODES) * SIZE)
    for position, node in enumerate(NODES):
        bind_memory(memory.address + position * SIZE, SIZE, MemoryPolicy(Mode.BIND, (node,)))
    memory.touch_from(WITH_CPUS[0])
    for position, node in enumerate(NODES):
        assert placement(memory.address + position * SIZE, SIZE, None).on == {node: SIZE // PAGE_BYTES}


def test_first_touch_in_parallel_splits_a_range_between_the_nodes():
    memory = Fresh(len(WITH_CPUS) * SIZE)
    with memory_policy(MemoryPolicy()):
        first_touch(memory.address, memory.length, WITH_CPUS)
    for position, node in enumerate(WITH_CPUS):
        assert placement(memory.address + position * SIZE, SIZE, None).on == {node: SIZE // PAGE_BYTES}


@pytest.mark.parametrize("node", NODES)
def test_node_memory_is_where_it_was_asked_to_be(node):
    with thread_on_numa_node(another(node)):
        memory = NodeMemory(SIZE, MemoryPolicy(Mode.BIND, (node,)))
    assert memory.bound
    assert memory.placement(None).on == {node: SIZE // PAGE_BYTES}
    memory.close()


def test_pages_move_and_say_so():
    memory = Fresh()
    memory.touch_from(WITH_CPUS[0])
    assert move_memory(memory.address, SIZE, NODES[-1]).on == {NODES[-1]: SIZE // PAGE_BYTES}
    assert memory.mapping[SIZE - 1] == 1


def test_binding_can_move_what_is_there_already():
    memory = Fresh()
    memory.touch_from(WITH_CPUS[0])
    bind_memory(memory.address, SIZE, MemoryPolicy(Mode.BIND, (WITH_CPUS[-1],)), move=True)
    assert memory.nodes() == {WITH_CPUS[-1]: SIZE // PAGE_BYTES}


def test_a_whole_process_migrates():
    memory = Fresh()
    memory.touch_from(WITH_CPUS[0])
    syscalls.migrate_pages([WITH_CPUS[0]], [WITH_CPUS[1]])
    assert memory.nodes() == {WITH_CPUS[1]: SIZE // PAGE_BYTES}


def test_a_thread_bound_to_a_node_runs_there_and_allocates_there():
    for node in NODES:
        with thread_on_numa_node(node) as done:
            assert done.memory
            assert get_current_numa_node() == next(near for near in TOPOLOGY.nearest(node) if near in WITH_CPUS)
            memory = Fresh()
            ctypes.memset(memory.address, 1, SIZE)
        assert memory.nodes() == {node: SIZE // PAGE_BYTES}


def test_threads_started_by_a_bound_process_inherit_its_node():
    node = WITH_CPUS[-1]
    with thread_on_numa_node(WITH_CPUS[0]):
        bind_process_to_numa_node(node)
        memory = Fresh()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(ctypes.memset, memory.address, 1, SIZE).result()
    assert memory.nodes() == {node: SIZE // PAGE_BYTES}


@pytest.mark.parametrize("node", NODES)
def test_huge_pages_come_from_the_node(node):
    with huge_pages_on(node, 4):
        memory = NodeMemory(4 * HUGE_PAGE_BYTES, MemoryPolicy(Mode.BIND, (node,)), huge_pages=True)
        assert memory.placement(None).on == {node: 4}
        memory.close()


def test_huge_pages_of_another_node_do_not_count():
    with huge_pages_on(NODES[0], 4), pytest.raises(NumaError, match="have not 4 free huge pages"):
        NodeMemory(4 * HUGE_PAGE_BYTES, MemoryPolicy(Mode.BIND, (NODES[1],)), huge_pages=True)


def test_numa_maps_agree():
    memory = NodeMemory(SIZE, MemoryPolicy(Mode.INTERLEAVE, NODES[:2]))
    (line,) = [line for line in read_numa_maps() if line.address == memory.address]
    assert line.policy == f"interleave:{NODES[0]}-{NODES[1]}"
    assert line.on == memory.placement(None).on
    memory.close()


def test_the_probe_finds_everything_available():
    states = {capability.name: capability.state for capability in probe(TOPOLOGY)}
    wanted = [
        "CPU binding",
        "thread memory policy",
        "where pages are",
        "moving pages",
        "interleave",
        *(f"memory on node {n}" for n in NODES),
    ]
    assert [states[name] for name in wanted] == ["available"] * len(wanted)


def test_a_node_without_cpus_gets_memory_touched_by_the_nearest():
    bare = [node for node in NODES if node not in WITH_CPUS]
    if not bare:
        pytest.skip("every node has CPUs here")
    memory = NodeMemory(SIZE, MemoryPolicy(Mode.BIND, (bare[0],)))
    assert memory.placement(None).on == {bare[0]: SIZE // PAGE_BYTES}
    memory.close()


def test_a_cpuset_is_respected(tmp_path):
    """A process in a cpuset of one node is told what it may use, and gets one clear error for the rest."""
    mount = tmp_path / "cgroup"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "cgroup2", "none", str(mount)], check=False, capture_output=True).returncode:
        pytest.skip("control groups cannot be mounted here")
    group = mount / "kvtier-test"
    try:
        (mount / "cgroup.subtree_control").write_text("+cpuset")
        group.mkdir()
        (group / "cpuset.cpus").write_text(",".join(map(str, TOPOLOGY.node(WITH_CPUS[0]).cpus)))
        (group / "cpuset.mems").write_text(str(WITH_CPUS[0]))
        code = (
            "import os, sys, pathlib; pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\n"
            "from kvtier.numa.binding import bind_thread_to_numa_node, this_machine\n"
            "from kvtier.numa.memory import NodeMemory\n"
            "from kvtier.numa.syscalls import MemoryPolicy, Mode\n"
            "from kvtier.errors import NumaError\n"
            "from kvtier.numa.allowed import read_allowed\n"
            "print(sorted(read_allowed(this_machine()).nodes))\n"
            "try: NodeMemory(4096, MemoryPolicy(Mode.BIND, (int(sys.argv[2]),)))\n"
            "except NumaError as error: print(error)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(group / "cgroup.procs"), str(WITH_CPUS[1])], capture_output=True, text=True, check=True
        )
    finally:
        if group.exists():
            group.rmdir()
        subprocess.run(["umount", str(mount)], check=False)
    first, second = done.stdout.splitlines()
    assert first == f"[{WITH_CPUS[0]}]"
    assert f"node {WITH_CPUS[1]} is not in this process's cpuset" in second
