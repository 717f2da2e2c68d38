"""Which device the pages live on, from what the configuration says; the accelerator of that device, if it is one."""

from __future__ import annotations

from functools import lru_cache

import torch

from kvtier.cuda.surface import Accelerator
from kvtier.errors import ConfigError, DeviceError


def find_accelerator(place: str) -> Accelerator | None:
    """The GPU of `place` ("auto", "cpu", "cuda", "cuda:1"); None for the CPU.

    ConfigError if that GPU is not there, or cannot be used: "auto" too, where there is a GPU that does not work.
    """
    if place == "cpu" or (place == "auto" and not torch.cuda.is_available()):
        return None
    if not torch.cuda.is_available():
        raise ConfigError(f"device.place is {place!r}, but torch sees no CUDA device here; use 'cpu' or 'auto'")
    index = torch.device("cuda" if place == "auto" else place).index
    index = torch.cuda.current_device() if index is None else index
    if index >= torch.cuda.device_count():
        raise ConfigError(f"device.place is {place!r}, but there are only {torch.cuda.device_count()} CUDA devices")
    try:
        return _open(index)
    except DeviceError as error:
        raise ConfigError(f"device.place is {place!r}, but {error}; install a torch built for this GPU, or use 'cpu'") from error


@lru_cache(maxsize=64)
def _open(index: int) -> Accelerator:
    from kvtier.cuda.nvidia import Nvidia

    return Nvidia(index)
