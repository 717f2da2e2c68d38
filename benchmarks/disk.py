"""How fast the file engines read and write one large file at random places, beside fio with the same block size and depth.

`disk.read.256KiB.qd8`: GB/s of the engine a disk tier gets by default, 8 requests under way. `disk.ENGINE.read...`: the others, by name.
The ceiling is fio on the same file past the page cache (where that is refused, through it), taking turns with the engines, because disks
are noisy and virtual ones are throttled; without fio it is a bare pool: as many threads, each in a loop around one system call.
`disk.cpu.read...`: CPU microseconds per request of all threads, kernel included, beside those of the bare pool; lower is better.

Everything starts cold: what goes past the page cache does by itself, for the others it is dropped before. Their writes count the sync that
brings them to the disk.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal

import numpy as np

from kvtier.errors import ConfigError, KVTierError
from kvtier.io.files import Bytes, FileEngine, Request
from kvtier.io.probe import EngineName, choose_engine
from kvtier.memory.region import aligned_array

from . import fio
from .measure import Row, Run, free_bytes, scratch_folder

KiB, MiB = 1 << 10, 1 << 20
BLOCKS = (64 * KiB, 256 * KiB, MiB)
DEPTHS = (1, 8, 32)
LEAST_BYTES, MOST_BYTES = 8 * MiB, 256 * MiB
"""What one turn of one engine carries, at most MOST_OPERATIONS."""
MOST_OPERATIONS = 2048
TINY_BLOCKS, TINY_DEPTHS, TINY_BYTES = (64 * KiB,), (1, 4), 2 * MiB
SPARE_BYTES = 64 * MiB
_ENGINES: tuple[EngineName, ...] = ("direct", "buffered", "aiofiles")


@dataclass(frozen=True)
class Cell:
    """What is done in one line of the table."""

    operation: Literal["read", "write"]
    block_bytes: int
    depth: int

    @property
    def name(self) -> str:
        """As in the names of rows: read.256KiB.qd8."""
        size = f"{self.block_bytes // MiB}MiB" if self.block_bytes >= MiB else f"{self.block_bytes // KiB}KiB"
        return f"{self.operation}.{size}.qd{self.depth}"


@dataclass(frozen=True)
class Sample:
    """One turn of one contender."""

    bytes_per_s: float
    cpu_us: float


Contender = Callable[[Sequence[int]], Sample]
"""Carries the blocks at these offsets."""


def measure(run: Run, path: Path | None = None, size_bytes: int = 1 << 30) -> list[Row]:
    """The rows, for a file of `size_bytes` in the directory `path` (the system's temporary one), removed at the end.

    KVTierError if it does not fit on the file system, or fio is there but fails.
    """
    blocks, depths = (TINY_BLOCKS, TINY_DEPTHS) if run.tiny else (BLOCKS, DEPTHS)
    if size_bytes < BLOCKS[-1]:
        raise KVTierError(
            f"--size-bytes {size_bytes}: the file holds blocks of up to {BLOCKS[-1]} bytes; give at least that, better a gigabyte"
        )
    size = TINY_BYTES if run.tiny else size_bytes // BLOCKS[-1] * BLOCKS[-1]
    operations: tuple[Literal["read", "write"], ...] = ("read", "write")
    cells = [Cell(operation, block, depth) for operation in operations for block in blocks for depth in depths]
    run.expect(len(cells) + 1)
    with _scratch_file(run, path or Path(tempfile.gettempdir()), size) as (file, default):
        rows = [row for cell in cells for row in _measure_cell(run, cell, file, size, default)]
    return sorted(rows, key=lambda row: _ORDER[row.name.split(".")[1]])


def ceiling_note() -> str:
    """What the ceilings of this machine are, in words."""
    return "ceiling: fio" if fio.is_there() else "fio is not installed, so the ceiling is a bare pool of threads"


_ORDER = {"read": 0, "write": 0, "cpu": 1, "direct": 2, "buffered": 2, "aiofiles": 3}


@contextmanager
def _scratch_file(run: Run, directory: Path, size: int) -> Iterator[tuple[Path, EngineName]]:
    """A file of `size` random bytes whose blocks have all been written, and the engine that a disk tier would get there."""
    if not directory.is_dir():
        raise KVTierError(f"--path {directory} is not a directory; name the one to measure")
    free = free_bytes(directory)
    spare = 0 if run.tiny else SPARE_BYTES
    if size + spare > free:
        has = f"{directory} has {free} bytes free, of which {spare} are left to others" if spare else f"{directory} has {free} bytes free"
        raise KVTierError(f"--size-bytes {size}: {has}; lower it or name another directory with --path")
    with scratch_folder(directory) as folder:
        run.step("writing the file")
        engine = choose_engine(folder).engine
        path = folder / "blocks"
        file = engine.open(path)
        step = min(size, MiB)
        data = _random_bytes(step)
        for offset in range(0, size, step):
            engine.pwrite(file, offset, data[: min(step, size - offset)])
        engine.sync(file)
        engine.close(file)
        engine.stop()
        yield path, _default(engine)


def _default(engine: FileEngine) -> EngineName:
    return next(name for name in _ENGINES if name == engine.name)


def _measure_cell(run: Run, cell: Cell, path: Path, size: int, default: EngineName) -> list[Row]:
    run.step(cell.name)
    direct = default == "direct"
    with _opened(path, cell) as engines, _bare(path, cell, direct) as bare:
        contenders: dict[str, Contender] = {default: engines[default], "bare": bare}
        if fio.is_there():
            contenders["fio"] = lambda offsets: _fio(path, cell, size, len(offsets), direct)
        contenders |= engines
        turns: list[dict[str, Sample]] = []
        random, blocks, operations = np.random.default_rng(0), size // cell.block_bytes, _operations(cell, size)
        for _ in range(run.repeats):
            turn = {}
            for name in random.permutation(list(contenders)):  # so that none always has the burst another left over
                # Other blocks each time: what was just read may still be in memory on the other side of a virtual disk.
                turn[name] = contenders[name]((random.permutation(blocks)[:operations] * cell.block_bytes).tolist())
            turns.append(turn)
    speed = {name: statistics.median(turn[name].bytes_per_s for turn in turns) / 1e9 for name in contenders}
    cpu = {name: statistics.median(turn[name].cpu_us for turn in turns) for name in contenders}
    ceiling = speed["fio" if "fio" in speed else "bare"]
    others = [Row(f"disk.{name}.{cell.name}", speed[name], "GB/s", ceiling) for name in engines if name != default]
    return [
        Row(f"disk.{cell.name}", speed[default], "GB/s", ceiling),
        Row(f"disk.cpu.{cell.name}", cpu[default], "us", cpu["bare"]),
        *others,
    ]


def _operations(cell: Cell, size: int) -> int:
    """How many requests make one turn: a file's worth at most."""
    wanted = max(LEAST_BYTES, min(MOST_BYTES, MOST_OPERATIONS * cell.block_bytes))
    return min(wanted, size) // cell.block_bytes


@contextmanager
def _opened(path: Path, cell: Cell) -> Iterator[dict[str, Contender]]:
    """Every engine that works there, as a contender."""
    opened: list[tuple[FileEngine, int]] = []
    contenders: dict[str, Contender] = {}
    try:
        for name in _ENGINES:
            try:
                engine = choose_engine(path.parent, name, cell.depth).engine
            except ConfigError:  # refused there, so it has no row
                continue
            file = engine.open(path)
            opened.append((engine, file))
            contenders[name] = _carrier(engine, file, cell)
        yield contenders
    finally:
        for engine, file in opened:
            engine.close(file)
            engine.stop()


def _carrier(engine: FileEngine, file: int, cell: Cell) -> Contender:
    buffers = _buffers(cell)
    cached = engine.alignment_bytes == 1

    def carry(offsets: Sequence[int]) -> None:
        requests = [Request(file, offset, buffers[i % len(buffers)]) for i, offset in enumerate(offsets)]
        if cell.operation == "write":
            failures = [failure for failure in engine.write_all(requests) if failure is not None]
            if cached:
                engine.sync(file)
        else:
            failures = [got for _, got in engine.read_each(requests) if isinstance(got, OSError)]
        if failures:
            raise KVTierError(f"{engine.name} I/O failed: {failures[0].strerror}")

    def timed(offsets: Sequence[int]) -> Sample:
        if cached:
            os.fdatasync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        return _timed(lambda: carry(offsets), len(offsets), cell)

    return timed


@contextmanager
def _bare(path: Path, cell: Cell, direct: bool) -> Iterator[Contender]:
    """The least Python can do: each thread takes the next offset and makes one system call with memory of its own."""
    file = os.open(path, os.O_RDWR | (os.O_DIRECT if direct else 0))
    buffers = _buffers(cell)

    def carry(offsets: Sequence[int]) -> None:
        places, interrupted = count(), threading.Event()
        failures: list[str] = []

        def loop(buffer: memoryview) -> None:
            try:
                while (place := next(places)) < len(offsets) and not interrupted.is_set():
                    write = cell.operation == "write"
                    carried = os.pwrite(file, buffer, offsets[place]) if write else os.preadv(file, [buffer], offsets[place])
                    if carried != cell.block_bytes:
                        failures.append(f"{carried} of {cell.block_bytes} bytes were carried")
            except OSError as error:
                failures.append(error.strerror or str(error))

        threads = [threading.Thread(target=loop, args=(buffer.data,)) for buffer in buffers[: cell.depth]]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            interrupted.set()
            for thread in threads:  # they use the file
                if thread.ident is not None:
                    thread.join()
        if failures:
            raise KVTierError(f"plain I/O failed: {failures[0]}; the disk is full or failing")

    try:
        yield lambda offsets: _timed(lambda: carry(offsets), len(offsets), cell)
    finally:
        os.close(file)


def _timed(work: Callable[[], object], operations: int, cell: Cell) -> Sample:
    cpu, start = time.process_time(), time.perf_counter()
    work()
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    return Sample(operations * cell.block_bytes / seconds, cpu_s / operations * 1e6)


def _fio(path: Path, cell: Cell, size: int, operations: int, direct: bool) -> Sample:
    """One turn of fio on the same file. KVTierError if it fails."""
    io_bytes = operations * cell.block_bytes
    job = fio.run(fio.Work(path, cell.operation, cell.block_bytes, cell.depth, size, io_bytes, direct))
    busy_s = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1e3
    return Sample(float(job[cell.operation]["bw_bytes"]), busy_s / operations * 1e6)


def _buffers(cell: Cell) -> list[Bytes]:
    """A few more than are in use at once."""
    amount = 2 * cell.depth
    memory = _random_bytes(amount * cell.block_bytes)
    return [memory[i * cell.block_bytes : (i + 1) * cell.block_bytes] for i in range(amount)]


def _random_bytes(size: int) -> Bytes:
    """In memory as the mover's: a disk reaches huge pages faster (`fio.py`)."""
    memory = aligned_array(size)
    memory[:] = np.frombuffer(np.random.default_rng(0).bytes(size), np.uint8)
    return memory
