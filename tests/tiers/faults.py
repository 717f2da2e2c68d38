"""File engines that fail on purpose, for the disk tests."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path
from random import Random

import numpy as np

from kvtier.io.buffered import BufferedEngine
from kvtier.io.files import BLOCK_BYTES, Bytes


class FaultyEngine(BufferedEngine):
    """Fails where told: writes once `write_budget` bytes of blocks never written before are used up, with `write_errno`, the part that
    fits staying; syncs; punches."""

    name = "faulty"
    native = False

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.write_budget: int | None = None
        self.write_errno = errno.ENOSPC
        self.sync_errno = 0
        self.punch_errno = 0
        self.writes = 0
        self._paid: dict[tuple[int, int], int] = {}
        self._one_at_a_time = threading.Lock()

    def _pwrite(self, file: int, offset: int, data: Bytes) -> None:
        with self._one_at_a_time:
            self.writes += 1
            fits = self._pay(file, offset, data.nbytes)
            super()._pwrite(file, offset, data[:fits])
            if fits < data.nbytes:
                raise OSError(self.write_errno, os.strerror(self.write_errno))

    def _pay(self, file: int, offset: int, length: int) -> int:
        """How many of the bytes the disk has room for; what was written before has its room."""
        if self.write_budget is None:
            return length
        for block in range(offset, offset + length, BLOCK_BYTES):
            wanted = min(BLOCK_BYTES, offset + length - block)
            paid = min(wanted - self._paid.get((file, block), 0), self.write_budget)
            self.write_budget -= paid
            self._paid[file, block] = self._paid.get((file, block), 0) + paid
            if self._paid[file, block] < wanted:
                return block - offset + self._paid[file, block]
        return length

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
    native = False

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Event()
        self.syncs = 0

    def _pwrite(self, file: int, offset: int, data: Bytes) -> None:
        self._pass()
        super()._pwrite(file, offset, data)

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


class StuckEngine(GatedEngine):
    """Reads wait before the gate, too."""

    name = "stuck"

    def _pread(self, file: int, offset: int, buffer: Bytes) -> int:
        self._pass()
        return super()._pread(file, offset, buffer)


class NoHolesEngine(BufferedEngine):
    """A file system that cannot punch holes."""

    name = "no holes"
    native = False

    def can_punch(self, directory: Path) -> bool:
        return False

    def punch(self, file: int, offset: int, length: int) -> bool:
        self.pwrite(file, offset, np.zeros(min(length, BLOCK_BYTES), dtype=np.uint8))
        return False


class VolatileEngine(BufferedEngine):
    """A disk with a write cache that loses blocks in a power failure: each block not synced is old or new, by chance."""

    name = "volatile"
    native = False

    def __init__(self) -> None:
        super().__init__(depth=2)
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
