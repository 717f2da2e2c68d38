"""How much `kvtier bench gpu` moves, and how it times what a GPU does beside the host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvtier.cuda.surface import Stream
from kvtier.layout import PageLayout

from .measure import Run

LLAMA = PageLayout(layers=32, planes=2, page_tokens=16, kv_heads=8, head_dim=128, dtype="bf16")
SMALL = PageLayout(layers=4, planes=2, page_tokens=16, kv_heads=2, head_dim=32, dtype="bf16")


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


def seconds(launch: Callable[[], object], *streams: Stream) -> float:
    """From the first launch until all of it is done."""
    start = time.perf_counter()
    launch()
    for stream in streams:
        stream.record().wait()
    return time.perf_counter() - start


def in_turns(run: Run, works: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Median seconds of each, called in turn, after one call each to warm up."""
    for work in works.values():
        work()
    samples = [[work() for work in works.values()] for _ in range(run.repeats)]
    return dict(zip(works, map(statistics.median, zip(*samples, strict=True)), strict=True))
