"""How fast a device copies from and to each node's memory: whether host memory near the device pays here.

The device is the caller's (`DeviceLink`), so that this needs no driver and no tensor library. State: none; what was registered is not
afterwards.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvtier.numa.allowed import read_allowed
from kvtier.numa.memory import NodeMemory
from kvtier.numa.syscalls import MemoryPolicy, Mode
from kvtier.numa.topology import Topology


class DeviceLink(Protocol):
    """One device that copies."""

    name: str

    def register(self, address: int, size_bytes: int) -> bool:
        """Pin memory for the device; False if that cannot be: copies are then slower."""

    def unregister(self, address: int) -> None:
        """Undo it."""

    def to_device(self, address: int, size_bytes: int) -> None:
        """Copy from host memory, and wait."""

    def to_host(self, address: int, size_bytes: int) -> None:
        """Copy into host memory, and wait."""


@dataclass(frozen=True)
class DeviceCopies:
    """GB/s of one device with memory of one node."""

    device: str
    node: int
    pinned: bool
    to_device_gb_per_s: float
    to_host_gb_per_s: float


def measure_device_copies(
    devices: Sequence[DeviceLink], topology: Topology, size_bytes: int, repeats: int = 5, progress: Callable[[str], None] = lambda _: None
) -> list[DeviceCopies]:
    """All devices with all nodes that memory may come from. OSError if the kernel refuses to bind, or has not so much memory there."""
    found = []
    for node in sorted(read_allowed(topology).nodes):
        for device in devices:
            progress(f"{device.name} and memory of node {node}")
            memory = NodeMemory(size_bytes, MemoryPolicy(Mode.BIND, (node,)))
            try:
                pinned = device.register(memory.address, size_bytes)
                try:
                    speeds = [_speed(copy, memory.address, size_bytes, repeats) for copy in (device.to_device, device.to_host)]
                finally:
                    if pinned:
                        device.unregister(memory.address)
            finally:
                memory.close()
            found.append(DeviceCopies(device.name, node, pinned, *speeds))
    return found


def _speed(copy: Callable[[int, int], None], address: int, size_bytes: int, repeats: int) -> float:
    copy(address, size_bytes)  # once for nothing
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        copy(address, size_bytes)
        seconds.append(time.perf_counter() - started)
    return size_bytes / statistics.median(seconds) / 1e9
