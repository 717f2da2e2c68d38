"""Laws checked: bindings do what they say or say what they did not; context managers restore everything, also after exceptions."""

from __future__ import annotations

import errno
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from kvtier.errors import NumaError
from kvtier.numa import binding, syscalls
from kvtier.numa.binding import (
    bind_process_to_numa_node,
    bind_thread_to_numa_node,
    get_current_numa_node,
    get_device_numa_node,
    get_num_numa_nodes,
    get_numa_node_cpus,
    is_numa_available,
    log_numa_topology,
    memory_policy,
    process_on_numa_node,
    thread_on_numa_node,
    usable_cpus,
)
from kvtier.numa.devices import find_devices
from kvtier.numa.syscalls import MemoryPolicy, Mode
from kvtier.numa.topology import read_topology
from tests.numa.machines import TWO_SOCKETS, Machine, PciSpec, build, write
from tests.numa.refuse import refuse

NODE = read_topology().memory_nodes[0]


@pytest.fixture(autouse=True)
def _as_before():
    affinity, policy = os.sched_getaffinity(0), syscalls.get_mempolicy()
    yield
    assert (os.sched_getaffinity(0), syscalls.get_mempolicy()) == (affinity, policy)


def in_a_thread(work):
    """What a thread of its own does cannot change this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def test_this_machine_answers():
    assert is_numa_available()
    assert get_num_numa_nodes() == len(read_topology().nodes)
    assert get_current_numa_node() in read_topology().cpu_nodes
    assert set(get_numa_node_cpus(NODE)) >= set(read_topology().node(NODE).cpus)


def test_a_thread_is_bound_and_its_policy_set():
    def work():
        done = bind_thread_to_numa_node(NODE)
        return done, os.sched_getaffinity(0), syscalls.get_mempolicy()

    done, affinity, policy = in_a_thread(work)
    assert (done.node, done.memory, done.why) == (NODE, True, "")
    assert set(done.cpus) == affinity
    assert policy == MemoryPolicy(Mode.PREFERRED, (NODE,))


def test_a_thread_is_restored_after_an_exception():
    @thread_on_numa_node(NODE, strict=True)
    def inside():
        assert syscalls.get_mempolicy().mode == Mode.BIND
        assert os.sched_getaffinity(0) == set(read_topology().cpus_nearest(NODE))
        raise ZeroDivisionError

    def work():
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        before = os.sched_getaffinity(0), syscalls.get_mempolicy()
        with pytest.raises(ZeroDivisionError):
            inside()
        assert (os.sched_getaffinity(0), syscalls.get_mempolicy()) == before

    in_a_thread(work)


def test_all_threads_of_the_process_are_bound_and_restored():
    stop, seen = threading.Event(), {}
    narrow = {max(os.sched_getaffinity(0))}

    def work():
        os.sched_setaffinity(0, narrow)
        seen["id"] = threading.get_native_id()
        stop.wait()

    thread = threading.Thread(target=work)
    thread.start()
    while "id" not in seen:
        pass
    try:
        with process_on_numa_node(NODE) as done:
            assert os.sched_getaffinity(seen["id"]) == set(done.cpus) == set(read_topology().cpus_nearest(NODE))
        assert os.sched_getaffinity(seen["id"]) == narrow
    finally:
        stop.set()
        thread.join()


def test_an_inner_policy_ends_with_its_block():
    before = syscalls.get_mempolicy()
    with memory_policy(MemoryPolicy(Mode.INTERLEAVE, (NODE,))), memory_policy(MemoryPolicy(Mode.LOCAL)):
        assert syscalls.get_mempolicy() == MemoryPolicy(Mode.LOCAL)
    assert syscalls.get_mempolicy() == before


def test_a_forbidden_policy_costs_memory_binding_only(monkeypatch, caplog):
    refuse(monkeypatch, {"set_mempolicy": errno.EPERM, "get_mempolicy": errno.EPERM})
    with caplog.at_level(logging.WARNING):
        done = in_a_thread(lambda: bind_thread_to_numa_node(NODE))
    assert done.cpus
    assert not done.memory
    assert len(caplog.records) == 1
    assert "Operation not permitted" in caplog.text
    assert not is_numa_available()
    monkeypatch.undo()


def test_strict_binding_is_whole_or_an_error(monkeypatch):
    def work():
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        before = os.sched_getaffinity(0)
        with pytest.raises(NumaError, match="memory policy: Operation not permitted; nothing was changed"):
            bind_thread_to_numa_node(NODE, strict=True)
        assert os.sched_getaffinity(0) == before

    refuse(monkeypatch, {"set_mempolicy": errno.EPERM, "get_mempolicy": errno.EPERM})
    in_a_thread(work)
    monkeypatch.undo()


@pytest.mark.parametrize("bind", [bind_thread_to_numa_node, bind_process_to_numa_node, get_numa_node_cpus])
@pytest.mark.parametrize("node", [-1, 999])
def test_a_node_that_is_not_there_is_an_error(bind, node):
    with pytest.raises(NumaError, match=f"no NUMA node {node}"):
        bind(node)


def test_a_node_outside_the_cpuset_is_an_error(tmp_path):
    root = build(tmp_path, TWO_SOCKETS)
    write(root / "proc/self/cgroup", "0::/")
    write(root / "sys/fs/cgroup/cpuset.cpus.effective", "0-9")
    assert usable_cpus(1, read_topology(root), root) == {8, 9}
    write(root / "sys/fs/cgroup/cpuset.cpus.effective", "0-7")
    with pytest.raises(NumaError, match="none of the CPUs 8-15 of node 1 is in this process's cpuset, which has 0-7"):
        usable_cpus(1, read_topology(root), root)


def test_devices_of_unknown_node_are_guessed_aloud_and_missing_ones_not(tmp_path, monkeypatch, caplog):
    root = build(tmp_path, Machine(TWO_SOCKETS.nodes, pci=[PciSpec(f"pci0000:0{n}/0000:0{n}:01.0") for n in range(4)]))
    topology = read_topology(root)
    monkeypatch.setattr(binding, "this_machine", lambda: topology)
    monkeypatch.setattr(binding, "find_devices", lambda _: find_devices(topology, root))
    with caplog.at_level(logging.INFO):
        assert [get_device_numa_node(n) for n in range(4)] == [0, 1, 0, 1]
        assert len(caplog.records) == 4
        assert get_device_numa_node("eth7") == -1
    assert "round robin" in caplog.records[0].message
    assert "no device 'eth7'" in caplog.records[-1].message


def test_the_topology_can_be_logged(caplog):
    with caplog.at_level(logging.INFO):
        log_numa_topology()
    assert len(caplog.records) == get_num_numa_nodes()


def test_a_node_without_memory_binds_cpus_only(monkeypatch):
    topology = read_topology()
    bare = replace(topology, nodes=tuple(replace(node, memory_bytes=0) for node in topology.nodes))
    monkeypatch.setattr(binding, "this_machine", lambda: bare)
    done = in_a_thread(lambda: bind_thread_to_numa_node(NODE))
    assert done.cpus
    assert "has no memory" in done.why


def test_many_threads_bind_at_once():
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda _: bind_thread_to_numa_node(NODE), range(64)))
    assert {result.why for result in done} == {""}


def test_an_architecture_without_numbers_is_no_numa(monkeypatch):
    monkeypatch.setattr(syscalls, "_numbers", {})
    assert not is_numa_available()
    assert get_current_numa_node() == -1
    monkeypatch.undo()
