"""Copies between a GPU and the host, in one piece and in pages, by the copy engines and by a kernel; part of `kvtier bench gpu`.

- `copy.d2h`, `copy.h2d`, `copy.both`, `copy.memory`: GB/s of one large copy to registered host memory, from it, of both at once, and of a
  copy inside the GPU's memory, counted as bytes read plus written. The ceilings of what follows.
- `pages.d2h`, `.h2d`, `.both`: pages of 64 KiB in random order, 256 a call, the way a lane copies them. `pages.d2h.copies`, `.kernel` and
  `pages.h2d.copies`, `.kernel`: by the copy engines, and by one kernel that reads and writes registered host memory.
- `crossover.d2h`, `.h2d`: KiB of a page up to which many pages go by the kernel, as a lane measured it (0: never), beside 64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from kvtier.cuda.registration import Registration
from kvtier.cuda.surface import Accelerator, Addresses, Stream
from kvtier.errors import KVTierError
from kvtier.memory.region import aligned_array
from kvtier.mover.crossover import COPIES, SIZES_BYTES, WAYS, Crossover
from kvtier.mover.lane import Lane

from .gpu_timing import Sizes, in_turns, seconds
from .measure import Row, Run

PAGE_BYTES, PAGES_A_CALL = 64 << 10, 256


def copies(run: Run, gpu: Accelerator, sizes: Sizes) -> list[Row]:
    size = sizes.copy_bytes
    host, device, other = aligned_array(2 * size), gpu.allocate(2 * size), gpu.allocate(size)
    registration = Registration(gpu, host.ctypes.data, host.nbytes, size)
    if registration.why:
        raise KVTierError(f"bench gpu: {host.nbytes} bytes of host memory cannot be registered: {registration.why}")
    host[:] = 1
    down, up = gpu.new_stream(), gpu.new_stream()
    pages = size // PAGE_BYTES
    random = np.random.default_rng(0)
    # Each half of both memories is one direction's, so that both may go at once.
    host_at = [host.ctypes.data + half * size for half in (0, 1)]
    device_at = [device.data_ptr() + half * size for half in (0, 1)]
    scattered = [[start + random.permutation(pages) * PAGE_BYTES for start in (host_at[half], device_at[half])] for half in (0, 1)]

    def one(address: int) -> Addresses:
        return np.array([address], np.int64)

    def large_down() -> None:
        down.copy(one(host_at[0]), one(device_at[0]), size)

    def large_up() -> None:
        up.copy(one(device_at[1]), one(host_at[1]), size)

    def paged(stream: Stream, targets: Addresses, sources: Addresses) -> None:
        for start in range(0, pages, PAGES_A_CALL):
            part = slice(start, start + PAGES_A_CALL)
            stream.copy(targets[part], sources[part], PAGE_BYTES)

    def by_kernel(stream: Stream, on_device: Addresses, on_host: Addresses, to_host: bool) -> None:
        for start in range(0, pages, PAGES_A_CALL):
            part = slice(start, start + PAGES_A_CALL)
            stream.copy_by_kernel(on_device[part], on_host[part], PAGE_BYTES, to_host)

    def both(*launches: Callable[[], None]) -> None:
        for launch in launches:
            launch()

    launches = {
        "d2h": {"copies": partial(paged, down, scattered[0][0], scattered[0][1])},
        "h2d": {"copies": partial(paged, up, scattered[1][1], scattered[1][0])},
    }
    if not gpu.why_no_kernel_copies():
        launches["d2h"]["kernel"] = partial(by_kernel, down, scattered[0][1], scattered[0][0], True)
        launches["h2d"]["kernel"] = partial(by_kernel, up, scattered[1][1], scattered[1][0], False)
    crossover = _crossover(gpu)
    taken = {way: "kernel" if crossover.by_kernel(way, PAGES_A_CALL, PAGE_BYTES) else "copies" for way in WAYS}
    stream_of = {"d2h": down, "h2d": up}
    took = in_turns(
        run,
        {
            "copy.d2h": lambda: seconds(large_down, down),
            "copy.h2d": lambda: seconds(large_up, up),
            **{
                f"pages.{way}.{how}": partial(seconds, launch, stream_of[way])
                for way, ways in launches.items()
                for how, launch in ways.items()
            },
            "copy.both": lambda: seconds(partial(both, large_down, large_up), down, up),
            "pages.both": lambda: seconds(partial(both, *(launches[way][taken[way]] for way in WAYS)), down, up),
            "copy.memory": lambda: seconds(lambda: down.run(lambda: other.copy_(device[:size])), down),
        },
    )
    registration.undo()
    took |= {f"pages.{way}": took[f"pages.{way}.{taken[way]}"] for way in WAYS}
    speed = {name: size * (2 if name.endswith(("both", "memory")) else 1) / seconds / 1e9 for name, seconds in took.items()}
    rows = [Row(name, value, "GB/s", _ceiling(name, speed)) for name, value in speed.items()]
    return rows + [Row(f"crossover.{way}", crossover.bytes_below(way, PAGES_A_CALL) / 1024, "KiB", PAGE_BYTES / 1024) for way in WAYS]


def _ceiling(name: str, speed: dict[str, float]) -> float | None:
    """That of one large copy the same way, for pages."""
    return speed[f"copy.{name.split('.')[1]}"] if name.startswith("pages.") else None


def _crossover(gpu: Accelerator) -> Crossover:
    lane = Lane(gpu, COPIES[-1], SIZES_BYTES[-1])
    try:
        return lane.measure()
    finally:
        lane.close()


def large_copy(run: Run, gpu: Accelerator, size: int) -> float:
    host, device, stream = aligned_array(size), gpu.allocate(size), gpu.new_stream()
    registration = Registration(gpu, host.ctypes.data, size, 4096)
    step = min(size, registration.chunk_bytes)
    starts = range(0, size - step + 1, step)

    def copy() -> None:
        for start in starts:
            stream.copy(np.array([device.data_ptr() + start]), np.array([host.ctypes.data + start]), step)

    took = in_turns(run, {"copy": lambda: seconds(copy, stream)})["copy"]
    registration.undo()
    return took * size / (len(starts) * step)
