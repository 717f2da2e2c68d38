"""vLLM's own bookkeeping of a tier in memory over the same stream of requests: the rows `stream.TRACE.vllm-POLICY` of `table.py`.

The calls are those with which its scheduler takes a request from lookup to end, on `CPUOffloadingManager` (`vllm.v1.kv_offload`). Keys,
and where they are in their request, are given; in ours keys are, too. Microseconds per page, beside the same floor.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from kvtier.engines.versions import require_engine

require_engine("vllm")

from vllm.v1.kv_offload.base import LookupResult, OffloadKey, ReqContext, make_offload_key  # noqa: E402  # after the check
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager  # noqa: E402

from .measure import Row, Run  # noqa: E402
from .stream import SLOW_REPEATS, Stream, least_lru  # noqa: E402

POLICIES = ("lru", "arc")


@dataclass(frozen=True)
class Asked:
    """A request as vLLM's scheduler names it."""

    context: ReqContext
    keys: Sequence[OffloadKey]


def vllm_rows(run: Run, stream: Stream, capacity: int) -> list[Row]:
    """The rows. Of a request longer than `capacity` pages only the beginning is asked for, as in ours."""
    rows = []
    for policy in POLICIES:
        run.step(f"{stream.name} through vLLM's {policy}")
        totals, floors = [], []
        for _ in range(min(run.repeats, SLOW_REPEATS)):
            floors.append(least_lru(stream, capacity))
            took, found = replay(asked(stream, capacity), capacity, policy)
            totals.append(took)
        label = f"stream.{stream.name}.vllm-{policy}"
        rows += [
            Row(label, statistics.median(totals) / stream.pages * 1e6, "us/block", statistics.median(floors) / stream.pages * 1e6),
            Row(f"{label}.hit_ratio", found / stream.pages, "share of pages"),
        ]
    return rows


def asked(stream: Stream, capacity: int) -> list[Asked]:
    """The stream's requests with vLLM's keys, which know their places."""
    made: dict[bytes, OffloadKey] = {}
    requests = []
    for number, request in enumerate(stream.requests):
        context = ReqContext(req_id=str(number))
        keys = [made.setdefault(key, make_offload_key(key, 0)) for key in request.keys[:capacity]]
        for place, key in enumerate(keys):
            context.set_offload_key_position(key, place + 1)
        requests.append(Asked(context, keys))
    return requests


def replay(requests: Sequence[Asked], capacity: int, policy: str) -> tuple[float, int]:
    """Seconds of all requests, one after the other, and how many of their pages were found."""
    manager = CPUOffloadingManager(num_chunks=capacity, cache_policy=policy)
    found = 0
    start = time.perf_counter()
    for request in requests:
        found += serve(manager, request)
    return time.perf_counter() - start, found


def serve(manager: CPUOffloadingManager, request: Asked) -> int:
    """One request from lookup to end; how many of its pages were found."""
    context, keys = request.context, request.keys
    manager.on_new_request(context)
    found = next((place for place, key in enumerate(keys) if manager.lookup(key, context) is not LookupResult.HIT), len(keys))
    if found:
        manager.prepare_load(keys[:found], context)
        manager.complete_load(keys[:found], context)
    if (stored := manager.prepare_store(keys, context)) is not None:
        manager.complete_store(stored.keys_to_store, context)
    manager.on_request_finished(context)
    return found
