"""The whole cache under load: conversations that come back at random, at a rate of their own, for a while.

A request takes `batch` sequences: it looks each up, acquires what is cached, waits until that is on the device, checks it, adds what is
missing, releases. Requests arrive at random moments whether or not the ones before are done (an open loop), at a rate that climbs to its
full value during the ramp-up; latency counts from the moment of arrival. `concurrency` threads serve them. The sequences are more than all
tiers hold and a few are wanted often; now and then one is given up and a new one takes its place. Everything follows from a seed.

The KV of a page follows from its tokens, so every restored page is checked, in one layer each time: another page's KV, or damage beyond
what the formats lose, is an error. Errors, or bookkeeping that contradicts itself at the end, make the benchmark fail.

Rows per combination, named `load.1x1024.c8.r20` (batch, tokens, threads, requests per second):
`.tokens`: thousands of tokens served per second after the ramp-up, beside those asked for; `.window.min|median|max`: the same over sliding
windows of one second; `.latency.mean|p50|p95|p99`; `.hit_rate`: share of tokens that were cached; `.hit_rate.device|host|disk`: from where;
`.utilisation.TIER`: used / capacity; `.unserved`: share of the requests that nobody had taken when time was up; `.short`: of the sequences
that the device had no room for as a whole; `.error_rate`: of requests.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kvtier.cache import TieredKVCache
from kvtier.errors import IntegrityError, KVTierError
from kvtier.layout import PageLayout
from kvtier.leases.lease import Lease

from .measure import Row, Run, percentile
from .rig import Ids, Room, check_room, device, layout_named, open_cache, store_bytes, token_ids

KINDS = 64
"""Different pages that there are; a page's first token says which it is."""
MOST_ERROR = 0.5
"""Relative error at which a page is another one or damaged: 4-bit formats lose 0.1, and two different pages differ by 1.4."""
RENEWED = 0.05
"""How likely it is, each time a sequence is wanted, that a new one takes its place for good."""
MOST_REQUESTS = 1_000_000
"""They are all planned before the first is served."""
TICK_S = 0.25
WINDOW_S = 1.0
TINY_DURATION_S = 1.5


@dataclass(frozen=True)
class Shape:
    """One combination: sequences per request, tokens per sequence, threads, requests per second."""

    batch: int
    tokens: int
    concurrency: int
    rate: float

    @property
    def name(self) -> str:
        """As in the names of rows."""
        return f"load.{self.batch}x{self.tokens}.c{self.concurrency}.r{self.rate:g}"


@dataclass(frozen=True)
class Request:
    """When it arrives, in seconds, and the numbers of its sequences."""

    at_s: float
    sequences: tuple[int, ...]


@dataclass
class Tally:
    """What was served so far. All of it belongs to `lock`."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    ends: list[tuple[float, int, float]] = field(default_factory=list)
    """(end in seconds since the start, tokens, latency in seconds) of each request."""
    short: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    utilisation: dict[str, list[float]] = field(default_factory=dict)


def measure(
    run: Run,
    layout: str = "smollm2",
    batches: Sequence[int] = (1,),
    sequence_tokens: Sequence[int] = (1024,),
    concurrency: Sequence[int] = (8,),
    rates: Sequence[float] = (20.0,),
    duration_s: float = 20.0,
    ramp_up_s: float = 5.0,
    path: Path | None = None,
) -> list[Row]:
    """The rows of every combination, medians over `run.repeats` plays of `duration_s` seconds each, the ramp-up included.

    KVTierError for values that make no load, for a directory without room for the files (before any is written), if a request failed, or
    if a page came back wrong; IntegrityError if the bookkeeping contradicts itself at the end.
    """
    pages_of = layout_named(layout, run.tiny)
    if duration_s <= 0:
        raise KVTierError(f"--duration {duration_s:g}: expected seconds above 0")
    if not 0 <= ramp_up_s < duration_s:
        raise KVTierError(f"--ramp-up {ramp_up_s:g}: expected at least 0 and less than --duration, {duration_s:g} seconds")
    shapes = [Shape(*values) for values in itertools.product(batches, sequence_tokens, concurrency, rates)]
    for shape in shapes:
        if min(shape.batch, shape.concurrency) < 1 or not 0 < shape.rate < float("inf") or shape.tokens < pages_of.page_tokens:
            least = f"batch and concurrency at least 1, sequences at least {pages_of.page_tokens} tokens, rate above 0"
            raise KVTierError(f"{shape.name}: expected {least}; see --batch, --concurrency, --sequence-tokens, --rate")
        if shape.rate * duration_s > MOST_REQUESTS:
            raise KVTierError(f"{shape.name}: --rate times --duration is {shape.rate * duration_s:.2g} requests; at most {MOST_REQUESTS:,}")
    check_room(path, max((store_bytes(pages_of, _room(shape, pages_of).disk) for shape in shapes), default=0))
    if run.tiny:
        duration_s, ramp_up_s = TINY_DURATION_S, TINY_DURATION_S / 3
    run.expect(len(shapes) * run.repeats * (int(duration_s / TICK_S) + 2))
    rows = []
    for shape in shapes:
        plays = [_play(run, pages_of, shape, duration_s, ramp_up_s, path) for _ in range(run.repeats)]
        for same in zip(*plays, strict=True):
            ceilings = [row.ceiling for row in same if row.ceiling is not None]
            value = statistics.median(row.value for row in same)
            rows.append(Row(same[0].name, value, same[0].unit, statistics.median(ceilings) if ceilings else None))
    return rows


def plan(shape: Shape, duration_s: float, ramp_up_s: float, sequences: int, seed: int = 0) -> list[Request]:
    """Random arrivals (a Poisson process whose rate climbs linearly during the ramp-up) and whom they ask for, always the same."""
    random = np.random.default_rng(seed)
    popularity = 1.0 / np.arange(1, sequences + 1) ** 0.8
    popularity /= popularity.sum()
    current, fresh = list(range(sequences)), itertools.count(sequences)
    requests: list[Request] = []
    expected = 0.0  # arrivals of a rate of 1 until now; the ramp's are spread by the inverse of what it expects
    while True:
        expected += random.exponential()
        if expected < shape.rate * ramp_up_s / 2:
            at_s = float(np.sqrt(2 * expected * ramp_up_s / shape.rate))
        else:
            at_s = expected / shape.rate + ramp_up_s / 2
        if at_s >= duration_s:
            return requests
        chosen = random.choice(sequences, min(shape.batch, sequences), replace=False, p=popularity).tolist()
        for place in chosen:
            if random.random() < RENEWED:
                current[place] = next(fresh)
        requests.append(Request(at_s, tuple(current[place] for place in chosen)))


def _sequences(shape: Shape) -> int:
    """How many are asked for: more than are held at once."""
    return max(4 * shape.concurrency * shape.batch, 32)


def _room(shape: Shape, layout: PageLayout) -> Room:
    """Of all sequences, an eighth (or as many as are held) on the device, a quarter on the host, half on the disk."""
    pages, sequences = shape.tokens // layout.page_tokens, _sequences(shape)
    device = max(shape.concurrency * shape.batch, sequences // 8)
    return Room(device * pages, host=sequences // 4 * pages, disk=sequences // 2 * pages)


def _play(run: Run, layout: PageLayout, shape: Shape, duration_s: float, ramp_up_s: float, path: Path | None) -> list[Row]:
    pages = shape.tokens // layout.page_tokens
    sequences = _sequences(shape)
    requests = plan(shape, duration_s, ramp_up_s, sequences)
    with open_cache(layout, _room(shape, layout), path, mover__clean_pressure=0.7, mover__queue_bytes="256MiB") as cache:
        run.step(f"{shape.name} filling the tiers")
        service = Service(cache, pages)
        for number in range(sequences):
            service.serve((number,), number)
        before = _hits(cache)
        tally = Tally()
        places, interrupted = itertools.count(), threading.Event()
        start = time.perf_counter()

        def work() -> None:
            while (place := next(places)) < len(requests):
                now_s = time.perf_counter() - start
                if now_s > duration_s or interrupted.wait(max(0.0, requests[place].at_s - now_s)):
                    return
                _serve(service, requests[place], place, start, tally)

        threads = [threading.Thread(target=work, name=f"load-{number}") for number in range(shape.concurrency)]
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                time.sleep(TICK_S)
                _watch(run, cache, shape, tally, time.perf_counter() - start)
        finally:
            interrupted.set()
            for thread in threads:  # they use the cache
                if thread.ident is not None:
                    thread.join()
        run.step(f"{shape.name} checking")
        cache.settle()
        cache.check_integrity()
        hits = {tier: tokens - before[tier] for tier, tokens in _hits(cache).items()}
    if tally.errors:
        listed = "; ".join(f"{count} x {what}" for what, count in tally.errors.most_common(3))
        failed = f"{tally.errors.total()} of {len(tally.ends)} requests failed"
        raise KVTierError(f"{shape.name}: {failed}: {listed}; no load may do that, so please report it with this command line")
    return _rows(shape, requests, tally, hits, duration_s, ramp_up_s)


def _watch(run: Run, cache: TieredKVCache, shape: Shape, tally: Tally, now_s: float) -> None:
    tiers = cache.stats()["tiers"]
    with tally.lock:
        for name, tier in tiers.items():
            tally.utilisation.setdefault(name, []).append(tier["bytes_used"] / tier["capacity_bytes"])
        recent = sum(tokens for end, tokens, _ in tally.ends if end > now_s - WINDOW_S) / WINDOW_S
        done, failed = len(tally.ends), tally.errors.total()
    run.step(f"{shape.name} {now_s:.0f} s: {done} requests, {recent / 1e3:.0f} ktokens/s, {failed} errors")


def _serve(service: Service, request: Request, place: int, start: float, tally: Tally) -> None:
    short, error = 0, ""
    try:
        short = service.serve(request.sequences, place)
    except Exception as failure:  # noqa: BLE001 - whatever it is, it is counted, told, and fails the benchmark
        error = f"{type(failure).__name__}: {failure}"
    end = time.perf_counter() - start
    with tally.lock:
        tally.ends.append((end, len(request.sequences) * service.tokens, end - request.at_s))
        tally.short += short
        if error:
            tally.errors[error] += 1


class Service:
    """Serves requests from one cache; called from any thread. Sequences have `pages` pages each."""

    def __init__(self, cache: TieredKVCache, pages: int) -> None:
        self._cache = cache
        layout = cache.layout
        self.tokens = pages * layout.page_tokens
        generator = torch.Generator().manual_seed(0)
        self._kinds = torch.randn((KINDS, *layout.shape), generator=generator).to(layout.torch_dtype).to(device())

    def serve(self, sequences: Sequence[int], seed: int) -> int:
        """Restore, check, complete and release these sequences; how many the device had no room for. IntegrityError for a wrong page."""
        random = np.random.default_rng(seed)
        leases: list[Lease] = []
        short = 0
        try:
            wanted = [token_ids(number, self.tokens) for number in sequences]
            leases += [self._cache.acquire(self._cache.lookup(ids)) for ids in wanted]
            for ids, lease in zip(wanted, leases, strict=True):
                lease.wait()
                self._check(ids, lease, int(random.integers(self._cache.layout.layers)))
                missing = ids[lease.tokens :]
                if len(missing):
                    short += self._cache.append(lease, missing, self._kv(missing)) < len(missing)
        finally:
            for lease in leases:
                lease.release()
        return short

    def _check(self, ids: Ids, lease: Lease, layer: int) -> None:
        if not lease.tokens:
            return
        slots = torch.as_tensor(lease.slots(), device=self._kinds.device)
        found = lease.layer(layer)[slots].float()
        expected = self._kinds[self._kind(ids[: lease.tokens]), layer].float()
        errors = ((found - expected).square().mean((1, 2, 3, 4)) / expected.square().mean((1, 2, 3, 4))).sqrt()
        worst = int(errors.nan_to_num(float("inf")).argmax())
        if not float(errors[worst]) < MOST_ERROR:
            raise IntegrityError(
                f"a page came back as another one or damaged: relative error above {MOST_ERROR}; the cache must not be used"
            )

    def _kv(self, ids: Ids) -> torch.Tensor:
        """KV that goes with these tokens, `[layers, planes, len(ids), kv_heads, head_dim]`."""
        return self._kinds[self._kind(ids)].permute(1, 2, 0, 3, 4, 5).flatten(2, 3)

    def _kind(self, ids: Ids) -> torch.Tensor:
        firsts: NDArray[np.int64] = ids[:: self._cache.layout.page_tokens] % KINDS
        return torch.from_numpy(firsts).to(self._kinds.device)


def _rows(
    shape: Shape,
    requests: Sequence[Request],
    tally: Tally,
    hits: dict[str, int],
    duration_s: float,
    ramp_up_s: float,
) -> list[Row]:
    """`hits`: tokens that came from each tier."""
    at_full_rate = duration_s - ramp_up_s
    offered = sum(request.at_s >= ramp_up_s for request in requests) * shape.batch * shape.tokens / at_full_rate
    windows = [
        sum(tokens for end, tokens, _ in tally.ends if first <= end < first + WINDOW_S) / WINDOW_S
        for first in np.arange(ramp_up_s, max(duration_s - WINDOW_S, ramp_up_s) + TICK_S / 2, TICK_S)
    ]
    served = sum(tokens for end, tokens, _ in tally.ends if ramp_up_s <= end < duration_s) / at_full_rate
    latencies = [latency for _, _, latency in tally.ends] or [float("nan")]
    asked = max(1, sum(tokens for _, tokens, _ in tally.ends))
    values: list[tuple[str, float, str, float | None]] = [
        ("tokens", served / 1e3, "ktokens/s", offered / 1e3 or None),
        *((f"window.{what.__name__}", what(windows) / 1e3, "ktokens/s", offered / 1e3 or None) for what in (min, statistics.median, max)),
        ("latency.mean", statistics.mean(latencies) * 1e3, "ms", None),
        *((f"latency.p{share * 100:.0f}", percentile(latencies, share) * 1e3, "ms", None) for share in (0.5, 0.95, 0.99)),
        ("hit_rate", sum(hits.values()) / asked, "share", None),
        *((f"hit_rate.{tier}", tokens / asked, "share", None) for tier, tokens in hits.items()),
        *((f"utilisation.{tier}", statistics.mean(shares), "share", None) for tier, shares in tally.utilisation.items()),
        ("unserved", 1 - len(tally.ends) / max(1, len(requests)), "share", None),
        ("short", tally.short / max(1, len(tally.ends) * shape.batch), "share", None),
        ("error_rate", tally.errors.total() / max(1, len(tally.ends)), "share", None),
    ]
    return [Row(f"{shape.name}.{what}", value, unit, ceiling) for what, value, unit, ceiling in values]


def _hits(cache: TieredKVCache) -> dict[str, int]:
    """Tokens served from each tier so far."""
    return {name: int(tier["hit_tokens"]) for name, tier in cache.stats()["tiers"].items()}
