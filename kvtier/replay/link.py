"""What look-ahead buys: a request is known some milliseconds before it starts, and its cold pages are on their way from then on.

One serial link per tier, first come, first served, as the mover's queue of one link: pages of a request that come while the link works
for an earlier one wait. No page is brought up for a request that is not known yet.

Beside what look-ahead could bring (`look_ahead`) stands what the live cache's prefetcher brings of it (`prefetched`): a hint when the
request is known, for as many of its first pages as the budget has room for (pages of hints whose requests have not started); the rest,
and what is still queued when the request starts, goes before all hints then.

Traces tend to round their timestamps (the Mooncake conversation trace to 3 seconds), and a link would then seem to meet crowds that never
were. So requests that share a timestamp are taken to have come at random moments before the next timestamp, always the same ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtier.replay.tiers import TiersOutcome
from kvtier.replay.trace import Trace


@dataclass(frozen=True)
class Link:
    """A link's speed, and how well it does ahead of requests.

    `use`: share of the trace's time that it works. `stall_ms`: how long a request with pages from there waits for the last of them
    without look-ahead, on average. `in_place` per look-ahead in milliseconds: the share of those pages' bytes that were in place when
    their request started. `prefetched`: the same of the prefetcher, with its budget. None where the tier served no page, or the trace
    takes no time.
    """

    bytes_per_s: float
    use: float | None
    stall_ms: float | None
    in_place: dict[float, float | None]
    prefetched: dict[float, float | None]

    def as_json(self) -> dict[str, object]:
        """As `--json` shows it: look-ahead by its milliseconds as text."""
        shares = {f"{ahead:g}": share for ahead, share in self.in_place.items()}
        brought = {f"{ahead:g}": share for ahead, share in self.prefetched.items()}
        plain = {"bytes_per_s": self.bytes_per_s, "use": self.use, "stall_ms": self.stall_ms}
        return plain | {"in_place": shares, "prefetched": brought}


def look_ahead(
    trace: Trace, outcome: TiersOutcome, tier: int, bytes_per_s: float, page_bytes: int, ahead_ms: Sequence[float], budget_pages: int
) -> Link:
    """How the link from `tier` to the first would have served this replay, with each look-ahead."""
    wanted = trace.sum_per_request(outcome.served == tier)
    work_s = wanted[wanted > 0] * (page_bytes / bytes_per_s)
    arrivals = arrivals_s(trace)[wanted > 0]
    span = float(trace.at_s[-1] - trace.at_s[0])
    if not len(work_s):
        return Link(bytes_per_s, 0.0 if span else None, None, dict.fromkeys(ahead_ms), dict.fromkeys(ahead_ms))
    # A request's pages start when it is known and the link is free of those before it (Lindley's recursion, unrolled).
    before = np.cumsum(work_s) - work_s
    waits = before + np.maximum.accumulate(arrivals - before) - arrivals
    in_place = {ahead: float(np.clip(ahead / 1000 - waits, 0, work_s).sum() / work_s.sum()) for ahead in ahead_ms}
    pages, page_s = wanted[wanted > 0], page_bytes / bytes_per_s
    brought = {ahead: prefetched(arrivals, pages, page_s, ahead / 1000, budget_pages) for ahead in ahead_ms}
    use = float(work_s.sum()) / span if span else None
    return Link(bytes_per_s, use, float((waits + work_s).mean()) * 1000, dict(in_place), dict(brought))


def prefetched(arrivals: NDArray[np.float64], pages: NDArray[np.int64], page_s: float, ahead_s: float, budget_pages: int) -> float:
    """The share of `pages` `[requests]` that are in place when their requests start, `ahead_s` after `arrivals`; a page takes `page_s`.

    A fluid queue: pages arrive bit by bit, those of requests that started first, and hints in the order of their requests.
    """
    requests = len(pages)
    hinted, left = [0.0] * requests, [0.0] * requests
    """Work of a request's hint, and of that what is still to be done."""
    hints: deque[int] = deque()
    demand, outstanding, in_place, now = 0.0, 0, 0.0, -np.inf
    known, started = 0, 0
    at, counts = arrivals.tolist(), pages.tolist()
    while started < requests:
        starts = at[started] + ahead_s
        due = known == requests or starts <= at[known]
        upon = starts if due else at[known]
        time = upon - now
        served = min(demand, time)
        demand, time = demand - served, time - served
        while hints and time > 0:
            served = min(left[hints[0]], time)
            left[hints[0]] -= served
            time -= served
            if left[hints[0]] > 0:
                break
            hints.popleft()
        now = upon
        if due:
            in_place += hinted[started] - left[started]
            demand += counts[started] * page_s - (hinted[started] - left[started])
            outstanding -= round(hinted[started] / page_s)
            left[started] = 0.0
            started += 1
        else:
            room = min(counts[known], max(0, budget_pages - outstanding))
            outstanding += room
            hinted[known] = left[known] = room * page_s
            hints.append(known)
            known += 1
    return in_place / (float(pages.sum()) * page_s)


def arrivals_s(trace: Trace) -> NDArray[np.float64]:
    """When requests came, `[requests]`, those of one timestamp spread over the time to the next; the last ones over the median of that."""
    moments, which, sharing = np.unique(trace.at_s, return_inverse=True, return_counts=True)
    gaps = np.diff(moments)
    gaps = np.append(gaps, np.median(gaps) if len(gaps) else 0.0)
    chance = np.random.default_rng(0).random(trace.requests)
    return np.sort(trace.at_s + np.where(sharing[which] > 1, chance * gaps[which], 0.0))
