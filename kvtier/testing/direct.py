"""A stand-in for direct reads into a GPU's memory that reads as late as it may: when somebody waits, and not before.

From when a read begins, its memory holds 0xDD: whoever still needs what was there, or looks before the read is over, finds that. Reads that
nobody finishes can be counted. Thread-safe.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kvtier.cuda.direct import DirectFile, DirectReader, Reading

UNREAD = 0xDD
ALIGNMENT = 4096


@dataclass(eq=False)
class LateReading(Reading):
    """A read that happens when it is waited for."""

    reader: LateReader
    descriptor: int
    offset: int
    memory: torch.Tensor

    def finish(self) -> int:
        with self.reader.lock:
            self.reader.under_way -= 1
            failure = self.reader.failures.pop(0) if self.reader.failures else None
        if failure is not None:
            raise failure
        return os.preadv(self.descriptor, [self.memory.numpy().data], self.offset)


class LateFile(DirectFile):
    """A file of the stand-in's."""

    def __init__(self, reader: LateReader, path: Path) -> None:
        self._reader = reader
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def begin(self, offset: int, memory: torch.Tensor) -> Reading:
        assert memory.dtype == torch.uint8, "memory to read into is bytes"
        assert memory.is_contiguous(), "memory to read into is one piece"
        places = (offset, memory.data_ptr(), memory.numel())
        assert not any(place % ALIGNMENT for place in places), f"a read is at {places}, not at multiples of {ALIGNMENT}"
        memory.fill_(UNREAD)
        with self._reader.lock:
            self._reader.under_way += 1
            self._reader.begun += 1
        return LateReading(self._reader, self._descriptor, offset, memory)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            with self._reader.lock:
                self._reader.open_files -= 1


@dataclass(eq=False)
class LateReader(DirectReader):
    """`missing`: why there is no such reader, if it is to be missing. `failures`: what the next reads that are finished fail with. `depth`:
    as it was asked for."""

    missing: str = ""
    failures: list[OSError | None] = field(default_factory=list)
    depth: int = 0
    begun: int = 0
    under_way: int = 0
    open_files: int = 0

    def __post_init__(self) -> None:
        self.name = "a stand-in"
        self.lock = threading.Lock()

    def open(self, path: Path) -> DirectFile:
        file = LateFile(self, path)
        with self.lock:
            self.open_files += 1
        return file
