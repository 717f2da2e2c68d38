"""Laws checked where there are several nodes (`make test-numa`): the host tier's threads run where its memory is, its pages really move,
and layers are on the nodes they should be on."""

from __future__ import annotations

import ctypes
import os
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from kvtier.formats import get_format
from kvtier.io.buffered import BufferedEngine
from kvtier.io.files import Request, page_aligned
from kvtier.keys import root_key
from kvtier.layout import PageLayout
from kvtier.mover.workers import Workers
from kvtier.numa.binding import get_current_numa_node, thread_on_numa_node
from kvtier.numa.executor import NodeExecutor, NumaThreadPool
from kvtier.numa.memory import NodeMemory
from kvtier.numa.placement import placement
from kvtier.numa.syscalls import MemoryPolicy, Mode
from kvtier.numa.topology import read_topology
from kvtier.numa.transfers import NodeStream, Piece
from kvtier.tiers import host
from kvtier.tiers.base import PageId
from kvtier.tiers.host import HostTier
from kvtier.tiers.host_nodes import HostNodes, Segment

TOPOLOGY = read_topology()
NODES = [node for node in TOPOLOGY.cpu_nodes if node in TOPOLOGY.memory_nodes]
if len(NODES) < 2:
    pytest.skip("this machine has one memory node; `make test-numa` boots one with several", allow_module_level=True)
LAYOUT = PageLayout(layers=4, planes=2, page_tokens=16, kv_heads=2, head_dim=64, dtype="fp32")
"""64 KiB a page, 16 KiB a layer."""
RAW = get_format("raw")
PAGES = 32


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def fill(tier: HostTier, count: int) -> list[int]:
    slots = tier.reserve(count)
    assert slots is not None
    payloads = [np.full(LAYOUT.page_bytes, number, np.uint8) for number in range(count)]
    assert tier.store(slots, [PageId(key(number), root_key(b"", ""), 0) for number in range(count)], payloads) == [None] * count
    return slots


def where(tier: HostTier, slot: int) -> dict[int, int]:
    return dict(placement(tier._bytes[slot].ctypes.data, LAYOUT.page_bytes, None).on)


def test_threads_of_an_executor_run_on_their_nodes():
    with NodeExecutor(dict.fromkeys(NODES, 2)) as executor:
        gate = threading.Barrier(2 * len(NODES))

        def here() -> int:
            gate.wait(60)
            return get_current_numa_node()

        for _ in range(3):
            found = [executor.submit(node, here) for node in NODES for _ in range(2)]
            assert Counter(future.result(60) for future in found) == dict.fromkeys(NODES, 2)
        report = executor.report()
        assert {node: about["cpus"] for node, about in report["nodes"].items()} == {node: list(TOPOLOGY.node(node).cpus) for node in NODES}
        assert report["taken"]["own"] + report["taken"]["same_node"] == 6 * len(NODES)


def test_a_pool_works_on_memory_where_it_is():
    memories = [NodeMemory(1 << 20, MemoryPolicy(Mode.BIND, (node,))) for node in NODES]
    with NumaThreadPool(1, NODES) as pool:
        seen = pool.map(lambda memory: (get_current_numa_node(), set(memory.placement(None).on)), memories, NODES)
    taken = pool.executor.report()["taken"]
    if taken["own"] == len(NODES):
        assert seen == [(node, {node}) for node in NODES]
    for memory in memories:
        memory.close()


def test_a_stream_brings_memory_to_buffers_on_the_node():
    source = NodeMemory(1 << 20, MemoryPolicy(Mode.BIND, (NODES[0],)))
    source.view[:] = bytes(range(256)) * 4096
    seen = bytearray()
    with thread_on_numa_node(NODES[1]), NodeStream(NODES[1], TOPOLOGY, 64 << 10) as stream:

        def work(parts) -> None:
            for part in parts:
                assert set(placement(part.address, part.length, None).on) == {NODES[1]}
                seen.extend(ctypes.string_at(part.address, part.length))

        stream.carry([Piece(0, source.address, 1 << 20)], work)
    assert bytes(seen) == bytes(source.view)
    source.close()


@pytest.fixture
def tier(monkeypatch):
    half = PAGES // 2 * LAYOUT.page_bytes
    segments = [Segment(start, half, MemoryPolicy(Mode.PREFERRED, (node,))) for start, node in ((0, NODES[1]), (half, NODES[3]))]
    monkeypatch.setattr(host, "choose_nodes", lambda *_: HostNodes("auto", segments, ""))
    tier = HostTier(LAYOUT, RAW, PAGES * LAYOUT.page_bytes, huge_pages="off")
    yield tier
    tier.close()


def test_pages_move_to_the_node_that_reads_them(tier):
    """All are read from node 1; those on node 3 come, two by two, in the place of those nobody reads."""
    slots = fill(tier, tier.capacity_slots)
    far = [slot for slot in slots if tier.node_of(slot) == NODES[3]][:4]
    assert all(where(tier, slot) == {NODES[3]: LAYOUT.page_bytes // 4096} for slot in far)
    with thread_on_numa_node(NODES[1]):
        for _ in range(8):
            tier.load(far, [tier.key_of(slot) for slot in far], np.empty((len(far), 0), np.uint8))
    waiting = tier.plan_moves(lambda slot: tier.key_of(slot) is not None, 0.0)
    assert [slot for slot, node in waiting if node == NODES[1]] == far
    keys = {slot: tier.key_of(slot) for slot in slots}
    moved = {}
    while waiting:
        later = []
        for slot, node in waiting:
            target = tier.reserve_on(node)
            if target is None:
                later.append((slot, node))
                continue
            assert tier.carry([(slot, target)], node) == [True]
            assert where(tier, target) == {node: LAYOUT.page_bytes // 4096}
            tier.moved((slot, target), 0.0)
            tier.free([slot])
            moved[slot] = target
        assert len(later) < len(waiting)
        waiting = later
    assert all(tier.node_of(moved[slot]) == NODES[1] for slot in far)
    for slot, target in moved.items():
        found = tier.load([target], [keys[slot]], np.empty((1, 0), np.uint8))[0]
        assert isinstance(found, np.ndarray)
        assert set(found.tolist()) == {int.from_bytes(keys[slot] or b"", "big")}
    tier.check_integrity()
    counts = tier.move_counts(1.0)
    assert counts is not None
    assert counts["per_s"] == pytest.approx(8 / 60, abs=1e-4)
    assert counts["pages"] == len(moved) == 8
    assert counts["local_share"] == 0.0


def test_workers_run_where_the_memory_is(tier):
    assert tier.worker_nodes == (NODES[1],)
    workers = Workers(2, tier.worker_nodes)
    try:
        assert {workers.submit(None, get_current_numa_node).result(60) for _ in range(8)} == {NODES[1]}
        report = workers.report()
        assert report["numa"]["nodes"] == {NODES[1]: {"threads": 2, "cpus": list(TOPOLOGY.node(NODES[1]).cpus)}}  # type: ignore[index]
    finally:
        workers.shutdown()


@pytest.mark.parametrize("native", [True, False])
def test_storage_threads_run_on_the_cpus_they_are_kept_on(tmp_path_factory, native):
    class Engine(BufferedEngine):
        pass

    Engine.native = native
    cpus = TOPOLOGY.node(NODES[2]).cpus
    before = set(os.listdir("/proc/self/task"))
    engine = Engine(4)
    engine.keep_on(cpus)
    path = Path("/run" if os.access("/run", os.W_OK) else "/tmp") / f"kvtier-{native}"
    file = engine.open(path)
    try:
        buffers = [page_aligned(4096) for _ in range(8)]
        assert engine.write_all([Request(file, 4096 * place, buffer) for place, buffer in enumerate(buffers)]) == [None] * 8
        assert len(list(engine.read_each([Request(file, 4096 * place, buffer) for place, buffer in enumerate(buffers)]))) == 8
        started = set(os.listdir("/proc/self/task")) - before
        assert started
        assert {tuple(sorted(os.sched_getaffinity(int(thread)))) for thread in started} == {cpus}
    finally:
        engine.close(file)
        engine.stop()
        path.unlink()


def test_layers_are_on_their_nodes():
    nodes = (NODES[2], NODES[0])
    tier = HostTier(LAYOUT, RAW, PAGES * LAYOUT.page_bytes, numa="layers", numa_nodes=nodes)
    try:
        assert tier.worker_nodes == nodes
        half = LAYOUT.page_bytes // 2
        for slot in fill(tier, PAGES):
            start = tier._bytes[slot].ctypes.data
            assert placement(start, half, None).on == {NODES[2]: half // 4096}
            assert placement(start + half, half, None).on == {NODES[0]: half // 4096}
        assert [tier.node_of(0, layer) for layer in range(4)] == [NODES[2]] * 2 + [NODES[0]] * 2
        report = tier.report()
        assert [(part["layers"], part["nodes"], part["share_there"]) for part in report["numa_segments"]] == [  # type: ignore[attr-defined]
            ([0, 2], [NODES[2]], 1.0),
            ([2, 4], [NODES[0]], 1.0),
        ]
    finally:
        tier.close()
