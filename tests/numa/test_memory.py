"""Laws checked on any machine: memory is where it was bound, as the kernel says; what cannot be done is refused or done without, aloud.

What takes several nodes is in test_placement.py.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap

import pytest

from kvtier.errors import NumaError
from kvtier.numa import memory, syscalls
from kvtier.numa.capabilities import probe
from kvtier.numa.memory import HUGE_PAGE_BYTES, NodeMemory, bind_memory, check_nodes, first_touch, huge_pages_on, weighted_or_plain
from kvtier.numa.placement import PAGE_BYTES, bytes_by_node, move_memory, placement, read_numa_maps
from kvtier.numa.syscalls import MemoryPolicy, Mode
from kvtier.numa.topology import read_topology
from tests.numa.machines import MEMORY_ONLY, TWO_SOCKETS, build, write
from tests.numa.refuse import refuse

NODE = read_topology().memory_nodes[0]
SIZE = 64 << 20


def here(node=NODE, mode=Mode.BIND):
    return MemoryPolicy(mode, (node,))


def test_memory_is_bound_touched_and_there():
    region = NodeMemory(SIZE, here())
    try:
        assert region.bound
        seen = region.placement(None)
        assert seen.on == {NODE: SIZE // PAGE_BYTES}
        assert (seen.untouched, seen.unknown, seen.share_on([NODE])) == (0, 0, 1.0)
        assert syscalls.policy_at(region.address) == here()
        assert syscalls.node_at(region.address) == NODE
        region.view[SIZE - 1] = 7
    finally:
        region.close()
    region.close()


def test_what_nobody_touched_is_nowhere():
    page = mmap.mmap(-1, 8 * PAGE_BYTES)
    page[PAGE_BYTES] = 1
    seen = placement(ctypes.addressof(ctypes.c_char.from_buffer(page)), 8 * PAGE_BYTES)
    assert (seen.pages, seen.untouched) == (1, 7)
    assert seen.share_on(read_topology().memory_nodes) == 1.0


def test_pages_that_the_kernel_hides_are_found(monkeypatch):
    """Linux 6.1 to 6.5 answer ENOENT for pages that automatic balancing watches; what nobody touched still is nowhere."""
    page = mmap.mmap(-1, 4 * PAGE_BYTES)
    page[0] = page[3 * PAGE_BYTES] = 1
    monkeypatch.setattr(syscalls, "move_pages", lambda addresses: [-errno.ENOENT] * len(addresses))
    seen = placement(ctypes.addressof(ctypes.c_char.from_buffer(page)), 4 * PAGE_BYTES)
    assert (seen.pages, seen.untouched) == (2, 2)


def test_samples_are_spread_over_the_range():
    region = NodeMemory(SIZE, here())
    assert region.placement(samples=10).pages == 10
    region.close()


@pytest.mark.parametrize("populates", [True, False])
def test_first_touch_takes_every_page_and_keeps_contents(monkeypatch, populates):
    if not populates:
        monkeypatch.setattr(memory, "_MADV_POPULATE_WRITE", 9999)  # what kernels before 5.14 answer: EINVAL
    length = 33 * PAGE_BYTES
    region = mmap.mmap(-1, length)
    region[PAGE_BYTES] = 42
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    first_touch(address, length, [NODE])
    assert placement(address, length, None).pages == 33
    assert region[PAGE_BYTES] == 42


def test_nodes_that_cannot_be_used_are_refused_before_anything_is_taken():
    for nodes, message in [((), "no node is named"), ((999,), "no NUMA node 999"), ((-1,), "no NUMA node -1")]:
        with pytest.raises(NumaError, match=message):
            NodeMemory(SIZE, MemoryPolicy(Mode.BIND, nodes))
        with pytest.raises(NumaError, match=message):
            bind_memory(0, PAGE_BYTES, MemoryPolicy(Mode.INTERLEAVE, nodes))


def test_nodes_without_memory_or_outside_the_cpuset_are_refused(tmp_path):
    root = build(tmp_path / "a", MEMORY_ONLY)
    check_nodes([2], read_topology(root), root)
    root = build(tmp_path / "b", TWO_SOCKETS)
    write(root / "proc/self/status", "Mems_allowed_list:\t0")
    with pytest.raises(NumaError, match="node 1 is not in this process's cpuset; memory may come from 0"):
        check_nodes([0, 1], read_topology(root), root)


def test_without_the_right_to_bind_memory_comes_from_those_who_touch(monkeypatch, caplog):
    refuse(monkeypatch, {"mbind": errno.EPERM})
    with caplog.at_level(logging.WARNING):
        region = NodeMemory(SIZE, here())
    assert not region.bound
    assert "not allowed here" in caplog.text
    assert region.placement().pages
    region.close()


def test_moving_to_a_node_that_is_not_there_is_refused():
    region = NodeMemory(PAGE_BYTES, here())
    with pytest.raises(NumaError, match="cannot move memory to node 999"):
        move_memory(region.address, PAGE_BYTES, 999)
    assert move_memory(region.address, PAGE_BYTES, NODE).on == {NODE: 1}
    region.close()


def test_weighted_interleave_gives_way_where_it_is_unknown(monkeypatch):
    assert weighted_or_plain([NODE]).mode in (Mode.WEIGHTED_INTERLEAVE, Mode.INTERLEAVE)
    refuse(monkeypatch, {"mbind": errno.EINVAL})
    assert weighted_or_plain([NODE]) == MemoryPolicy(Mode.INTERLEAVE, (NODE,))


def test_huge_pages_of_a_node():
    if not read_topology().node(NODE).huge_pages:
        pytest.skip("this kernel has no explicit huge pages")
    before = {pages.size_bytes: pages.total for pages in read_topology().node(NODE).huge_pages}
    try:
        with huge_pages_on(NODE, before[HUGE_PAGE_BYTES] + 4):
            region = NodeMemory(3 * HUGE_PAGE_BYTES, here(), huge_pages=True)
            assert region.placement(None).on == {NODE: 3}
            region.close()
    except NumaError as error:
        pytest.skip(f"huge pages cannot be set apart here: {error}")
    assert {pages.size_bytes: pages.total for pages in read_topology().node(NODE).huge_pages} == before


def test_huge_pages_that_are_not_there_are_refused():
    wanted = 1 + max((pages.free for node in read_topology().nodes for pages in node.huge_pages), default=0)
    with pytest.raises(NumaError, match=f"have not {wanted} free huge pages"):
        NodeMemory(wanted * HUGE_PAGE_BYTES, here(), huge_pages=True)


def test_too_many_huge_pages_are_refused_and_none_kept(tmp_path, monkeypatch):
    node = build(tmp_path, TWO_SOCKETS) / "sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages"
    assert memory.set_huge_pages(0, 20, root=tmp_path) == 16
    assert node.read_text() == "20"
    monkeypatch.setattr(memory, "read_number", lambda *_: 17)  # a kernel that found only so many
    with pytest.raises(NumaError, match="has room for 17 huge pages of 2097152 bytes, not 30"):
        memory.set_huge_pages(0, 30, root=tmp_path)
    assert node.read_text() == "17"
    monkeypatch.undo()
    with pytest.raises(NumaError, match="no pool of 12345-byte huge pages"):
        memory.set_huge_pages(0, 1, 12345, tmp_path)


def test_numa_maps_tell_policy_and_pages():
    region = NodeMemory(SIZE, here())
    (found,) = [line for line in read_numa_maps() if line.address == region.address]
    assert found.policy == f"bind:{NODE}"
    assert found.on == {NODE: SIZE // PAGE_BYTES}
    assert bytes_by_node([found]) == {NODE: SIZE}
    region.close()


def test_numa_maps_of_shared_files_do_not_count_as_own_memory(tmp_path):
    write(tmp_path / "proc/7/numa_maps", "7f00 default file=/lib/x mapped=9 N0=9 kernelpagesize_kB=4\n7f10 interleave:0-1 anon=4 N0=2 N1=2")
    assert bytes_by_node(read_numa_maps(7, tmp_path)) == {0: 8192, 1: 8192}
    write(tmp_path / "proc/9/numa_maps", "7f10 weighted interleave:0-1 anon=1 N0=1\n7f20 prefer (many)=static:1 heap")
    assert [line.policy for line in read_numa_maps(9, tmp_path)] == ["weighted interleave:0-1", "prefer (many)=static:1"]
    (tmp_path / "proc/8").mkdir()
    with pytest.raises(NumaError, match="keeps no numa_maps"):
        read_numa_maps(8, tmp_path)


def test_the_probe_tries_everything_and_leaves_no_trace():
    before = syscalls.get_mempolicy()
    found = {capability.name: capability for capability in probe(read_topology())}
    assert found["CPU binding"].state == "available"
    assert found[f"memory on node {NODE}"].state == "available"
    assert syscalls.get_mempolicy() == before


def test_the_probe_says_what_a_container_forbids(monkeypatch):
    refuse(monkeypatch, {"set_mempolicy": errno.EPERM, "mbind": errno.EPERM, "move_pages": errno.EPERM})
    found = {capability.name: capability for capability in probe(read_topology())}
    for name in ("thread memory policy", f"memory on node {NODE}", "where pages are"):
        assert (found[name].state, found[name].errno) == ("unavailable", errno.EPERM)
    assert found["CPU binding"].state == "available"


def test_node_ids_beyond_any_mask_are_refused():
    with pytest.raises(OSError, match="node ids run from 0"):
        syscalls.set_mempolicy(MemoryPolicy(Mode.BIND, (5000,)))
