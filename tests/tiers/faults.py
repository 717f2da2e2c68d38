"""File engines that fail on purpose, for the disk tests."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path
from random import Random

import numpy as np

from kvtier.io.files import BLOCK_BYTES, BufferedEngine, Bytes


class FaultyEngine(BufferedEngine):
    """Fails where told: writes after `write_budget` bytes with `write_errno`, the half written staying; syncs; punches."""

    name = "faulty"

    def __init__(self) -> None:
        self.write_budget: int | None = None
        self.write_errno = errno.ENOSPC
        self.sync_errno = 0
        self.punch_errno = 0
        self.writes = 0

    def pwrite(self, file: int, offset: int, data: Bytes) -> None:
        self.writes += 1
        if self.write_budget is not None and self.write_budget < data.nbytes:
            super().pwrite(file, offset, data[: self.write_budget])
            self.write_budget = 0
            raise OSError(self.write_errno, os.strerror(self.write_errno))
        if self.write_budget is not None:
            self.write_budget -= data.nbytes
        super().pwrite(file, offset, data)

    def punch(self, file: int, offset: int, length: int) -> bool:
        if self.punch_errno:
            raise OSError(self.punch_errno, os.strerror(self.punch_errno))
        return super().punch(file, offset, length)

    def sync(self, file: int) -> None:
        if self.sync_errno:
            raise OSError(self.sync_errno, os.strerror(self.sync_errno))
        super().sync(file)


class GatedEngine(BufferedEngine):
    """Writes and punches wait before the gate; `waiting` is set when one does."""

    name = "gated"

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Event()
        self.syncs = 0

    def pwrite(self, file: int, offset: int, data: Bytes) -> None:
        self._pass()
        super().pwrite(file, offset, data)

    def punch(self, file: int, offset: int, length: int) -> bool:
        self._pass()
        return super().punch(file, offset, length)

    def sync(self, file: int) -> None:
        self.syncs += 1
        super().sync(file)

    def _pass(self) -> None:
        if not self.gate.is_set():
            self.waiting.set()
            self.gate.wait()


class NoHolesEngine(BufferedEngine):
    """A file system that cannot punch holes."""

    name = "no holes"

    def can_punch(self, directory: Path) -> bool:
        return False

    def punch(self, file: int, offset: int, length: int) -> bool:
        self.pwrite(file, offset, np.zeros(min(length, BLOCK_BYTES), dtype=np.uint8))
        return False


class VolatileEngine(BufferedEngine):
    """A disk with a write cache that loses blocks in a power failure: each block not synced is old or new, by chance."""

    name = "volatile"

    def __init__(self) -> None:
        self.paths: dict[int, Path] = {}
        self.durable: dict[Path, bytes] = {}

    def open(self, path: Path) -> int:
        file = super().open(path)
        self.paths[file] = path
        self.durable.setdefault(path, path.read_bytes())
        return file

    def sync(self, file: int) -> None:
        self.durable[self.paths[file]] = self.paths[file].read_bytes()

    def cut_power(self, store: Path, image: Path, random: Random) -> None:
        """Write to `image` what could be found of `store` after a power failure now."""
        image.mkdir()
        shutil.copy(store / "store.json", image)
        for path, old in self.durable.items():
            new = path.read_bytes()
            size = random.choice([len(old), max(len(old), len(new))])
            with (image / path.name).open("wb") as file:
                for start in range(0, size, BLOCK_BYTES):
                    block = random.choice([old, new])[start : min(size, start + BLOCK_BYTES)]
                    if any(block):  # holes stay holes
                        file.seek(start)
                        file.write(block)
                file.truncate(size)
