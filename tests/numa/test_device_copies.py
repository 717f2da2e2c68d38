"""Laws checked: device copies are measured with memory of each node, registered and given back; what cannot be pinned is measured too."""

from __future__ import annotations

import ctypes

import pytest

from kvtier.cli.cuda_links import CudaLink
from kvtier.numa.device_copies import measure_device_copies
from kvtier.numa.memory import NodeMemory
from kvtier.numa.placement import placement
from kvtier.numa.syscalls import MemoryPolicy, Mode
from kvtier.numa.topology import read_topology
from kvtier.testing.accelerator import LateAccelerator

TOPOLOGY = read_topology()
SIZE = 1 << 20


class Fake:
    """A device whose memory is a buffer."""

    name = "fake:0"

    def __init__(self, pins: bool = True, breaks: bool = False) -> None:
        self.pins, self.breaks = pins, breaks
        self.registered: set[int] = set()
        self.seen: list[set[int]] = []
        self.memory = ctypes.create_string_buffer(SIZE)

    def register(self, address: int, size_bytes: int) -> bool:
        self.seen.append(set(placement(address, size_bytes, None).on))
        if self.pins:
            self.registered.add(address)
        return self.pins

    def unregister(self, address: int) -> None:
        self.registered.remove(address)

    def to_device(self, address: int, size_bytes: int) -> None:
        if self.breaks:
            raise RuntimeError("the device fell off")
        ctypes.memmove(self.memory, address, size_bytes)

    def to_host(self, address: int, size_bytes: int) -> None:
        ctypes.memmove(address, self.memory, size_bytes)


@pytest.mark.parametrize("pins", [True, False])
def test_every_node_is_measured_with_memory_that_is_there(pins):
    device = Fake(pins)
    found = measure_device_copies([device], TOPOLOGY, SIZE, 2)
    assert [each.node for each in found] == list(TOPOLOGY.memory_nodes)
    assert device.seen == [{node} for node in TOPOLOGY.memory_nodes]
    assert all(each.pinned == pins and each.to_device_gb_per_s > 0 and each.to_host_gb_per_s > 0 for each in found)
    assert not device.registered
    assert measure_device_copies([], TOPOLOGY, SIZE) == []


def test_memory_is_unpinned_when_the_device_fails():
    device = Fake(breaks=True)
    with pytest.raises(RuntimeError, match="fell off"):
        measure_device_copies([device], TOPOLOGY, SIZE)
    assert not device.registered


@pytest.mark.parametrize("pins", [True, False])
def test_a_gpu_has_copied_when_its_link_says_so(pins):
    """On a stand-in that does everything as late as it may: a missing wait is a wrong byte."""
    gpu = LateAccelerator(total_bytes=1 << 22, refuse_after=None if pins else 0)
    link = CudaLink(gpu, SIZE)
    memory = NodeMemory(SIZE, MemoryPolicy(Mode.BIND, TOPOLOGY.memory_nodes[:1]))
    try:
        assert link.register(memory.address, SIZE) is pins
        memory.view[:] = bytes([7]) * SIZE
        link.to_device(memory.address, SIZE)
        memory.view[:] = bytes(SIZE)
        link.to_host(memory.address, SIZE)
        assert bytes(memory.view) == bytes([7]) * SIZE
        if pins:
            link.unregister(memory.address)
    finally:
        memory.close()
