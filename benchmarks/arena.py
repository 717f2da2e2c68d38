"""How long it takes until a large host tier can be written to, how fast its memory is then, and what the tier adds to each page.

`arena.startup.KIND`: a whole start of the arena (reserve, lock, fill), GB/s, by the kind of pages it got: "none" (4 KiB), "transparent" or
"explicit" (2 MiB). "unlocked" is the default without locking. The ceiling is writing to as much memory that is already there, with as many
threads. `arena.startup.first-touch` is plain memory of 4 KiB pages, touched by one thread; `speedup` is the default beside that.
`arena.copy.KIND`: copying into the arena, beside copying between plain arrays. `host.store.page`, `host.load.page`: microseconds per small
page, beside those that its bytes take in one copy and checksum of all pages at once (loading copies nothing).

Every start comes right after the same memory was used and given back, so that in a virtual machine the host's own work for memory that
the guest never had is in no figure: it can multiply all of them, the first touch's too.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvtier.errors import KVTierError
from kvtier.formats import get_format
from kvtier.layout import PageLayout
from kvtier.memory.arena import Arena, Switch
from kvtier.memory.limits import available_memory
from kvtier.memory.region import HUGE_PAGE_BYTES
from kvtier.tiers.base import PageId
from kvtier.tiers.host import HostTier

from .measure import Row, Run, seconds, side_by_side

TINY_BYTES = 8 << 20
COPY_BYTES = 256 << 20
COPIES = 4
"""So many pieces of memory the copies go between: two plain arrays, two arenas."""
PAGE = PageLayout(layers=2, planes=2, page_tokens=8, kv_heads=2, head_dim=32, dtype="bf16")
_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


def measure(run: Run, size_bytes: int = 4 << 30, raise_pool: bool = False) -> list[Row]:
    """The rows. No part takes more than half of the memory that can be had, which bounds `size_bytes`. `raise_pool`: with explicit huge
    pages too, setting as many apart as needed, for as long as they are; KVTierError if that cannot be done."""
    most = available_memory().bytes // 2
    pool = int(raise_pool)  # pages set apart are there beside everything else
    size = TINY_BYTES if run.tiny else min(size_bytes, most // (1 + pool))
    run.expect(run.repeats + 2)
    rows = _startup(run, size, raise_pool)
    run.step("copying into it")
    rows += _copy(run, min(size, COPY_BYTES, most // (COPIES + pool)), raise_pool)
    run.step("storing and loading pages")
    return [Row("arena.size", size / 2**30, "GiB"), *rows, *_pages(run)]


def _startup(run: Run, size: int, raise_pool: bool) -> list[Row]:
    taken: dict[str, list[float]] = defaultdict(list)
    for turn in range(run.repeats):
        run.step(f"start {turn + 1} of {run.repeats}")
        taken["memset"].append(_memset(size))
        taken["first-touch"].append(_start(size, _first_touch)[0])
        took, kind = _start(size, _arena("off"))
        taken[kind].append(took)
        took, kind = _start(size, _arena("auto"))
        taken["default"].append(took)
        if kind != "none":
            taken[kind].append(took)
        taken["unlocked"].append(_start(size, _arena("auto", "off"))[0])
        if raise_pool:
            with _pool(size):
                taken["explicit"].append(_start(size, _arena("on"))[0])
    median = {name: statistics.median(samples) for name, samples in taken.items()}
    ceiling = size / median.pop("memset") / 1e9
    rows = [Row(f"arena.startup.{name}", size / took / 1e9, "GB/s", ceiling) for name, took in median.items()]
    rows.append(Row("arena.startup.seconds", median["default"], "s"))
    return [*rows, Row("arena.startup.speedup", median["first-touch"] / median["default"], "x")]


def _start(size: int, build: Callable[[int], Arena | mmap.mmap]) -> tuple[float, str]:
    """Seconds of one call of `build`, and the kind of pages it got, right after as much memory was in use. All of it is given back."""
    Arena(size, mlock="off").close()
    built: list[Arena | mmap.mmap] = []
    took = seconds(lambda: built.append(build(size)))
    memory = built.pop()
    with closing(memory):
        return took, _kind(memory) if isinstance(memory, Arena) else "none"


def _arena(huge_pages: Switch, mlock: Switch = "auto") -> Callable[[int], Arena]:
    return lambda size: Arena(size, huge_pages, mlock)


def _kind(arena: Arena) -> str:
    return str(arena.report()["huge_pages"])


def _first_touch(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    np.frombuffer(memory, dtype=np.uint8)[:: mmap.PAGESIZE] = 1
    return memory


def _memset(size: int) -> float:
    arena, threads = Arena(size, mlock="off"), len(os.sched_getaffinity(0))
    parts = np.array_split(arena.bytes, threads)
    with ThreadPoolExecutor(threads) as pool:
        return seconds(lambda: list(pool.map(lambda part: ctypes.memset(part.ctypes.data, 1, part.nbytes), parts)))


def _copy(run: Run, size: int, raise_pool: bool) -> list[Row]:
    arenas = [Arena(size, "off"), Arena(size, "auto")]
    source, plain = (np.ones(size, dtype=np.uint8) for _ in range(2))
    with _pool(size if raise_pool else 0):
        arenas += [Arena(size, "on")] if raise_pool else []
        targets = {_kind(arena): arena.bytes for arena in arenas}
        ceiling, *taken = side_by_side([_copying(target, source) for target in (plain, *targets.values())], run.repeats)
        for arena in arenas:
            arena.close()
    speed = {kind: size / took / 1e9 for kind, took in zip(targets, taken, strict=True)}
    return [Row(f"arena.copy.{kind}", value, "GB/s", size / ceiling / 1e9) for kind, value in speed.items()]


def _copying(target: NDArray[np.uint8], source: NDArray[np.uint8]) -> Callable[[], None]:
    return lambda: np.copyto(target, source)


def _pages(run: Run) -> list[Row]:
    count = 8 if run.tiny else 256
    tier = HostTier(PAGE, get_format("raw"), count * PAGE.page_bytes)
    pages = [PageId(number.to_bytes(32, "little"), bytes(32), number) for number in range(count)]
    keys = [page.key for page in pages]
    data = np.random.default_rng(0).integers(0, 256, (count, PAGE.page_bytes), dtype=np.uint8)
    payloads, target = list(data), np.empty_like(data)
    slots: list[int] = []
    works: dict[str, Callable[[], object]] = {
        "store": lambda: tier.store(slots, pages, payloads),
        "load": lambda: tier.load(slots, keys, target),
        "copy": lambda: np.copyto(target, data),
        "checksum": lambda: xxhash.xxh3_64_intdigest(data.data),
    }
    samples: dict[str, list[float]] = defaultdict(list)
    for _ in range(10 * run.repeats):
        slots[:] = tier.reserve(count) or []
        for name, work in works.items():
            samples[name].append(seconds(work))
        tier.free(slots)
    tier.close()
    each = {name: statistics.median(taken) / count * 1e6 for name, taken in samples.items()}
    return [
        Row("host.store.page", each["store"], "us", each["copy"] + each["checksum"]),
        Row("host.load.page", each["load"], "us", each["checksum"]),
    ]


@contextmanager
def _pool(size: int) -> Iterator[None]:
    """Enough free explicit huge pages for `size` bytes inside; the pool as it was afterwards."""
    pages, knob = -(-size // HUGE_PAGE_BYTES), _POOL / "nr_hugepages"
    if pages == 0:
        yield
        return
    try:
        before = int(knob.read_text())
        knob.write_text(str(before + pages))
    except OSError as error:
        raise KVTierError(f"the pool of huge pages cannot be raised: {knob}: {error.strerror}; become root, or leave it alone") from None
    try:
        yield
    finally:
        knob.write_text(str(before))
