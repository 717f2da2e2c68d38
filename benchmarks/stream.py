"""A whole stream of requests on the live cache's own objects (the residency with its table, its policy and the slots of a device tier),
without the bytes: the rows `stream.*` of `table.py`.

`stream.TRACE.POLICY`: microseconds per page that requests name, for all of looking up, leasing what is there, making room (evicting),
committing the rest, releasing; `.ticking` with a clock that moves between these calls as a real one does, not only between requests;
`.busy` with UNDER_WAY requests that hold their pages at any time, as running ones do. The ceiling (a floor, here) is an LRU cache on an
OrderedDict with neither leases, links, slots nor tiers. `.p99`: the 99th percentile of one request, microseconds. `.hit_ratio`: tokens
found, of all; the share of a block counts that the request fills.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from kvtier.config import load_config
from kvtier.errors import KVTierError
from kvtier.keys import PageKey
from kvtier.layout import PageLayout
from kvtier.pages import DEVICE, NO_ROW, Rows
from kvtier.replay.trace import BLOCK_TOKENS, Trace, build_trace, read_trace
from kvtier.replay.workloads import make_requests
from kvtier.residency import Residency

from .measure import Row, Run, percentile

CHATS_PER_S = 3.4
"""As many requests a second as the conversation trace has."""
UNDER_WAY = 64
"""Requests under way at once in the rows `.busy`, as far as there is room for the next."""
BUSY_POLICIES = 2
"""So many of the policies, the first, have these rows."""
SLOW_REPEATS = 3
"""The most repeats of a stream under a policy that is not the default."""
ROOT_KEY = b"root".ljust(32, b"\0")
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
    """One residency with a device tier of `capacity` pages that serves requests one after the other. A context manager.

    A request holds its pages until `under_way` others have come, or there is no room else.
    """

    def __init__(self, policy: str, capacity: int, ticking: bool = False, under_way: int = 0) -> None:
        settings: dict[str, object] = {
            "device.capacity_bytes": capacity * LAYOUT.page_bytes,
            "device.place": "cpu",
            "host": None,
            "policy.name": policy,
            "policy.cleanup_interval": 1e9,
        }
        self.ticking = ticking
        self.under_way = under_way
        self.held: deque[Rows] = deque()
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
            while slots is None and self.held:
                with residency.lock:
                    residency.release(self.held.popleft())
                    slots = residency.eviction.reserve_now(DEVICE, missing)
            if slots is None:
                raise KVTierError(f"a request of {len(keys)} pages found no room among {self.capacity}, though nobody else holds any")
            before, parent = (keys[found - 1], int(rows[-1])) if found else (ROOT_KEY, NO_ROW)
            with residency.lock:
                rows = np.concatenate((rows, residency.settle_in(keys[found : found + missing], before, found, parent, slots)))
        if self.under_way:
            self.held.append(rows)
            rows = self.held.popleft() if len(self.held) > self.under_way else rows[:0]
        with residency.lock:
            residency.release(rows)
        self.seconds.append(time.perf_counter() - start)
        self.hit_tokens += min(found * BLOCK_TOKENS, request.tokens)
        self.tokens += request.tokens

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, *_: object) -> None:
        self.residency.close(flush=False)


def stream_rows(run: Run, stream: Stream, capacity: int, policies: Sequence[str]) -> list[Row]:
    """The rows; the first of `policies` with both clocks, the first BUSY_POLICIES busy, too.

    KVTierError if a request is longer than all there is room for.
    """
    rows = []
    floors = []
    ways = [(policies[0], False, 0), (policies[0], True, 0), *((name, False, 0) for name in policies[1:])]
    for name, ticking, under_way in [*ways, *((name, False, UNDER_WAY) for name in policies[:BUSY_POLICIES])]:
        run.step(f"{stream.name} through {name}")
        label = f"stream.{stream.name}.{name}{'.ticking' * ticking}{'.busy' * bool(under_way)}"
        totals, tails = [], []
        for _ in range(run.repeats if name == policies[0] else min(run.repeats, SLOW_REPEATS)):
            floors.append(least_lru(stream, capacity))
            with Replay(name, capacity, ticking, under_way) as replay:
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


def least_lru(stream: Stream, capacity: int) -> float:
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
