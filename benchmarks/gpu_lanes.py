"""Pages by a mover's lane, with the formats' kernels, to the host and back; part of `kvtier bench gpu`.

- `FORMAT.offload`, `.restore`: pages of a Llama-3-8B: encode, copy; copy, decode. GB/s of bf16 bytes, beside raw pages.
- `FORMAT.encode`, `.decode`: the kernels alone, bytes read plus written, beside `copy.memory`.
- `launch.256`: microseconds of the host's time until a restore of 256 pages is launched, beside 100; less is better.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from kvtier.cuda.surface import Accelerator
from kvtier.errors import KVTierError
from kvtier.formats import BlockFormat, get_format
from kvtier.formats.base import Payload
from kvtier.formats.on_device import decode_pages, encode_pages
from kvtier.layout import PageLayout
from kvtier.mover.staging import StagingPool
from kvtier.mover.transfer import Move
from kvtier.tiers.gpu import GpuPool
from kvtier.tiers.host import HostTier

from .gpu_check import moves_of, tiers_of
from .gpu_copies import PAGES_A_CALL
from .gpu_timing import Sizes, in_turns, seconds
from .measure import Row, Run

FORMATS = ("q8", "q4", "fp8")
LAUNCH_US = 100.0


def lanes(run: Run, gpu: Accelerator, sizes: Sizes, memory_speed: float) -> list[Row]:
    layout, count = sizes.layout, sizes.pages
    page_bytes = count * layout.page_bytes
    rows = []
    for name in FORMATS:
        run.step(f"offload and restore as {name}")
        with tiers_of(gpu, layout, "raw", count) as raw, tiers_of(gpu, layout, name, count) as coded:
            works = {}
            for what, tiers in (("raw", raw), (name, coded)):
                works[f"{what}.offload"], works[f"{what}.restore"] = both_ways(*tiers, count)
            pool, _, _ = coded
            form, stream = get_format(name), gpu.new_stream()
            if not isinstance(form, BlockFormat):
                raise KVTierError(f"bench gpu: {name} is not made of blocks")
            payload_bytes = form.payload_bytes(layout)
            room = gpu.allocate(count * payload_bytes).view(count, payload_bytes)
            slots = list(range(count))
            encode = partial(encode_pages, form, pool.paged, slots, room)
            decode = partial(decode_pages, form, room, pool.paged, slots)
            works["encode"] = partial(seconds, partial(stream.run, encode), stream)
            works["decode"] = partial(seconds, partial(stream.run, decode), stream)
            took = in_turns(run, works)
        for way in ("offload", "restore"):
            rows.append(Row(f"{name}.{way}", page_bytes / took[f"{name}.{way}"] / 1e9, "GB/s", page_bytes / took[f"raw.{way}"] / 1e9))
        for way in ("encode", "decode"):
            rows.append(Row(f"{name}.{way}", (page_bytes + count * payload_bytes) / took[way] / 1e9, "GB/s", memory_speed))
    return rows


def both_ways(pool: GpuPool, host: HostTier, staging: StagingPool, count: int) -> tuple[Callable[[], float], Callable[[], float]]:
    """Seconds of an offload and of a restore of `count` pages by a lane; checksums, which workers take beside it, are not in it."""
    numbers = torch.randn(count, *pool.layout.shape, generator=torch.Generator().manual_seed(0)).to(pool.layout.torch_dtype)
    pool.scatter(list(range(count)), numbers)
    moves, form = moves_of(count), staging.lane_formats[host.name]
    with staging.borrow() as scratch:
        lane = scratch.lane
    if lane is None:
        raise KVTierError("bench gpu: the pool is not on a GPU")

    def offload() -> float:
        return seconds(lambda: lane.offload(pool, host, form, moves, []))

    host.store([move.target_slot for move in moves], [move.page for move in moves], lane.offload(pool, host, form, moves, []))
    arrived = _verified(host, moves)
    return offload, lambda: seconds(lambda: lane.restore(host, pool, form, moves, arrived, None))


def _verified(host: HostTier, moves: Sequence[Move]) -> list[tuple[int, Payload]]:
    """The payloads of these moves, with their places among them."""
    stored = host.load([move.source_slot for move in moves], [move.page.key for move in moves], np.empty((len(moves), 0), np.uint8))
    return [(index, payload) for index, payload in enumerate(stored) if isinstance(payload, np.ndarray)]


def launch(run: Run, gpu: Accelerator) -> Row:
    layout = PageLayout(layers=1, planes=2, page_tokens=16, kv_heads=8, head_dim=128, dtype="bf16")
    samples = []
    with tiers_of(gpu, layout, "raw", PAGES_A_CALL) as (pool, host, staging):
        both_ways(pool, host, staging, PAGES_A_CALL)
        moves = moves_of(PAGES_A_CALL)
        arrived = _verified(host, moves)
        with staging.borrow() as scratch:
            lane = scratch.lane
        for _ in range(10 + 10 * run.repeats):
            ends: list[float] = []
            start = time.perf_counter()
            if lane is not None:
                lane.restore(
                    host, pool, staging.lane_formats[host.name], moves, arrived, lambda *_, ends=ends: ends.append(time.perf_counter())
                )
            samples.append(ends[-1] - start)
    return Row("launch.256", statistics.median(samples[10:]) * 1e6, "us", LAUNCH_US)
