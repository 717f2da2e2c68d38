"""Files read straight into a GPU's memory, past the host's: what kvtier asks of whoever can.

`kvtier.cuda.gds` does it with kvikio, which is NVIDIA's cuFile (GPUDirect Storage); `kvtier.testing.direct` has a stand-in that reads
as late as it may. `Accelerator.direct_reader` gives one. Nothing here knows what the bytes mean, or whether they are the right ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import torch


class Reading(ABC):
    """One read on its way. Its memory belongs to it until `finish` returned."""

    @abstractmethod
    def finish(self) -> int:
        """Let the calling thread sleep until it is over; the bytes read, fewer than asked only at the end of the file. OSError if it
        failed. Work launched on any stream afterwards sees the bytes. Called once."""


class DirectFile(ABC):
    """A file open for reading. Any thread may call anything."""

    @abstractmethod
    def begin(self, offset: int, memory: torch.Tensor) -> Reading:
        """Begin to read from `offset` into contiguous uint8 `[bytes]` memory of the device; multiples of 4096 all three go the fast way.
        OSError if nothing was begun."""

    @abstractmethod
    def close(self) -> None:
        """Give the file back, once no read of it is on its way. Safe to call twice."""


class DirectReader(ABC):
    """Opens files for direct reads by one GPU. Holds nothing open itself."""

    name: str
    """Who reads, with its version: for `stats()` and `kvtier doctor`."""

    @abstractmethod
    def open(self, path: Path) -> DirectFile:
        """Open an existing file. OSError, saying why, if it cannot be read directly: never a file that is read some other way."""
