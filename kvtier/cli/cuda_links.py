"""The CUDA devices of this machine as `kvtier.numa.device_copies` copies with them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from kvtier.cuda.find import find_accelerator
from kvtier.cuda.surface import Accelerator


class CudaLink:
    """One CUDA device and `size_bytes` of its memory. DeviceError if it has not so much."""

    def __init__(self, gpu: Accelerator, size_bytes: int) -> None:
        self.name = str(gpu.device)
        self._gpu, self._stream = gpu, gpu.new_stream()
        self._memory = gpu.allocate(size_bytes)

    def register(self, address: int, size_bytes: int) -> bool:
        """See `DeviceLink`."""
        return self._gpu.register(address, size_bytes) is None

    def unregister(self, address: int) -> None:
        """See `DeviceLink`."""
        self._gpu.unregister(address)

    def to_device(self, address: int, size_bytes: int) -> None:
        """See `DeviceLink`."""
        self._wait_for(lambda: self._memory[:size_bytes].copy_(_at(address, size_bytes), non_blocking=True))

    def to_host(self, address: int, size_bytes: int) -> None:
        """See `DeviceLink`."""
        self._wait_for(lambda: _at(address, size_bytes).copy_(self._memory[:size_bytes], non_blocking=True))

    def _wait_for(self, copy: Callable[[], object]) -> None:
        self._stream.run(copy)  # torch's copies take memory that is not registered too
        self._stream.record().wait()


def cuda_links(size_bytes: int) -> list[CudaLink]:
    """One per device; none without CUDA. ConfigError for a device that cannot be used, DeviceError if one has too little memory."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = [find_accelerator(f"cuda:{index}") for index in range(count)]
    return [CudaLink(gpu, size_bytes) for gpu in found if gpu is not None]


def _at(address: int, size_bytes: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_uint8 * size_bytes).from_address(address), dtype=torch.uint8)
