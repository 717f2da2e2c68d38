"""What the programs about a whole cache share: layouts, sequences, a cache of a chosen size, and plain ways to carry as many bytes.

A cache of `open_cache` moves only what the program asks for, unless its options say otherwise: nothing is copied down ahead. The plain ways
are the ceilings: one thread's copy between the same memories, and a bare pool of threads (or fio) on a file beside the store. Both go
through far more memory, or file, than one turn takes, so that neither finds its bytes in a cache.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kvtier.cache import TieredKVCache
from kvtier.config import load_config
from kvtier.errors import KVTierError
from kvtier.formats import get_format
from kvtier.io.files import BLOCK_BYTES
from kvtier.io.pooled import DEPTH
from kvtier.io.probe import choose_engine
from kvtier.layout import PageLayout
from kvtier.memory.region import aligned_array

from . import fio
from .codecs import LAYOUTS
from .measure import free_bytes, scratch_folder

TINY_LAYOUT = PageLayout(layers=2, planes=2, page_tokens=16, kv_heads=2, head_dim=64, dtype="bf16")
DISK_FORMAT = "q4"
LEAST_CYCLE_BYTES = 256 << 20
"""What a plain copy walks through before it comes back to the same bytes."""
_SLOT_OVERHEAD_BYTES = 8192
_TIER_OVERHEAD_BYTES = 1 << 20
_STORE_OVERHEAD_BYTES = 64 << 10
"""The lock, the description and the next one, and what the file system notes of them."""
Ids = NDArray[np.int64]


def layout_named(name: str, tiny: bool) -> PageLayout:
    """A layout of LAYOUTS, or for tiny runs a very small one. KVTierError for an unknown name."""
    if name not in LAYOUTS:
        raise KVTierError(f"--layout {name}: unknown; choose one of {', '.join(LAYOUTS)}")
    return TINY_LAYOUT if tiny else LAYOUTS[name]


def device() -> torch.device:
    """Where a cache's device tier is by default, and so where an engine's KV is."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def made_kv(layout: PageLayout, tokens: int) -> torch.Tensor:
    """KV as an engine gives it, `[layers, planes, tokens, kv_heads, head_dim]` of normal numbers, the same every time."""
    shape = (layout.layers, layout.planes, tokens, layout.kv_heads, layout.head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(layout.torch_dtype).to(device())


def token_ids(sequence: int, tokens: int) -> Ids:
    """The tokens of sequence number `sequence`: the same every time, no page of it in any other sequence."""
    return np.random.default_rng(sequence).integers(0, 1 << 40, tokens)


@dataclass(frozen=True)
class Room:
    """How many pages each tier holds; 0: there is no such tier. And the format of those on disk."""

    device: int
    host: int = 0
    disk: int = 0
    disk_format: str = DISK_FORMAT


def store_bytes(layout: PageLayout, pages: int, form: str = DISK_FORMAT) -> int:
    """What the files of a disk tier for `pages` pages in this format take at most; no other file with as many encoded pages takes more."""
    return _capacity_bytes(layout, form, pages) + _STORE_OVERHEAD_BYTES if pages else 0


def check_room(path: Path | None, needed_bytes: int) -> None:
    """KVTierError unless `path` (the system's temporary directory) has room for `needed_bytes`, before anything is written there."""
    folder = path or Path(tempfile.gettempdir())
    free = free_bytes(folder)
    if needed_bytes > free:
        raise KVTierError(f"--path {folder}: {free} bytes are free there, but up to {needed_bytes} are needed; name another directory")


def _capacity_bytes(layout: PageLayout, form: str, pages: int) -> int:
    return pages * (get_format(form).payload_bytes(layout) + _SLOT_OVERHEAD_BYTES) + _TIER_OVERHEAD_BYTES


@contextmanager
def open_cache(layout: PageLayout, room: Room, path: Path | None = None, **options: object) -> Iterator[TieredKVCache]:
    """A cache in the default formats, or that of `room`, closed at the end; its disk store is a directory of its own in `path`, gone
    afterwards.

    `options`: configuration keys with `__` for the dot, over those of a cache that moves nothing by itself. KVTierError if the directory
    has no room for the store.
    """
    check_room(path, store_bytes(layout, room.disk, room.disk_format))
    with scratch_folder(path) as folder:
        changes: dict[str, object] = {
            "model.name": "bench",
            "pages.page_tokens": layout.page_tokens,
            "device.capacity_bytes": room.device * layout.page_bytes,
            "mover.clean_pressure": 1.0,
            "mover.queue_bytes": 1 << 40,
            "policy.cleanup_interval": 86400.0,
        }
        for name, pages, form in (("host", room.host, "q8"), ("disk", room.disk, room.disk_format)):
            if not pages:
                changes[name] = None
                continue
            changes |= {f"{name}.format": form, f"{name}.capacity_bytes": _capacity_bytes(layout, form, pages)}
        if room.disk:
            changes["disk.path"] = f"{folder}/store"
        changes |= {key.replace("__", "."): value for key, value in options.items()}
        cache = TieredKVCache(load_config(None, overrides=changes), layout)
        try:
            yield cache
        finally:
            cache.close(flush=False)


def restore(cache: TieredKVCache, ids: Ids) -> None:
    """Bring a sequence to the device and let it go. KVTierError if it does not come back whole: then no figure would mean anything."""
    with cache.acquire(cache.lookup(ids)) as lease:
        lease.wait()
        if lease.tokens != len(ids):
            raise KVTierError(f"only {lease.tokens} of {len(ids)} tokens came back; look for refusals in `kvtier doctor` and the log")


def link_bytes(cache: TieredKVCache, link: str) -> int:
    """Encoded bytes that crossed `link` ("device->host") so far."""
    crossed = cache.stats()["links"].get(link)
    return 0 if crossed is None else int(crossed["bytes"])


def forget_files(cache: TieredKVCache) -> None:
    """Drop the system's memory of the store's files, in case the engine reads through it."""
    if cache.config.disk is not None:
        for segment in Path(cache.config.disk.path).glob("segment-*"):
            _forget(segment)


class PlainCopy:
    """Copies between the memories at the ends of a link, by one thread, or by the GPU from and to pinned memory."""

    @staticmethod
    def memory_bytes(most_bytes: int) -> int:
        """What one for at most `most_bytes` at once takes, both ends together."""
        return 2 * max(LEAST_CYCLE_BYTES, 2 * most_bytes)

    def __init__(self, most_bytes: int, source: str, target: str) -> None:
        self._size = self.memory_bytes(most_bytes) // 2
        self._at = 0
        self._source, self._target = (_memory(self._size, end) for end in (source, target))

    def __call__(self, size_bytes: int) -> None:
        """Copy the next `size_bytes`."""
        start = self._at if self._at + size_bytes <= self._size else 0
        self._at = start + size_bytes
        source, target = self._source[start : self._at], self._target[start : self._at]
        if source.is_cuda or target.is_cuda:
            target.copy_(source)
            torch.cuda.synchronize()
        else:
            np.copyto(target.numpy(), source.numpy())


class PlainFile:
    """A file of `blocks` blocks in `folder`, past the page cache where that works, carried by `DEPTH` threads that each loop around one
    system call: what the disk itself gives Python."""

    def __init__(self, folder: Path, block_bytes: int, blocks: int) -> None:
        engine = choose_engine(folder).engine
        self.direct = engine.name == "direct"
        engine.stop()
        self.block_bytes = -(-block_bytes // BLOCK_BYTES) * BLOCK_BYTES
        self.path = folder / "plain"
        self._blocks = blocks
        self._at = 0
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | (os.O_DIRECT if self.direct else 0))
        # As the mover's scratch memory: a disk reaches huge pages faster (`fio.py`).
        self._buffers = list(aligned_array(DEPTH * self.block_bytes).reshape(DEPTH, self.block_bytes))
        random = np.random.default_rng(0)
        for buffer in self._buffers:
            buffer[:] = np.frombuffer(random.bytes(self.block_bytes), np.uint8)
        self._pool = ThreadPoolExecutor(DEPTH)
        self.write(blocks)
        os.fsync(self._file)

    def read(self, blocks: int) -> None:
        """The next `blocks` blocks."""
        self._carry(lambda buffer, offset: os.preadv(self._file, [buffer], offset), blocks)

    def write(self, blocks: int) -> None:
        """The next `blocks` blocks."""
        self._carry(lambda buffer, offset: os.pwrite(self._file, buffer, offset), blocks)

    def forget(self) -> None:
        """Drop the system's memory of it, if it went through that."""
        if not self.direct:
            _forget(self.path)

    def fio_read(self) -> float | None:
        """Bytes per second of fio reading the whole file once, in blocks as large at the same depth; None without fio.

        KVTierError if fio is there but fails.
        """
        if not fio.is_there():
            return None
        size = self._blocks * self.block_bytes
        return float(fio.run(fio.Work(self.path, "read", self.block_bytes, DEPTH, size, size, self.direct))["read"]["bw_bytes"])

    def close(self) -> None:
        """Remove it."""
        self._pool.shutdown()
        os.close(self._file)
        self.path.unlink()

    def _carry(self, call: Callable[[memoryview, int], int], blocks: int) -> None:
        first, places = self._at, count()
        self._at = (first + blocks) % self._blocks

        def loop(buffer: memoryview) -> None:
            while (place := next(places)) < blocks:
                carried = call(buffer, (first + place) % self._blocks * self.block_bytes)
                if carried != self.block_bytes:
                    raise KVTierError(f"{self.path}: {carried} of {self.block_bytes} bytes were carried; the disk is full or failing")

        for done in [self._pool.submit(loop, buffer.data) for buffer in self._buffers[:blocks]]:
            done.result()


@contextmanager
def plain_file(path: Path | None, block_bytes: int, blocks: int) -> Iterator[PlainFile]:
    """A PlainFile in a directory of its own in `path` (the system's temporary one), gone afterwards."""
    with scratch_folder(path) as folder:
        file = PlainFile(folder, block_bytes, blocks)
        try:
            yield file
        finally:
            file.close()


def timed(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _memory(size_bytes: int, place: str) -> torch.Tensor:
    """Touched memory of a tier."""
    gpu = torch.cuda.is_available()
    memory = torch.ones(size_bytes, dtype=torch.uint8, pin_memory=gpu and place != "device")
    return memory.cuda() if gpu and place == "device" else memory


def _forget(path: Path) -> None:
    file = os.open(path, os.O_RDWR)
    try:
        os.fdatasync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)
