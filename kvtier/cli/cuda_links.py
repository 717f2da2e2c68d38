"""The CUDA devices of this machine as `kvtier.numa.device_copies` copies with them: each on a stream of its own, beside everything else."""

from __future__ import annotations

import ctypes

import torch

from kvtier.cuda.find import find_accelerator
from kvtier.cuda.surface import Accelerator


class CudaLink:
    """One device and `size_bytes` of its memory. DeviceError if it has not so much."""

    def __init__(self, device: Accelerator, size_bytes: int) -> None:
        self.name = str(device.device)
        self._device = device
        self._stream = device.new_stream()
        self._memory = device.allocate(size_bytes)

    def register(self, address: int, size_bytes: int) -> bool:
        """See `DeviceLink`."""
        return self._device.register(address, size_bytes) is None

    def unregister(self, address: int) -> None:
        """See `DeviceLink`."""
        self._device.unregister(address)

    def to_device(self, address: int, size_bytes: int) -> None:
        """See `DeviceLink`."""
        self._copy(self._memory[:size_bytes], _at(address, size_bytes))

    def to_host(self, address: int, size_bytes: int) -> None:
        """See `DeviceLink`."""
        self._copy(_at(address, size_bytes), self._memory[:size_bytes])

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        # By tensor, not by address: memory that could not be registered has to go as well.
        self._stream.run(lambda: target.copy_(source, non_blocking=True))
        self._stream.record().wait()


def cuda_links(size_bytes: int) -> list[CudaLink]:
    """One per device; none without CUDA. ConfigError for a device that cannot be used."""
    if not torch.cuda.is_available():
        return []
    found = [find_accelerator(f"cuda:{index}") for index in range(torch.cuda.device_count())]
    return [CudaLink(device, size_bytes) for device in found if device is not None]


def _at(address: int, size_bytes: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_uint8 * size_bytes).from_address(address), dtype=torch.uint8)
