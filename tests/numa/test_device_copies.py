"""Laws checked: device copies are measured with memory of each node, registered and given back; what cannot be pinned is measured too."""

from __future__ import annotations

import ctypes

import pytest
import torch

from kvtier.cli import cuda_links
from kvtier.memory.region import aligned_array
from kvtier.numa.device_copies import measure_device_copies
from kvtier.numa.placement import placement
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


@pytest.mark.parametrize("refuse_after", [None, 0])
def test_a_gpu_copies_on_a_stream_of_its_own_and_is_waited_for(monkeypatch, refuse_after):
    gpu = LateAccelerator(refuse_after=refuse_after)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(cuda_links, "find_accelerator", lambda place: gpu if place == "cuda:0" else None)
    (link,) = cuda_links.cuda_links(SIZE)
    (found, *_) = measure_device_copies([link], TOPOLOGY, SIZE, 1)
    assert found.pinned == (refuse_after is None)
    assert gpu.registered == {}
    source, target = aligned_array(SIZE), aligned_array(SIZE)
    source[:] = 7
    link.to_device(source.ctypes.data, SIZE)
    link.to_host(target.ctypes.data, SIZE)
    assert bool((target == 7).all())
