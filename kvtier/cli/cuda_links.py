"""The CUDA devices of this machine as `kvtier.numa.device_copies` copies with them."""

from __future__ import annotations

import ctypes

import torch

_PORTABLE = 1  # cudaHostRegisterPortable


class CudaLink:
    """One CUDA device and `size_bytes` of its memory."""

    def __init__(self, index: int, size_bytes: int) -> None:
        self.name = f"cuda:{index}"
        self._runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        self._memory = torch.empty(size_bytes, dtype=torch.uint8, device=self.name)

    def register(self, address: int, size_bytes: int) -> bool:
        """See `DeviceLink`."""
        return int(self._runtime.cudaHostRegister(address, size_bytes, _PORTABLE)) == 0

    def unregister(self, address: int) -> None:
        """See `DeviceLink`."""
        self._runtime.cudaHostUnregister(address)

    def to_device(self, address: int, size_bytes: int) -> None:
        """See `DeviceLink`."""
        self._memory[:size_bytes].copy_(_at(address, size_bytes))
        torch.cuda.synchronize(self.name)

    def to_host(self, address: int, size_bytes: int) -> None:
        """See `DeviceLink`."""
        _at(address, size_bytes).copy_(self._memory[:size_bytes])
        torch.cuda.synchronize(self.name)


def cuda_links(size_bytes: int) -> list[CudaLink]:
    """One per device; none without CUDA."""
    return [CudaLink(index, size_bytes) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def _at(address: int, size_bytes: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_uint8 * size_bytes).from_address(address), dtype=torch.uint8)
