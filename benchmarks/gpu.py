"""What a GPU's link to the host gives kvtier, beside plain copies in the same run. Needs CUDA; first checks every format (`gpu_check.py`).

- `copy.d2h`, `copy.h2d`, `copy.both`, `copy.memory`: GB/s of one large copy to registered host memory, from it, of both at once, and of a
  copy inside the GPU's memory, counted as bytes read plus written. The ceilings of what follows.
- `pages.d2h`, `.h2d`, `.both`: pages of 64 KiB in random order, 256 a call, the way a lane copies them. `pages.d2h.copies`, `.kernel` and
  `pages.h2d.copies`, `.kernel`: by the copy engines, and by one kernel that reads and writes registered host memory.
- `crossover.d2h`, `.h2d`: KiB of a page up to which many pages go by the kernel, as a lane measured it (0: never), beside 64.
- `FORMAT.offload`, `.restore`: pages of a Llama-3-8B by a mover's lane: encode, copy; copy, decode. GB/s of bf16 bytes, beside raw pages.
- `FORMAT.encode`, `.decode`: the kernels alone, bytes read plus written, beside `copy.memory`.
- `launch.256`: microseconds of the host's time until a restore of 256 pages is launched, beside 100; less is better.
- `prefix.restore`: milliseconds to bring a prefix (32,768 tokens) from the host in the default format, beside one large copy of its bytes.
- `prefix.exposed`: what of that an engine waits for that reads layer by layer and computes about as long, beside all of it; less is better.
- `decode.step`: microseconds of a decode step (matrices and attention) while pages are offloaded, beside the same alone; less is better.
- `sparse24.matmul`: microseconds of a prefix's values times the attention of 64 queries, one KV head, with two of every four values kept
  and torch's semi-structured product, beside the dense one; less is better. Tensor cores skip what is zero along the dimension that is
  summed over, here tokens; the format `sparse24` keeps two of four along head_dim, so pages would have to be pruned the other way for this.
- `digest.encode`, `digest.score`: microseconds for the digests of a lane's pages, and for scoring a prefix by those of one layer, beside
  torch's operations; less is better.
- `checksum.xxh3`, `disk.restore`, `gds.read`: pages that come from disk, see `gpu_direct.py`.

`FLOORS` is what the ratios ought to be. Ceilings take turns with what they are compared to.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from kvtier.attention import digest, on_device
from kvtier.attention.digest import DigestLayout
from kvtier.cuda.find import find_accelerator
from kvtier.cuda.registration import Registration
from kvtier.cuda.surface import Accelerator, Addresses, Stream
from kvtier.errors import ConfigError, KVTierError
from kvtier.formats import BlockFormat, get_format
from kvtier.formats.base import Payload
from kvtier.formats.blocks import BlockShape
from kvtier.formats.on_device import decode_pages, encode_pages
from kvtier.formats.sparse24 import Sparse24
from kvtier.layout import PageLayout
from kvtier.memory.region import aligned_array
from kvtier.mover.crossover import COPIES, SIZES_BYTES, WAYS, Crossover
from kvtier.mover.lane import Lane
from kvtier.mover.stage import StagingPool
from kvtier.mover.transfer import Move
from kvtier.tiers.gpu import GpuPool
from kvtier.tiers.host import HostTier

from . import gpu_direct
from .gpu_check import check as check_formats
from .gpu_check import moves_of, tiers_of
from .measure import Row, Run
from .rig import Room, made_kv, open_cache, token_ids

PAGE_BYTES, PAGES_A_CALL, LAUNCH_US, QUERIES = 64 << 10, 256, 100.0, 64
LLAMA = PageLayout(layers=32, planes=2, page_tokens=16, kv_heads=8, head_dim=128, dtype="bf16")
SMALL = PageLayout(layers=4, planes=2, page_tokens=16, kv_heads=2, head_dim=32, dtype="bf16")
FORMATS = ("q8", "q4", "fp8")
FLOORS = {
    "pages.d2h": 0.9,
    "pages.h2d": 0.9,
    "pages.both": 0.8,
    "q8.offload": 1.6,
    "q8.restore": 1.6,
    "q4.offload": 2.4,
    "q4.restore": 2.4,
    "q8.encode": 0.6,
    "q4.encode": 0.6,
    "fp8.encode": 0.6,
}
"""The least that a ratio ought to be."""
CEILINGS = {"launch.256": 1.0, "prefix.exposed": 0.1, "decode.step": 1.03}
"""The most that a ratio ought to be."""


@dataclass(frozen=True)
class Sizes:
    """How much is moved: bytes of a large copy, pages of a lane, tokens of the prefix, width of the matrices, steps of the decode loop."""

    copy_bytes: int
    pages: int
    prefix_tokens: int
    width: int
    steps: int
    layout: PageLayout


FULL = Sizes(1 << 30, 128, 32768, 4096, 50, LLAMA)
TINY = Sizes(4 << 20, 4, 256, 64, 2, SMALL)


def measure(run: Run, accelerator: Accelerator | None = None, check: bool = True, directory: Path | None = None) -> list[Row]:
    """The rows, on `accelerator` (the current CUDA device), with files in `directory` (the system's temporary one).

    KVTierError without a GPU, or if its memory is too small, a format wrong or the disk unusable.
    """
    gpu = accelerator or find_gpu()
    sizes = TINY if run.tiny else FULL
    run.expect(8 + len(FORMATS))
    if check:
        run.step("checking every format")
        check_formats(gpu)
    run.step("plain copies and scattered pages")
    rows = _copies(run, gpu, sizes)
    memory_speed = {row.name: row.value for row in rows}["copy.memory"]
    rows += _lanes(run, gpu, sizes, memory_speed)
    run.step("pages from disk")
    rows += gpu_direct.measure(run, gpu, sizes.layout, sizes.pages, memory_speed, directory)
    run.step("launching 256 pages")
    rows.append(_launch(run, gpu))
    run.step("a long prefix, layer by layer")
    rows += _prefix(run, gpu, sizes)
    run.step("decoding beside an offload")
    rows.append(_decode(run, gpu, sizes))
    run.step("digests of keys")
    rows += _digests(run, gpu, sizes)
    run.step("values of which half are zero")
    rows.append(_sparse_product(run, gpu, sizes))
    return rows


def find_gpu() -> Accelerator:
    """The current CUDA device. KVTierError, in one line, if there is none or it cannot be used."""
    try:
        gpu = find_accelerator("cuda")
    except ConfigError as error:
        raise KVTierError(f"bench gpu needs an NVIDIA GPU: {error}") from None
    if gpu is None:
        raise KVTierError("bench gpu needs an NVIDIA GPU, and torch sees none here")
    return gpu


def note(directory: Path | None = None) -> str:
    """What is to be seen in the table, in words, and what is not."""
    least = ", ".join(f"{name} {floor:.0%}" for name, floor in FLOORS.items())
    most = ", ".join(f"{name} {limit:.0%}" for name, limit in CEILINGS.items())
    skipped = gpu_direct.why_skipped(find_gpu(), directory)
    return f"ratios to reach: {least}; not to exceed: {most}{skipped and '; '}{skipped}"


def verdict(rows: list[Row]) -> str:
    """Which floors are not met, in words."""
    missed = [row.name for row in rows if row.ratio is not None and row.ratio < FLOORS.get(row.name, 0.0)]
    missed += [row.name for row in rows if row.ratio is not None and row.ratio > CEILINGS.get(row.name, float("inf"))]
    return f"floors not met: {', '.join(missed)}" if missed else "all floors met"


def _seconds(launch: Callable[[], object], *streams: Stream) -> float:
    """From the first launch until all of it is done."""
    start = time.perf_counter()
    launch()
    for stream in streams:
        stream.record().wait()
    return time.perf_counter() - start


def _in_turns(run: Run, works: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Median seconds of each, called in turn, after one call each to warm up."""
    for work in works.values():
        work()
    samples = [[work() for work in works.values()] for _ in range(run.repeats)]
    return dict(zip(works, map(statistics.median, zip(*samples, strict=True)), strict=True))


def _copies(run: Run, gpu: Accelerator, sizes: Sizes) -> list[Row]:
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
    took = _in_turns(
        run,
        {
            "copy.d2h": lambda: _seconds(large_down, down),
            "copy.h2d": lambda: _seconds(large_up, up),
            **{
                f"pages.{way}.{how}": partial(_seconds, launch, stream_of[way])
                for way, ways in launches.items()
                for how, launch in ways.items()
            },
            "copy.both": lambda: _seconds(partial(both, large_down, large_up), down, up),
            "pages.both": lambda: _seconds(partial(both, *(launches[way][taken[way]] for way in WAYS)), down, up),
            "copy.memory": lambda: _seconds(lambda: down.run(lambda: other.copy_(device[:size])), down),
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


def _lanes(run: Run, gpu: Accelerator, sizes: Sizes, memory_speed: float) -> list[Row]:
    layout, count = sizes.layout, sizes.pages
    page_bytes = count * layout.page_bytes
    rows = []
    for name in FORMATS:
        run.step(f"offload and restore as {name}")
        with tiers_of(gpu, layout, "raw", count) as raw, tiers_of(gpu, layout, name, count) as coded:
            works = {}
            for what, tiers in (("raw", raw), (name, coded)):
                works[f"{what}.offload"], works[f"{what}.restore"] = _both_ways(*tiers, count)
            pool, _, _ = coded
            form, stream = get_format(name), gpu.new_stream()
            if not isinstance(form, BlockFormat):
                raise KVTierError(f"bench gpu: {name} is not made of blocks")
            payload_bytes = form.payload_bytes(layout)
            room = gpu.allocate(count * payload_bytes).view(count, payload_bytes)
            slots = list(range(count))
            encode = partial(encode_pages, form, pool.paged, slots, room)
            decode = partial(decode_pages, form, room, pool.paged, slots)
            works["encode"] = partial(_seconds, partial(stream.run, encode), stream)
            works["decode"] = partial(_seconds, partial(stream.run, decode), stream)
            took = _in_turns(run, works)
        for way in ("offload", "restore"):
            rows.append(Row(f"{name}.{way}", page_bytes / took[f"{name}.{way}"] / 1e9, "GB/s", page_bytes / took[f"raw.{way}"] / 1e9))
        for way in ("encode", "decode"):
            rows.append(Row(f"{name}.{way}", (page_bytes + count * payload_bytes) / took[way] / 1e9, "GB/s", memory_speed))
    return rows


def _both_ways(pool: GpuPool, host: HostTier, staging: StagingPool, count: int) -> tuple[Callable[[], float], Callable[[], float]]:
    """Seconds of an offload and of a restore of `count` pages by a lane; checksums, which workers take beside it, are not in it."""
    numbers = torch.randn(count, *pool.layout.shape, generator=torch.Generator().manual_seed(0)).to(pool.layout.torch_dtype)
    pool.scatter(list(range(count)), numbers)
    moves, form = moves_of(count), staging.lane_formats[host.name]
    with staging.borrow() as scratch:
        lane = scratch.lane
    if lane is None:
        raise KVTierError("bench gpu: the pool is not on a GPU")

    def offload() -> float:
        return _seconds(lambda: lane.offload(pool, host, form, moves, []))

    host.store([move.target_slot for move in moves], [move.page for move in moves], lane.offload(pool, host, form, moves, []))
    arrived = _verified(host, moves)
    return offload, lambda: _seconds(lambda: lane.restore(host, pool, form, moves, arrived, None))


def _verified(host: HostTier, moves: Sequence[Move]) -> list[tuple[int, Payload]]:
    """The payloads of these moves, with their places among them."""
    stored = host.load([move.source_slot for move in moves], [move.page.key for move in moves], np.empty((len(moves), 0), np.uint8))
    return [(index, payload) for index, payload in enumerate(stored) if isinstance(payload, np.ndarray)]


def _launch(run: Run, gpu: Accelerator) -> Row:
    layout = PageLayout(layers=1, planes=2, page_tokens=16, kv_heads=8, head_dim=128, dtype="bf16")
    samples = []
    with tiers_of(gpu, layout, "raw", PAGES_A_CALL) as (pool, host, staging):
        _both_ways(pool, host, staging, PAGES_A_CALL)
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


def _prefix(run: Run, gpu: Accelerator, sizes: Sizes) -> list[Row]:
    layout, tokens = sizes.layout, sizes.prefix_tokens
    pages = tokens // layout.page_tokens
    prefixes = [token_ids(number, tokens) for number in (1, 2)]
    form = get_format("q8")
    with open_cache(layout, Room(pages + 1, host=2 * pages + 2), device__place=place_of(gpu), mover__workers=8) as cache:
        kv = made_kv(layout, tokens)
        for ids in prefixes:
            cache.put(ids, kv)
            cache.flush()
        engine = gpu.engine_stream()
        turn = iter(range(1 << 30))

        def restore() -> float:
            ids = prefixes[next(turn) % 2]
            start = time.perf_counter()
            with cache.acquire(cache.lookup(ids)) as lease:
                lease.wait()
                if lease.tokens != tokens:
                    raise KVTierError(f"bench gpu: only {lease.tokens} of {tokens} tokens came back")
            return time.perf_counter() - start

        alone = statistics.median([restore() for _ in range(2 * max(2, run.repeats))])
        consume = _consumer(gpu, sizes, 1.2 * alone / layout.layers)
        copy_s = _large_copy(run, gpu, pages * form.payload_bytes(layout))

        def read(ids: list[int] | np.ndarray[tuple[int], np.dtype[np.int64]]) -> float:
            start = time.perf_counter()
            with cache.acquire(cache.lookup(ids)) as lease:
                for layer in range(layout.layers):
                    consume(engine, lease.layer(layer), lease.slots())
                engine.record().wait()
            return time.perf_counter() - start

        exposed = []
        for _ in range(max(2, run.repeats)):
            ids = prefixes[next(turn) % 2]
            overlapped = read(ids)
            exposed.append(overlapped - read(ids))
    return [
        Row("prefix.restore", alone * 1e3, "ms", copy_s * 1e3),
        Row("prefix.exposed", max(0.0, statistics.median(exposed)) * 1e3, "ms", alone * 1e3),
    ]


def _large_copy(run: Run, gpu: Accelerator, size: int) -> float:
    host, device, stream = aligned_array(size), gpu.allocate(size), gpu.new_stream()
    registration = Registration(gpu, host.ctypes.data, size, 4096)
    step = min(size, registration.chunk_bytes)
    starts = range(0, size - step + 1, step)

    def copy() -> None:
        for start in starts:
            stream.copy(np.array([device.data_ptr() + start]), np.array([host.ctypes.data + start]), step)

    took = _in_turns(run, {"copy": lambda: _seconds(copy, stream)})["copy"]
    registration.undo()
    return took * size / (len(starts) * step)


Consumer = Callable[[Stream, torch.Tensor, "np.ndarray[tuple[int], np.dtype[np.int64]]"], None]


def _consumer(gpu: Accelerator, sizes: Sizes, layer_s: float) -> Consumer:
    """Reads one layer of some pages and multiplies matrices for about `layer_s` seconds."""
    matrix = torch.ones((sizes.width, sizes.width), dtype=torch.bfloat16, device=gpu.device)
    out = torch.empty_like(matrix)
    stream = gpu.engine_stream()

    def multiply(times: int) -> None:
        for _ in range(times):
            torch.mm(matrix, matrix, out=out)

    multiply(3)
    one_s = _seconds(lambda: stream.run(partial(multiply, 10)), stream) / 10
    times = max(1, round(layer_s / one_s))

    def consume(engine: Stream, pool: torch.Tensor, slots: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        index = torch.as_tensor(slots).to(gpu.device, non_blocking=True)

        def work() -> None:
            pool.index_select(0, index).sum()
            multiply(times)

        engine.run(work)

    return consume


def _decode(run: Run, gpu: Accelerator, sizes: Sizes) -> Row:
    width, layout, count = sizes.width, sizes.layout, sizes.pages
    weights = torch.ones((width, 4 * width), dtype=torch.bfloat16, device=gpu.device)
    hidden = torch.ones((16, width), dtype=torch.bfloat16, device=gpu.device)
    keys = torch.ones((16, 8, width, 64), dtype=torch.bfloat16, device=gpu.device)
    query = torch.ones((16, 8, 1, 64), dtype=torch.bfloat16, device=gpu.device)
    engine = gpu.engine_stream()

    def step() -> None:
        (hidden @ weights) @ weights.T
        torch.nn.functional.scaled_dot_product_attention(query, keys, keys)

    def loop() -> None:
        for _ in range(sizes.steps):
            engine.run(step)

    with tiers_of(gpu, layout, "q8", count) as tiers:
        offload, _ = _both_ways(*tiers, count)
        stop, running = threading.Event(), threading.Event()

        def keep_offloading() -> None:
            while not stop.is_set():
                offload()
                running.set()

        def beside() -> float:
            stop.clear()
            running.clear()
            worker = threading.Thread(target=keep_offloading)
            worker.start()
            running.wait()
            took = _seconds(loop, engine)
            stop.set()
            worker.join()
            return took

        took = _in_turns(run, {"alone": lambda: _seconds(loop, engine), "beside": beside})
    return Row("decode.step", took["beside"] / sizes.steps * 1e6, "us", took["alone"] / sizes.steps * 1e6)


def _digests(run: Run, gpu: Accelerator, sizes: Sizes) -> list[Row]:
    layout, count, stream = sizes.layout, sizes.pages, gpu.new_stream()
    shape, slots = DigestLayout.of(layout), list(range(count))
    pool = GpuPool(layout, count * layout.page_bytes, gpu)
    pool.reserve(count)
    numbers = torch.randn(count, *layout.shape, generator=torch.Generator().manual_seed(0)).to(layout.torch_dtype)
    pool.scatter(slots, numbers)
    made = digest.encode(pool.keys(slots[:1]))[:, 0]
    digests = made.repeat(sizes.prefix_tokens // layout.page_tokens, 1, 1)
    queries = torch.randn(1, 4 * layout.kv_heads, layout.head_dim, device=gpu.device)

    def by_torch() -> torch.Tensor:
        return digest.encode(torch.stack([pool.layer(layer)[:count, 0] for layer in range(layout.layers)], 1))

    def timed(work: Callable[[], object]) -> Callable[[], float]:
        return lambda: _seconds(lambda: stream.run(work), stream)

    pool.fences.before(stream)
    took = _in_turns(
        run,
        {
            "encode": timed(lambda: on_device.encode_paged(pool.paged, slots)),
            "encode by torch": timed(by_torch),
            "score": timed(lambda: on_device.page_logits(digests, queries, shape)),
            "score by torch": timed(lambda: digest.page_logits(digests, queries, shape)),
        },
    )
    pool.close()
    return [Row(f"digest.{what}", took[what] * 1e6, "us", took[f"{what} by torch"] * 1e6) for what in ("encode", "score")]


def _sparse_product(run: Run, gpu: Accelerator, sizes: Sizes) -> Row:
    tokens, dim, stream = sizes.prefix_tokens, sizes.layout.head_dim, gpu.new_stream()
    # As tensor cores take values: tokens are the last dimension.
    shape = BlockShape(tokens=dim, heads=1, head_dim=tokens, dtype="bf16", keys=False)
    numbers = torch.randn(2, dim, tokens, generator=torch.Generator().manual_seed(0)).bfloat16()
    values = Sparse24().decode(Sparse24().encode(numbers[:1, :, None], shape), shape)[0, :, 0].to(gpu.device)
    attention = numbers[1, :QUERIES].float().softmax(-1).bfloat16().T.contiguous().to(gpu.device)
    sparse = torch.sparse.to_sparse_semi_structured(values)
    difference = (torch.mm(sparse, attention) - torch.mm(values, attention)).float().norm()
    if not difference < 0.02 * torch.mm(values, attention).float().norm():
        raise KVTierError("bench gpu: torch's semi-structured product is not that of the same numbers as a dense matrix")

    def product(first: torch.Tensor) -> float:
        return _seconds(lambda: stream.run(lambda: [torch.mm(first, attention) for _ in range(sizes.steps)]), stream)

    took = _in_turns(run, {"sparse": partial(product, sparse), "dense": partial(product, values)})
    return Row("sparse24.matmul", took["sparse"] / sizes.steps * 1e6, "us", took["dense"] / sizes.steps * 1e6)


def place_of(gpu: Accelerator) -> str:
    """What `device.place` says for this GPU."""
    return str(gpu.device)
