"""Pages from disk to a GPU, through host memory and straight into the GPU's; part of `kvtier bench gpu`.

- `checksum.xxh3`: payloads digested on the GPU, bytes read, beside a copy inside its memory.
- `disk.restore`: pages of a Llama-3-8B in q8 by one worker, read into host memory, verified by the CPU, copied, decoded. GB/s of bytes on
  disk, beside plain reads of as many.
- `gds.read`: the same with `disk.io_engine: gds`: read into the GPU's memory, verified and decoded there. Left out, with the reason in the
  note, where that does not work.

What comes back is compared with what the CPU decodes before any figure counts.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from kvtier.cuda.surface import Accelerator
from kvtier.errors import DeviceError, KVTierError
from kvtier.formats import get_format
from kvtier.formats.checksums import why_no_checksums, xxh3_128
from kvtier.io.files import Request, page_aligned
from kvtier.io.pooled import DEPTH
from kvtier.io.probe import choose_engine
from kvtier.layout import PageLayout
from kvtier.mover.stage import carry
from kvtier.mover.staging import StagingPool
from kvtier.mover.transfer import Move, Priority, Transfer
from kvtier.tiers.base import PageId
from kvtier.tiers.disk import DiskTier
from kvtier.tiers.disk.direct import find_reader
from kvtier.tiers.disk.opening import DiskEngine
from kvtier.tiers.disk.record import HEADER_BYTES, record_bytes
from kvtier.tiers.gpu import GpuPool

from .measure import Row, Run

FORMAT = "q8"
_READ_BYTES = 1 << 20
_STAGING_BYTES = 64 << 20
_DIFFERENT_PAGES = 4


def why_skipped(gpu: Accelerator, directory: Path | None) -> str:
    """One line: why there is no `gds.read`; empty if there is."""
    try:
        find_reader(gpu, directory or Path(tempfile.gettempdir()), DEPTH)
    except DeviceError as error:
        return f"no gds.read: {error}"
    return ""


def measure(run: Run, gpu: Accelerator, layout: PageLayout, pages: int, memory_speed: float, directory: Path | None) -> list[Row]:
    """The rows, with files in `directory`. `memory_speed`: GB/s of a copy inside the GPU's memory."""
    rows = [] if why_no_checksums(gpu.device) else [_checksums(run, gpu, layout, pages, memory_speed)]
    engines: dict[str, DiskEngine] = {"disk.restore": "auto"}
    if not why_skipped(gpu, directory):
        engines["gds.read"] = "gds"
    samples: dict[str, list[float]] = {"plain": [], **{name: [] for name in engines}}
    with tempfile.TemporaryDirectory(dir=directory, prefix="kvtier-bench-gpu-") as folder:
        for repeat in range(run.repeats + 1):
            for name, engine in engines.items():
                with _store(gpu, Path(folder) / name, layout, pages, engine) as (pool, disk, staging, moves):
                    took = _restore(pool, disk, staging, moves)
                    if repeat == 0:
                        _check(pool, disk, pages)
                samples[name].append(took)
            samples["plain"].append(_plain_reads(Path(folder) / "disk.restore"))
    size = pages * record_bytes(get_format(FORMAT).payload_bytes(layout)) / 1e9
    speed = {name: size / statistics.median(taken[1:]) for name, taken in samples.items()}
    return [*rows, *(Row(name, speed[name], "GB/s", speed["plain"]) for name in engines)]


def _checksums(run: Run, gpu: Accelerator, layout: PageLayout, pages: int, memory_speed: float) -> Row:
    size, stream = get_format(FORMAT).payload_bytes(layout), gpu.new_stream()
    row_bytes = record_bytes(size)
    ranges = gpu.allocate(pages * row_bytes).view(pages, row_bytes)[:, HEADER_BYTES : HEADER_BYTES + size]
    digests = gpu.allocate(16 * pages).view(torch.int64).view(pages, 2)
    samples = []
    for _ in range(run.repeats + 1):
        start = time.perf_counter()
        stream.run(partial(xxh3_128, ranges, digests))
        stream.record().wait()
        samples.append(time.perf_counter() - start)
    return Row("checksum.xxh3", pages * size / statistics.median(samples[1:]) / 1e9, "GB/s", memory_speed)


@contextmanager
def _store(
    gpu: Accelerator, path: Path, layout: PageLayout, pages: int, engine: DiskEngine
) -> Iterator[tuple[GpuPool, DiskTier, StagingPool, tuple[Move, ...]]]:
    """A pool, a store of `pages` pages, one worker's memory, and the moves that bring all of them. The store is made when first opened."""
    format = get_format(FORMAT)
    capacity = pages * record_bytes(format.payload_bytes(layout))
    pool = GpuPool(layout, pages * layout.page_bytes, gpu)
    pool.reserve(pages)
    disk = DiskTier(path, layout, format, capacity, bytes(32), engine=engine, gpu=gpu)
    staging = StagingPool(1, min(_STAGING_BYTES, 4 * capacity), [pool, disk])
    try:
        found = {page.depth: slot for slot, page in disk.recover()} or _filled(disk, pages)
        yield pool, disk, staging, tuple(Move(depth, _page(depth), found[depth], depth) for depth in range(pages))
    finally:
        staging.close()
        disk.close()
        pool.close()


def _page(depth: int) -> PageId:
    return PageId(depth.to_bytes(32, "big"), bytes(32), depth)


def _payload_pages(layout: PageLayout) -> torch.Tensor:
    return torch.randn(_DIFFERENT_PAGES, *layout.shape, generator=torch.Generator().manual_seed(0)).to(layout.torch_dtype)


def _filled(disk: DiskTier, pages: int) -> dict[int, int]:
    slots = disk.reserve(pages) or []
    payloads = disk.format.encode(_payload_pages(disk.layout), disk.layout)
    chosen = [payloads[depth % _DIFFERENT_PAGES] for depth in range(pages)]
    if any(disk.store(slots, [_page(depth) for depth in range(pages)], chosen)):
        raise KVTierError("bench gpu: the disk does not take the pages")
    return dict(enumerate(slots))


def _restore(pool: GpuPool, disk: DiskTier, staging: StagingPool, moves: tuple[Move, ...]) -> float:
    transfer = Transfer(1, 0, moves, Priority.DEMAND, 0)
    start = time.perf_counter()
    carry(transfer, (pool, disk), staging)
    took = time.perf_counter() - start
    if transfer.refused or disk.counters["not proven directly"]:
        raise KVTierError(f"bench gpu: of {len(moves)} pages {len(transfer.refused)} are refused: {dict(disk.counters)}")
    return took


def _check(pool: GpuPool, disk: DiskTier, pages: int) -> None:
    format, some = disk.format, min(pages, _DIFFERENT_PAGES)
    expected = format.decode(format.encode(_payload_pages(disk.layout)[:some], disk.layout), disk.layout)
    if not torch.equal(pool.gather(range(some)), expected):
        raise KVTierError("bench gpu: pages that came from disk are not those that were written")


def _plain_reads(store: Path) -> float:
    """Seconds to read a store's files into host memory, past the page cache where that works, and do nothing with them."""
    engine = choose_engine(store).engine
    files = [engine.open(path) for path in sorted(store.glob("*.kvt"))]
    buffers = [page_aligned(-(-engine.size(file) // _READ_BYTES) * _READ_BYTES) for file in files]
    requests = [
        Request(file, start, buffer[start : start + _READ_BYTES])
        for file, buffer in zip(files, buffers, strict=True)
        for start in range(0, len(buffer), _READ_BYTES)
    ]
    start = time.perf_counter()
    for _, outcome in engine.read_each(requests):
        if isinstance(outcome, OSError):
            raise KVTierError(f"bench gpu: {store} cannot be read: {outcome.strerror}")
    took = time.perf_counter() - start
    for file in files:
        engine.close(file)
    engine.stop()
    return took
