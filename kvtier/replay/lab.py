"""Replays a trace through one tier's policy: the very object that the live cache runs, on page ids instead of pages.

What a request does, all at its own time: it finds the longest prefix of its pages that is here; these are touched; room is made for the
rest, of which none of its own pages pays; the rest is inserted. So every page of a request is touched or inserted once, and where a
policy compares only times, the deeper page leaves first. A request longer than the tier keeps its head. Requests take no time.

The harness works on a request's pages at once. It owns a column of who is here; the policy has its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvtier.errors import IntegrityError
from kvtier.policy import EvictionPolicy, SmoothedPressure
from kvtier.replay.trace import Column, Trace

STEP_REQUESTS = 2000
"""Requests between two words to who waits."""

_TRUE, _FALSE = np.array(True), np.array(False)


def nobody_waits(_requests: int) -> None:
    """For a replay that needs no word about its progress."""


def seconds_since(begun: float) -> float:
    """Processor time of this thread since `time.thread_time()` was `begun`: other work on the machine does not count. At least a tick."""
    return max(time.thread_time() - begun, time.get_clock_info("thread_time").resolution)


@dataclass(frozen=True)
class Outcome:
    """What a replay found. `hit_pages` `[requests]`; `inserted` and `evicted` count pages; `seconds` are processor time."""

    hit_pages: Column
    inserted: int
    evicted: int
    seconds: float


def replay(trace: Trace, policy: EvictionPolicy, capacity: int, step: Callable[[int], None] = nobody_waits) -> Outcome:
    """Replay `trace` through a new `policy` for a tier of `capacity` pages (at least 1); `step` hears how many requests are done."""
    resident = np.zeros(trace.distinct, np.bool_)
    running = np.zeros(trace.distinct, np.bool_)
    smoothed = SmoothedPressure()
    touch, insert, evict, protected = policy.touch, policy.insert, policy.evict, running.__getitem__
    pages, parents, depths = trace.pages, trace.parents, trace.depths
    starts, times = trace.starts.tolist(), trace.at_s.tolist()
    hits = [0] * trace.requests
    free, evicted, inserted = capacity, 0, 0
    begun = time.thread_time()
    for request, now in enumerate(times):
        start, stop = starts[request], starts[request + 1]
        named = pages[start : min(stop, start + capacity)]
        # Only leaves leave, so what is here of a prefix is a prefix, and counting it is enough.
        found = hits[request] = int(np.count_nonzero(resident[named]))
        if found:
            touch(named[:found], now)
        missing = len(named) - found
        if missing:
            if missing > free:
                running[named] = _TRUE
                victims = evict(missing - free, protected, now, smoothed.observe(capacity - free, capacity))
                running[named] = _FALSE
                if victims is None:
                    raise IntegrityError(f"{policy.name} gave no {missing - free} of {capacity - free} pages, though nobody holds them")
                resident[victims] = _FALSE
                evicted += len(victims)
                free += len(victims)
            first, last = start + found, start + len(named)
            fresh = pages[first:last]
            insert(fresh, parents[first:last], depths[first:last], now)
            resident[fresh] = _TRUE
            free -= missing
            inserted += missing
        if request % STEP_REQUESTS == 0:
            step(request)
    return Outcome(np.array(hits, np.int64), inserted, evicted, seconds_since(begun))
