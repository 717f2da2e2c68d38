"""What the bookkeeping costs: page table and policies alone at 10^4 to 10^6 pages, and a whole stream of requests on the live cache's own
objects (the residency with its table, its policy and the slots of a device tier), without the bytes.

`table.OPERATION.PAGES`, `lru.OPERATION.PAGES` and so on for other policies: millions of pages per second, in calls of one request's
pages; beside it what a plain dict does for the same keys, one by one (for an eviction: an OrderedDict that lets its oldest go).
`stream.TRACE.POLICY`: microseconds per page that requests name, for all of looking up, leasing what is there, making room (evicting),
committing the rest, releasing; `.ticking` with a clock that moves between these calls as a real one does, not only between requests. The
ceiling (a floor, here) is an LRU cache on an OrderedDict with neither leases, links, slots nor tiers. `.p99`: the 99th percentile of one
request, microseconds. `.hit_ratio`: tokens found, of all; the share of a block counts that the request fills.

A trace is Mooncake JSONL, read by `kvtier.replay`; without one, its made-up chats. Capacity is a share of the stream's distinct pages.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from kvtier.config import load_config
from kvtier.errors import KVTierError
from kvtier.keys import PageKey
from kvtier.layout import PageLayout
from kvtier.pages import DEVICE, NO_ROW, PageTable, Rows
from kvtier.policy import ROOT, EvictionPolicy, make_policy, nothing_protected
from kvtier.replay.trace import BLOCK_TOKENS, Trace, build_trace, read_trace
from kvtier.replay.workloads import make_requests
from kvtier.residency import Residency

from .measure import Row, Run, percentile, side_by_side

CHATS_PER_S = 3.4
"""As many requests a second as the conversation trace has."""
CHAIN_PAGES = 25
"""Pages of one call in the rows of single operations: about a mean request of the conversation trace."""
MEASURED = ("lru", "a2cr", "lfu", "a2cr-classic")
"""Policies with an order of their own; `lfu` stands for all that queue, `kvtier.policy.queued`."""
CALLS = 400
SLOW_REPEATS = 3
"""The most repeats of a stream under a policy that is not the default."""
ROOT_KEY = b"root".ljust(32, b"\0")
Work = tuple[str, Callable[[], object], Callable[[], object]]
"""What is measured: its name, ours, and the plain thing beside it."""
LAYOUT = PageLayout(layers=1, planes=1, page_tokens=1, kv_heads=1, head_dim=1)
"""Pages without weight: only their bookkeeping is wanted."""


@dataclass(frozen=True)
class Request:
    """Pages of a prompt by key, its tokens, and when it came in seconds."""

    keys: tuple[PageKey, ...]
    tokens: int
    at_s: float


@dataclass(frozen=True)
class Stream:
    """Requests in the order in which they came."""

    name: str
    requests: Sequence[Request]

    @property
    def pages(self) -> int:
        return sum(len(request.keys) for request in self.requests)

    @property
    def distinct(self) -> int:
        return len({key for request in self.requests for key in request.keys})


def measure(run: Run, trace: Path | None = None, share: float = 0.05) -> list[Row]:
    """The rows. `share`: capacity as a share of the distinct pages. KVTierError for a file that is not a trace, or a share out of range."""
    if not 0 < share <= 1:
        raise KVTierError(f"--share {share}: expected above 0 and at most 1")
    stream = chats(150 if run.tiny else 12_000) if trace is None else read_stream(trace)
    sizes = (100, 1000) if run.tiny else (10**4, 10**5, 10**6)
    run.expect(len(sizes) * (1 + len(MEASURED)) + len(MEASURED) + 1)
    rows = []
    for size in sizes:
        run.step(f"a table of {size} pages")
        rows += _table(run, size)
        for name in MEASURED:
            run.step(f"{name} over {size} pages")
            rows += _policy(run, name, size)
    return rows + _streams(run, stream, max(1, int(stream.distinct * share)))


# -- streams -------------------------------------------------------------------------------------------------------------------


def read_stream(path: Path) -> Stream:
    """The stream of a trace file. KVTierError if the file is none."""
    return stream_of(read_trace(path))


def chats(requests: int) -> Stream:
    """Made-up chats, always the same: see `kvtier.replay.workloads`."""
    return stream_of(build_trace("chats", make_requests({"chat": 1.0}, requests, CHATS_PER_S, seed=1)))


def stream_of(trace: Trace) -> Stream:
    """The trace with a page key for every page."""
    keys = np.array([page_key(page) for page in range(trace.distinct)], object)[trace.pages].tolist()
    starts = itertools.pairwise(trace.starts.tolist())
    columns = zip(starts, trace.input_tokens.tolist(), trace.at_s.tolist(), strict=True)
    return Stream(trace.name, [Request(tuple(keys[start:stop]), tokens, at_s) for (start, stop), tokens, at_s in columns])


def page_key(number: int) -> PageKey:
    """A key as `kvtier.keys` makes them, for a block that only has a number."""
    return blake2b(number.to_bytes(8, "little"), digest_size=32).digest()


class Replay:
    """One residency with a device tier of `capacity` pages that serves requests one after the other. A context manager."""

    def __init__(self, policy: str, capacity: int, ticking: bool = False) -> None:
        settings: dict[str, object] = {
            "device.capacity_bytes": capacity * LAYOUT.page_bytes,
            "device.place": "cpu",
            "host": None,
            "policy.name": policy,
            "policy.cleanup_interval": 1e9,
        }
        self.ticking = ticking
        self.now = 0.0
        self.residency = Residency(load_config(None, env={}, overrides=settings), LAYOUT, b"bench", self.clock)
        self.capacity = capacity
        self.hit_tokens = self.tokens = 0
        self.seconds: list[float] = []

    def clock(self) -> float:
        """The time of the stream; ticking, a microsecond later with every look."""
        if self.ticking:
            self.now += 1e-6
        return self.now

    def serve(self, request: Request) -> None:
        """All the bookkeeping of one request, as the cache does it: `lookup`, `acquire`, `append`, `release`."""
        residency, keys = self.residency, request.keys
        self.now = max(self.now, request.at_s)
        start = time.perf_counter()
        with residency.lock:
            found = len(residency.table.find(keys))
        with residency.lock:
            rows: Rows = residency.claim(keys[:found])
        missing = min(len(keys), self.capacity) - found
        if missing > 0:
            with residency.lock:
                slots = residency.eviction.reserve_now(DEVICE, missing)
            if slots is None:
                raise KVTierError(f"a request of {len(keys)} pages found no room among {self.capacity}, though nobody else holds any")
            before, parent = (keys[found - 1], int(rows[-1])) if found else (ROOT_KEY, NO_ROW)
            with residency.lock:
                rows = np.concatenate((rows, residency.settle_in(keys[found : found + missing], before, found, parent, slots)))
        with residency.lock:
            residency.release(rows)
        self.seconds.append(time.perf_counter() - start)
        self.hit_tokens += min(found * BLOCK_TOKENS, request.tokens)
        self.tokens += request.tokens

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, *_: object) -> None:
        self.residency.close(flush=False)


def _streams(run: Run, stream: Stream, capacity: int) -> list[Row]:
    rows = []
    floors = []
    for name, ticking in [(MEASURED[0], False), (MEASURED[0], True), *((name, False) for name in MEASURED[1:])]:
        run.step(f"{stream.name} through {name}")
        label = f"stream.{stream.name}.{name}{'.ticking' * ticking}"
        totals, tails = [], []
        for _ in range(run.repeats if name == MEASURED[0] else min(run.repeats, SLOW_REPEATS)):
            floors.append(_ordered_dict(stream, capacity))
            with Replay(name, capacity, ticking) as replay:
                for request in stream.requests:
                    replay.serve(request)
            totals.append(sum(replay.seconds))
            tails.append(percentile(replay.seconds, 0.99))
        rows += [
            Row(label, statistics.median(totals) / stream.pages * 1e6, "us/block", statistics.median(floors) / stream.pages * 1e6),
            Row(f"{label}.p99", statistics.median(tails) * 1e6, "us/request"),
            Row(f"{label}.hit_ratio", replay.hit_tokens / replay.tokens, "share of tokens"),
        ]
    return [*rows, Row(f"stream.{stream.name}.hit_ratio", rows[2].value, "share of tokens")]


def _ordered_dict(stream: Stream, capacity: int) -> float:
    """Seconds of the least that could be called an LRU cache of pages."""
    held: OrderedDict[PageKey, None] = OrderedDict()
    start = time.perf_counter()
    for request in stream.requests:
        found = 0
        for key in request.keys:
            if key not in held:
                break
            found += 1
        for key in reversed(request.keys[found:capacity]):
            held[key] = None
        for key in reversed(request.keys[:found]):
            held.move_to_end(key)
        while len(held) > capacity:
            held.popitem(last=False)
    return time.perf_counter() - start


# -- single operations ---------------------------------------------------------------------------------------------------------


def _chains(size: int) -> list[list[PageKey]]:
    keys = [page_key(number) for number in range(size)]
    return [keys[start : start + CHAIN_PAGES] for start in range(0, size, CHAIN_PAGES)]


def _rows(name: str, size: int, pages: int, works: Sequence[Work], run: Run) -> Iterator[Row]:
    for operation, ours, plain in works:
        took, floor = side_by_side([ours, plain], run.repeats)
        yield Row(f"{name}.{operation}.1e{len(str(size)) - 1}", pages / took / 1e6, "M ops/s", pages / floor / 1e6)


def _each(chains: Iterable[Sequence[PageKey]], call: Callable[[PageKey], object]) -> None:
    for chain in chains:
        for key in chain:
            call(key)


def _table(run: Run, size: int) -> list[Row]:
    table, chains = PageTable(1, LAYOUT.page_tokens), _chains(size)
    plain: dict[PageKey, int] = {}

    def write(chain: Sequence[PageKey]) -> None:
        rows = table.add_chain(chain, ROOT_KEY, 0)
        table.begin(rows, DEVICE, rows.tolist())
        table.commit(rows, DEVICE)

    for chain in chains:
        write(chain)
        plain.update((key, len(plain)) for key in chain)
    asked = random.Random(size).choices(chains, k=min(CALLS, len(chains)))
    distinct = list({chain[0]: chain for chain in asked}.values())
    held = [table.find(chain) for chain in asked]

    def rewrite() -> None:
        for chain in distinct:
            table.drop(table.find(chain)[::-1], DEVICE)
            write(chain)

    def lease() -> None:
        for rows in held:
            table.lease(rows)
            table.release(rows)

    def refill() -> None:
        for chain in distinct:
            for key in chain:
                plain[key] = plain.pop(key)

    pages = sum(map(len, asked))
    lookup = ("lookup", lambda: [table.find(chain) for chain in asked], lambda: _each(asked, plain.get))
    hold = ("lease", lease, lambda: _each(asked, plain.__getitem__))
    again = ("rewrite", rewrite, refill)
    return [*_rows("table", size, pages, [lookup, hold], run), *_rows("table", size, sum(map(len, distinct)), [again], run)]


def _policy(run: Run, name: str, size: int) -> list[Row]:
    policy: EvictionPolicy = make_policy(name)
    plain: OrderedDict[int, None] = OrderedDict.fromkeys(range(size))
    chains = [np.arange(start, min(start + CHAIN_PAGES, size)) for start in range(0, size, CHAIN_PAGES)]
    links = [(chain, np.concatenate(([ROOT], chain[:-1])), np.arange(len(chain))) for chain in chains]
    now = 0.0
    for link in links:
        now += 0.1
        policy.insert(*link, now)
    asked = random.Random(size).choices(chains, k=min(CALLS, len(chains)))
    numbers = [chain.tolist() for chain in asked]

    def touch() -> None:
        nonlocal now
        for chain in asked:
            now += 0.1
            policy.touch(chain, now)

    def plain_touch() -> None:
        for chain in numbers:
            for page in chain:
                plain.move_to_end(page)

    def evict() -> None:
        nonlocal now
        for _ in range(min(CALLS, len(chains))):
            now += 0.1
            victims = policy.evict(CHAIN_PAGES, nothing_protected, now, 0.95)
            if victims is None:
                raise KVTierError(f"{name} found no {CHAIN_PAGES} pages to evict among {len(policy)}")
            place = victims % CHAIN_PAGES
            policy.insert(victims, np.where(place > 0, victims - 1, ROOT), place, now)

    def plain_evict() -> None:
        for _ in range(min(CALLS, len(chains))):
            for _ in range(CHAIN_PAGES):
                plain[plain.popitem(last=False)[0]] = None

    pages = sum(map(len, numbers))
    works = [("touch", touch, plain_touch), ("evict", evict, plain_evict)]
    return list(_rows(name, size, pages, works, run))
