"""Whether the priced choice between restoring and recomputing ever takes the slower way.

A synthetic engine takes a fixed time per token (it sleeps), from much faster than the disk to much slower. Requests are a prefix that is on
the disk and some new tokens. After a warm-up in which the cache sees what both ways take, each comes in three ways, in turn: the prefix
restored whole (`mover.restore: always`), looked up but computed, and as the cache chooses (`auto`: its first pages restored, the rest
computed).

`pricing.xR`: milliseconds as the cache chooses, for an engine that computes a prefix in R times what restoring it takes; the ceiling is the
faster of the other two, so 1.1 is 10 % slower than the better way. Less is better. `.restored`: share of the prefix that was restored.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from kvtier.cache import TieredKVCache
from kvtier.layout import PageLayout

from .measure import Row, Run
from .rig import Ids, Room, check_room, forget_files, layout_named, made_kv, open_cache, restore, store_bytes, token_ids

RATIOS = (0.125, 0.5, 0.8, 1.25, 2.0, 8.0)
TINY_RATIOS = (0.25, 4.0)
PREFIX_TOKENS, TINY_PREFIX_TOKENS = 2048, 64
PREFIXES = 6
"""The device holds two."""
NEW_SHARE = 8
"""One new token for so many of the prefix."""
WARM_UP = 4
ROUNDS = 2
"""Per repeat."""


def measure(run: Run, layout: str = "smollm2", path: Path | None = None) -> list[Row]:
    """The rows for pages of a layout of LAYOUTS; files go into the directory `path` (the system's temporary one).

    KVTierError for an unknown layout, or no room for the files, before any is written.
    """
    pages_of = layout_named(layout, run.tiny)
    ratios = TINY_RATIOS if run.tiny else RATIOS
    tokens = TINY_PREFIX_TOKENS if run.tiny else PREFIX_TOKENS
    check_room(path, 2 * store_bytes(pages_of, _room(tokens // pages_of.page_tokens).disk))  # there are two caches at a time
    run.expect(1 + len(ratios))
    kv, prefixes = made_kv(pages_of, tokens), [token_ids(index, tokens) for index in range(PREFIXES)]
    run.step("restoring")
    with _filled(pages_of, kv, prefixes, path, "always") as always:
        once_s = statistics.median(_cold(always, ids) for ids in prefixes * 2)
        rows = []
        for ratio in ratios:
            run.step(f"an engine {ratio} times as slow as the disk")
            with _filled(pages_of, kv, prefixes, path, "auto") as priced:
                rows += _measure_engine(run, ratio, once_s * ratio / tokens, prefixes, always, priced, kv)
        return rows


def _room(pages: int) -> Room:
    """For prefixes of `pages` pages: all of them on the disk, two on the device."""
    return Room(2 * pages, disk=(PREFIXES + 1) * pages)


@contextmanager
def _filled(layout: PageLayout, kv: torch.Tensor, prefixes: Sequence[Ids], path: Path | None, way: str) -> Iterator[TieredKVCache]:
    """A cache whose disk holds the prefixes, and whose device has room for two of them."""
    pages = len(prefixes[0]) // layout.page_tokens
    with open_cache(layout, _room(pages), path, mover__restore=way) as cache:
        for ids in prefixes:
            cache.put(ids, kv)
            cache.flush()
        yield cache


def _measure_engine(
    run: Run, ratio: float, token_s: float, prefixes: Sequence[Ids], always: TieredKVCache, priced: TieredKVCache, kv: torch.Tensor
) -> list[Row]:
    took: dict[str, list[float]] = {"restored": [], "computed": [], "priced": []}
    tokens, kept = len(prefixes[0]), []
    for turn in range(WARM_UP + ROUNDS * run.repeats):
        for ids in prefixes:
            new_s = token_s * (tokens // NEW_SHARE)
            seconds = {"restored": _cold(always, ids, new_s), "computed": _computed(always, ids, token_s * tokens + new_s)}
            restored, seconds["priced"] = _as_priced(priced, ids, token_s, kv)
            if turn >= WARM_UP:
                kept.append(restored / tokens)
                for way, each in seconds.items():
                    took[way].append(each)
    medians = {way: statistics.median(each) * 1e3 for way, each in took.items()}
    return [
        Row(f"pricing.x{ratio:g}", medians["priced"], "ms", min(medians["restored"], medians["computed"])),
        Row(f"pricing.x{ratio:g}.restored", statistics.mean(kept), "of the tokens"),
    ]


def _cold(cache: TieredKVCache, ids: Ids, new_s: float = 0.0) -> float:
    """Seconds to bring up all of a prefix, past the system's page cache, and to compute new tokens for `new_s`."""
    forget_files(cache)
    start = time.perf_counter()
    restore(cache, ids)
    time.sleep(new_s)
    return time.perf_counter() - start


def _computed(cache: TieredKVCache, ids: Ids, compute_s: float) -> float:
    """Seconds to look a prefix up, and to compute it and what is new for `compute_s` nevertheless."""
    forget_files(cache)
    start = time.perf_counter()
    cache.lookup(ids)
    with cache.begin():
        time.sleep(compute_s)
    return time.perf_counter() - start


def _as_priced(cache: TieredKVCache, ids: Ids, token_s: float, kv: torch.Tensor) -> tuple[int, float]:
    """Tokens of the prefix that were restored, and seconds until all were there. What else was computed of it is put, as an engine does."""
    forget_files(cache)
    start = time.perf_counter()
    with cache.acquire(cache.lookup(ids)) as lease:
        lease.wait()
        restored = lease.tokens
        missing = len(ids) - restored + len(ids) // NEW_SHARE
        began = time.perf_counter()
        time.sleep(token_s * missing)
        cache.record_prefill(restored, missing, time.perf_counter() - began)
        seconds = time.perf_counter() - start
        cache.put(ids[restored:], kv[:, :, restored:], after=lease)
    cache.settle()
    return restored, seconds
