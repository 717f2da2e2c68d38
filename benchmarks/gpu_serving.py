"""What an engine on the same GPU notices of restores and offloads; part of `kvtier bench gpu`.

- `prefix.restore`: milliseconds to bring a prefix (32,768 tokens) from the host in the default format, beside one large copy of its bytes.
- `prefix.exposed`: what of that an engine waits for that reads layer by layer and computes about as long, beside all of it; less is better.
- `decode.step`: microseconds of a decode step (matrices and attention) while pages are offloaded, beside the same alone; less is better.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from kvtier.cuda.surface import Accelerator, Stream
from kvtier.errors import KVTierError
from kvtier.formats import get_format

from .gpu_check import tiers_of
from .gpu_copies import large_copy
from .gpu_lanes import both_ways
from .gpu_timing import Sizes, in_turns, seconds
from .measure import Row, Run
from .rig import Room, made_kv, open_cache, token_ids

Consumer = Callable[[Stream, torch.Tensor, "np.ndarray[tuple[int], np.dtype[np.int64]]"], None]


def prefix(run: Run, gpu: Accelerator, sizes: Sizes) -> list[Row]:
    layout, tokens = sizes.layout, sizes.prefix_tokens
    pages = tokens // layout.page_tokens
    prefixes = [token_ids(number, tokens) for number in (1, 2)]
    form = get_format("q8")
    with open_cache(layout, Room(pages + 1, host=2 * pages + 2), device__place=str(gpu.device), mover__workers=8) as cache:
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
        copy_s = large_copy(run, gpu, pages * form.payload_bytes(layout))

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


def _consumer(gpu: Accelerator, sizes: Sizes, layer_s: float) -> Consumer:
    """Reads one layer of some pages and multiplies matrices for about `layer_s` seconds."""
    matrix = torch.ones((sizes.width, sizes.width), dtype=torch.bfloat16, device=gpu.device)
    out = torch.empty_like(matrix)
    stream = gpu.engine_stream()

    def multiply(times: int) -> None:
        for _ in range(times):
            torch.mm(matrix, matrix, out=out)

    multiply(3)
    one_s = seconds(lambda: stream.run(partial(multiply, 10)), stream) / 10
    times = max(1, round(layer_s / one_s))

    def consume(engine: Stream, pool: torch.Tensor, slots: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        index = torch.as_tensor(slots).to(gpu.device, non_blocking=True)

        def work() -> None:
            pool.index_select(0, index).sum()
            multiply(times)

        engine.run(work)

    return consume


def decode_beside_offload(run: Run, gpu: Accelerator, sizes: Sizes) -> Row:
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
        offload, _ = both_ways(*tiers, count)
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
            took = seconds(loop, engine)
            stop.set()
            worker.join()
            return took

        took = in_turns(run, {"alone": lambda: seconds(loop, engine), "beside": beside})
    return Row("decode.step", took["beside"] / sizes.steps * 1e6, "us", took["alone"] / sizes.steps * 1e6)
