"""What a trace is like: how much is reused, after how long, over how many other pages, and how much is alive at once.

Reuse distance is that of an LRU stack (Mattson et al., 1970): how many different pages were used since a page was last used. Pages of one
request are used tail first, as everywhere in this room. An LRU tier of more pages than the distance finds the page.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtier.replay.trace import Column, Trace

PERCENTILES = (5, 10, 50, 90, 95, 99)
MOMENTS = 60
"""Steps in which the working set is shown over time."""

Percentiles = dict[str, float]
"""Nearest-rank values by "p5", "p10", ...; empty where there is nothing to rank."""


@dataclass(frozen=True)
class WorkingSet:
    """Over equal steps of time, `[steps]` each: end of the step in seconds, requests in it, different pages they named, pages alive.

    A page is alive between its first and its last use; `peak_pages` is the most that were at once, after any request.
    """

    step_s: float
    at_s: NDArray[np.float64]
    requests: Column
    named_pages: Column
    live_pages: Column
    peak_pages: int


@dataclass(frozen=True)
class TraceStats:
    """The figures of one trace. Distances are pages, gaps seconds, lengths tokens; shares are of distinct pages or of input tokens."""

    name: str
    block_tokens: int
    requests: int
    span_s: float
    backwards: int
    accesses: int
    distinct_pages: int
    input_tokens: int
    output_tokens: int
    input_length: Percentiles
    output_length: Percentiles
    infinite_token_hit_ratio: float
    infinite_block_hit_ratio: float
    never_reused_share: float
    reuse_distance: Percentiles
    reuse_gap_s: Percentiles
    working_set: WorkingSet

    def as_json(self) -> dict[str, object]:
        """As `--json` shows it."""
        shown = {key: value for key, value in vars(self).items() if key != "working_set"}
        work = self.working_set
        columns = zip(work.at_s.tolist(), work.requests.tolist(), work.named_pages.tolist(), work.live_pages.tolist(), strict=True)
        names = ("at_s", "requests", "named_pages", "live_pages")
        steps = [dict(zip(names, step, strict=True)) for step in columns]
        return shown | {"working_set": {"step_s": work.step_s, "peak_pages": work.peak_pages, "steps": steps}}


def trace_stats(trace: Trace) -> TraceStats:
    """All figures of `trace`; seconds of work for a million accesses."""
    uses = np.bincount(trace.pages)
    found = trace.sum_per_request(~trace.first_seen)
    order = _tail_first(trace)
    previous = _previous(trace.pages[order])
    again = np.flatnonzero(previous >= 0)
    moments = np.repeat(trace.at_s, trace.lengths)
    return TraceStats(
        name=trace.name,
        block_tokens=trace.block_tokens,
        requests=trace.requests,
        span_s=float(trace.at_s[-1] - trace.at_s[0]),
        backwards=trace.backwards,
        accesses=trace.accesses,
        distinct_pages=trace.distinct,
        input_tokens=trace.tokens,
        output_tokens=int(trace.output_tokens.sum()),
        input_length=percentiles(trace.input_tokens),
        output_length=percentiles(trace.output_tokens),
        infinite_token_hit_ratio=trace.hit_tokens(found) / trace.tokens,
        infinite_block_hit_ratio=float(found.sum()) / trace.accesses,
        never_reused_share=float(np.count_nonzero(uses == 1)) / trace.distinct,
        reuse_distance=percentiles(stack_distances(previous)[again]),
        # The order inside a request does not matter to times.
        reuse_gap_s=percentiles(moments[again] - moments[previous[again]]),
        working_set=_working_set(trace),
    )


def percentiles(values: NDArray[np.int64] | NDArray[np.float64]) -> Percentiles:
    """Nearest-rank percentiles, and the mean."""
    if not len(values):
        return {}
    ranked = np.percentile(values, PERCENTILES, method="inverted_cdf")
    return {f"p{percent}": value.item() for percent, value in zip(PERCENTILES, ranked, strict=True)} | {"mean": float(values.mean())}


def stack_distances(previous: Column) -> Column:
    """Per access, how many different things were accessed since the same thing was; `previous` is where that was, or -1.

    Between two uses at p and i there are i - p - 1 accesses, each of a different thing but for those whose own previous use is after p,
    too. These are counted for all accesses at once, in log2(n) rounds of merging sorted halves.
    """
    size = 1 << max(1, len(previous) - 1).bit_length()
    # Places of earlier accesses are compared with `previous`, and what has none (-1) must not count: it is never larger.
    values = np.full(size, -1, np.int64)
    values[: len(previous)] = previous
    larger_before = np.zeros(size, np.int64)
    width = 1
    while width < size:
        pairs = values.reshape(-1, 2 * width)
        ranked = np.sort(pairs[:, :width], axis=1)
        # One search over all pairs: each pair's numbers are moved to a range of its own.
        offset = np.arange(len(pairs))[:, None] * (size + 2)
        smaller = np.searchsorted((ranked + offset).ravel(), (pairs[:, width:] + offset).ravel(), "right").reshape(-1, width)
        larger = width - (smaller - np.arange(len(pairs))[:, None] * width)
        larger_before.reshape(-1, 2 * width)[:, width:] += larger
        width *= 2
    places = np.arange(len(previous))
    return np.where(previous >= 0, places - previous - 1 - larger_before[: len(previous)], -1)


def _tail_first(trace: Trace) -> Column:
    """Accesses in the order of use: requests as they come, each from its last page to its first."""
    ends = np.repeat(trace.starts[1:], trace.lengths)
    return ends - 1 - trace.depths


def _previous(pages: Column) -> Column:
    """Per access, the place of the same page's access before, or -1."""
    order = np.argsort(pages, kind="stable")
    again = pages[order[1:]] == pages[order[:-1]]
    previous = np.full(len(pages), -1, np.int64)
    previous[order[1:][again]] = order[:-1][again]
    return previous


def _working_set(trace: Trace) -> WorkingSet:
    requests = np.repeat(np.arange(trace.requests), trace.lengths)
    first, last = np.full(trace.distinct, trace.requests), np.zeros(trace.distinct, np.int64)
    np.minimum.at(first, trace.pages, requests)
    np.maximum.at(last, trace.pages, requests)
    born = np.bincount(first, minlength=trace.requests)
    died = np.bincount(last, minlength=trace.requests)
    # A page used by one request only is never alive after it.
    live = np.cumsum(born) - np.cumsum(died)
    begin, span = float(trace.at_s[0]), float(trace.at_s[-1] - trace.at_s[0])
    step_s = span / MOMENTS if span else 1.0
    step_of = np.minimum((trace.at_s - begin) / step_s, MOMENTS - 1).astype(np.int64)
    ends = np.searchsorted(step_of, np.arange(MOMENTS), "right")
    named = np.unique(np.repeat(step_of, trace.lengths) * trace.distinct + trace.pages) // trace.distinct
    return WorkingSet(
        step_s=step_s,
        at_s=begin + step_s * np.arange(1, MOMENTS + 1, dtype=np.float64),
        requests=np.bincount(step_of, minlength=MOMENTS),
        named_pages=np.bincount(named, minlength=MOMENTS),
        live_pages=np.concatenate(([0], live))[ends],
        peak_pages=int(live.max()),
    )
