"""The whole cache under concurrent sequences: 1 to 64 threads that offload and restore one sequence each, through one cache.

`tiers.offload.host.8seqs`: 8 threads put a sequence each, at once; until all of it is in the host tier, in GB/s of the engine's own bytes.
`tiers.restore.host.8seqs`: 8 threads bring a sequence each back to the device, from the host only. `disk` for `host`: the same with a
disk below the device and nothing between. The ceiling is one thread's copy of as many bytes of pages between the same memories, taking
turns with the cache.

`.tokens`: thousands of tokens per second. `.p50`, `.p95`: milliseconds until a sequence is restored while the others are being restored
too, beside a copy of the pages of them all; less is better. Medians over the repeats, percentiles over all sequences of all repeats.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from kvtier.cache import TieredKVCache
from kvtier.errors import KVTierError
from kvtier.layout import PageLayout
from kvtier.memory.limits import available_memory

from .measure import Row, Run, percentile
from .rig import Ids, PlainCopy, Room, check_room, forget_files, layout_named, made_kv, open_cache, restore, store_bytes, timed, token_ids

CONCURRENCY = (1, 2, 4, 8, 16, 32, 64)
TINY_CONCURRENCY = (1, 4)
TINY_TOKENS = 64


def measure(run: Run, layout: str = "smollm2", sequence_tokens: int = 512, path: Path | None = None) -> list[Row]:
    """The rows for sequences of `sequence_tokens` tokens of a layout of LAYOUTS; files go into `path` (the system's temporary directory).

    KVTierError for an unknown layout, sequences shorter than a page, or no room for the files, before any is written; or no memory for the
    least of the steps. Those of more sequences than there is memory for are left out, which is said.
    """
    pages_of = layout_named(layout, run.tiny)
    tokens = TINY_TOKENS if run.tiny else sequence_tokens // pages_of.page_tokens * pages_of.page_tokens
    if tokens < 1:
        raise KVTierError(f"--sequence-tokens {sequence_tokens}: expected at least one page, {pages_of.page_tokens} tokens")
    steps = _with_memory(run, TINY_CONCURRENCY if run.tiny else CONCURRENCY, pages_of, tokens)
    check_room(path, store_bytes(pages_of, _home_pages(steps[-1] * tokens // pages_of.page_tokens)))
    run.expect(2 * len(steps))
    rows = []
    for home in ("host", "disk"):
        for sequences in steps:
            run.step(f"{sequences} sequences, {home}")
            pages = sequences * tokens // pages_of.page_tokens
            room = Room(pages, host=_home_pages(pages)) if home == "host" else Room(pages, disk=_home_pages(pages))
            with open_cache(pages_of, room, path) as cache:
                rows += _measure_home(run, cache, home, sequences, tokens)
    return rows


def _with_memory(run: Run, steps: Sequence[int], layout: PageLayout, tokens: int) -> list[int]:
    """The first of `steps`, as far as there is memory for them: that of the cache, and of the copies beside it."""
    room = available_memory()
    needed = {}
    for sequences in steps:
        pages = sequences * tokens // layout.page_tokens
        needed[sequences] = 2 * PlainCopy.memory_bytes(pages * layout.page_bytes) + (1 + _home_pages(1)) * pages * layout.page_bytes
    fitting = [sequences for sequences in steps if needed[sequences] <= room.bytes]
    if not fitting:
        least = f"{needed[steps[0]]} bytes of memory are needed for one of {tokens} tokens, {room.bytes} can be had ({room.why})"
        raise KVTierError(f"--sequence-tokens: {least}; give shorter ones")
    if len(fitting) < len(steps):
        left_out = ", ".join(map(str, steps[len(fitting) :]))
        had = f"{needed[steps[len(fitting)]]} bytes of memory, {room.bytes} can be had ({room.why})"
        run.progress.console.print(f"left out: {left_out} sequences at once, which take {had}")
    return fitting


def _home_pages(pages: int) -> int:
    """Both sets, and one more of room for what is on its way."""
    return 3 * pages


def _measure_home(run: Run, cache: TieredKVCache, home: str, sequences: int, tokens: int) -> list[Row]:
    """The device holds one set of sequences and its home two: whichever set is put or restored, the other one has to leave the device, and
    may at once, because its home has it."""
    kv = made_kv(cache.layout, tokens)
    page_bytes = tokens // cache.layout.page_tokens * cache.layout.page_bytes
    copies = {way: PlainCopy(sequences * page_bytes, *ends) for way, ends in (("down", ("device", home)), ("up", (home, "device")))}
    downs, ups, down_copies, up_copies, latencies = [], [], [], [], []
    for number in range(run.repeats + 1):  # the first is for warming up
        sets = [[token_ids(2 * number * sequences + place * sequences + each, tokens) for each in range(sequences)] for place in (0, 1)]
        for some in sets:
            start = time.perf_counter()
            _at_once(lambda ids: cache.put(ids, kv), some)
            cache.flush()
            down = time.perf_counter() - start
            down_copy = timed(partial(copies["down"], sequences * page_bytes))
            if number:
                downs.append(down)
                down_copies.append(down_copy)
        for some in sets:
            forget_files(cache)
            start = time.perf_counter()
            took = _at_once(partial(restore, cache), some)
            up = time.perf_counter() - start
            up_copy = timed(partial(copies["up"], sequences * page_bytes))
            if number:
                ups.append(up)
                up_copies.append(up_copy)
                latencies += took
    rows = []
    for what, seconds, copied in (("offload", downs, down_copies), ("restore", ups, up_copies)):
        took_s, copy_s = statistics.median(seconds), statistics.median(copied)
        name = f"tiers.{what}.{home}.{sequences}seqs"
        rows.append(Row(name, sequences * page_bytes / took_s / 1e9, "GB/s", sequences * page_bytes / copy_s / 1e9))
        rows.append(Row(f"{name}.tokens", sequences * tokens / took_s / 1e3, "ktokens/s", sequences * tokens / copy_s / 1e3))
    for share in (0.5, 0.95):
        copied_ms = statistics.median(up_copies) * 1e3
        rows.append(Row(f"tiers.restore.{home}.{sequences}seqs.p{share * 100:.0f}", percentile(latencies, share) * 1e3, "ms", copied_ms))
    return rows


def _at_once(work: Callable[[Ids], object], sequences: Sequence[Ids]) -> list[float]:
    """`work` on every sequence, each on a thread of its own, all starting together; seconds that each took."""
    gate = threading.Barrier(len(sequences))

    def one(ids: Ids) -> float:
        gate.wait()
        return timed(lambda: work(ids))

    with ThreadPoolExecutor(len(sequences), "sequence") as pool:
        return list(pool.map(one, sequences))
