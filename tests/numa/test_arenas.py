"""Laws checked where there are several nodes: the host tier's arena is where its plan says, whoever builds it, and spills by distance."""

from __future__ import annotations

import pytest

from kvtier.memory.arena import Arena
from kvtier.numa.allowed import read_allowed
from kvtier.numa.binding import thread_on_numa_node
from kvtier.numa.placement import placement
from kvtier.numa.topology import read_topology
from kvtier.tiers.host_nodes import HostNodes, choose_nodes, plan_segments

TOPOLOGY = read_topology()
NODES = TOPOLOGY.memory_nodes
if len(NODES) < 2:
    pytest.skip("this machine has one memory node; `make test-numa` boots one with several", allow_module_level=True)
SIZE = 16 << 20


def build(nodes: HostNodes, size: int = SIZE) -> tuple[Arena, dict[str, object]]:
    with thread_on_numa_node(TOPOLOGY.cpu_nodes[0]):
        arena = Arena(size, "off", "auto", place=nodes.place)
    return arena, nodes.report(arena.bytes.ctypes.data, arena.bytes.nbytes)


@pytest.mark.parametrize("node", NODES)
def test_an_explicit_node_has_it_all(node):
    arena, report = build(choose_nodes("explicit", (node,), "cpu", SIZE))
    assert report["numa_segments"] == [{"bytes": SIZE, "nodes": [node], "share_there": 1.0}]
    assert placement(arena.bytes.ctypes.data, SIZE, None).on == {node: SIZE // 4096}
    arena.close()


def test_explicit_nodes_share():
    arena, report = build(choose_nodes("explicit", (NODES[-1], NODES[1]), "cpu", SIZE))
    assert report["numa"] == f"{SIZE // 2} bytes on {NODES[-1]}; {SIZE // 2} bytes on {NODES[1]}"
    assert placement(arena.bytes.ctypes.data, SIZE // 2, None).on == {NODES[-1]: SIZE // 8192}
    assert placement(arena.bytes.ctypes.data + SIZE // 2, SIZE // 2, None).on == {NODES[1]: SIZE // 8192}
    arena.close()


def test_interleave_uses_all_nodes():
    arena, report = build(choose_nodes("interleave", (), "cpu", SIZE))
    assert set(placement(arena.bytes.ctypes.data, SIZE, None).on) == set(NODES)
    assert report["numa_segments"] == [{"bytes": SIZE, "nodes": list(NODES), "share_there": 1.0}]
    arena.close()


def test_a_device_near_a_full_node_spills_to_the_next_nearest():
    near = TOPOLOGY.cpu_nodes[-1]
    room = int(read_topology().node(near).free_bytes * 0.9)
    size = room + (64 << 20)
    segments, _ = plan_segments("auto", (), near, size, read_topology(), read_allowed(TOPOLOGY))
    first, second = (segment.policy.nodes[0] for segment in segments)
    assert (first, second) == TOPOLOGY.nearest(near)[:2]
    arena, report = build(HostNodes("auto", segments, ""), size)
    shares = [part["share_there"] for part in report["numa_segments"]]  # type: ignore[attr-defined]
    assert min(shares) > 0.75, (report, read_topology())  # unbound: 0 in both; how much of a small node the kernel keeps free varies
    arena.close()
