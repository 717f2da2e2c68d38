"""What `kvtier replay` does: every policy at every capacity, or through the same tiers, each beside LRU and the optimum.

A row's hit ratios are of the whole trace, the first requests included. `gap_closed` is where the token hit ratio lies between that of
one LRU tier (0) and that of the optimum (1) of the same capacity, for several tiers of their sum; below 0 is worse than LRU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kvtier.policy import LRU, make_policy
from kvtier.policy.admission import Regret
from kvtier.replay.capacities import Capacity, Layout
from kvtier.replay.lab import replay, seconds_since
from kvtier.replay.link import Link, look_ahead
from kvtier.replay.optimum import OPTIMUM, Future
from kvtier.replay.tiers import NOWHERE, Tiers, TiersOutcome
from kvtier.replay.trace import Trace

TOKEN_BYTES = 128 * 2**10
"""KV of one token of Llama-3-8B in bf16: what a page weighs where nobody says."""

BUDGET_SHARE = 2
"""Pages hinted at and not used yet may take this part of the first tier, as in the live cache by default."""

Progress = Callable[[int, int, str], None]
"""(requests done, requests in all, what is replayed now)."""


@dataclass(frozen=True)
class TierRow:
    """One tier of a row: what requests found there, and the link from there to the first, if it was timed."""

    name: str
    policy: str
    capacity_pages: int
    token_hit_ratio: float
    block_hit_ratio: float
    evicted_pages: int
    link: Link | None

    def as_json(self) -> dict[str, object]:
        """As `--json` shows it."""
        return vars(self) | {"link": None if self.link is None else self.link.as_json()}


@dataclass(frozen=True)
class MovedRow:
    """Pages that travelled between two tiers, and their bytes."""

    source: str
    target: str
    pages: int
    bytes: int


@dataclass(frozen=True)
class Row:
    """One replay. `written_pages` came into the (first) tier; both counts are None for the optimum, which only knows what it finds."""

    trace: str
    policy: str
    capacity: str
    capacity_pages: int
    token_hit_ratio: float
    block_hit_ratio: float
    gap_closed: float | None
    accesses_per_s: float
    written_pages: int | None
    evicted_pages: int | None
    page_bytes: int
    tiers: tuple[TierRow, ...] = ()
    moved: tuple[MovedRow, ...] = ()
    regret: Regret | None = None

    def as_json(self) -> dict[str, object]:
        """As `--json` shows it; `bytes_moved` is what came into the tier, or all that travelled between tiers."""
        written = None if self.written_pages is None else self.written_pages * self.page_bytes
        shown = vars(self) | {"bytes_moved": sum(move.bytes for move in self.moved) if self.tiers else written}
        if not self.tiers:
            return {key: value for key, value in shown.items() if key not in ("tiers", "moved", "regret")}
        own = {"tiers": [tier.as_json() for tier in self.tiers], "moved": [vars(move) for move in self.moved]}
        return shown | own | {"regret": None if self.regret is None else vars(self.regret)}


def replay_capacities(
    traces: Sequence[Trace], policies: Sequence[str], capacities: Sequence[Capacity], page_bytes: int | None, progress: Progress
) -> list[Row]:
    """One tier: a row for each trace, capacity and policy, and one for the optimum."""
    planned = [(trace, capacity, capacity.pages(trace)) for trace in traces for capacity in capacities]
    with_lru = list(dict.fromkeys([LRU.name, *policies]))
    step = _Steps(progress, sum(trace.requests for trace, _, _ in planned) * len(with_lru))
    futures = {id(trace): Future(trace) for trace in traces}
    rows = []
    for trace, capacity, pages in planned:
        yardstick = _Yardstick(trace, futures[id(trace)], pages)
        found: dict[str, Row] = {}
        for name in with_lru:
            outcome = replay(
                trace,
                make_policy(name, page_tokens=trace.block_tokens),
                pages,
                step.on(f"{trace.name} through {capacity.text} of {name}", trace.requests),
            )
            tokens = trace.hit_tokens(outcome.hit_pages)
            if name == LRU.name:
                yardstick.lru_tokens = tokens
            found[name] = Row(
                trace=trace.name,
                policy=name,
                capacity=capacity.text,
                capacity_pages=pages,
                token_hit_ratio=tokens / trace.tokens,
                block_hit_ratio=int(outcome.hit_pages.sum()) / trace.accesses,
                gap_closed=yardstick.gap_closed(tokens),
                accesses_per_s=trace.accesses / outcome.seconds,
                written_pages=outcome.inserted,
                evicted_pages=outcome.evicted,
                page_bytes=_page_bytes(trace, page_bytes),
            )
        rows += [found[name] for name in policies]
        rows.append(yardstick.row(capacity.text, _page_bytes(trace, page_bytes)))
    return rows


def replay_tiers(
    traces: Sequence[Trace], policies: Sequence[str], layouts: Sequence[Layout], page_bytes: int | None, progress: Progress
) -> list[Row]:
    """Several tiers: a row for each trace, layout and choice of policies (`lru` for all tiers, or like `lru/a2cr-classic`)."""
    chosen = {layout: [layout.policies(text) for text in policies] for layout in layouts}
    planned = [(trace, layout, [capacity.pages(trace) for capacity in layout.capacities]) for trace in traces for layout in layouts]
    step = _Steps(progress, sum(trace.requests * (1 + len(chosen[layout])) for trace, layout, _ in planned))
    rows = []
    for trace, layout, pages in planned:
        total = min(sum(pages), trace.distinct)
        yardstick = _Yardstick(trace, Future(trace), total)
        lru = replay(trace, LRU(), total, step.on(f"{trace.name} through one LRU tier", trace.requests))
        yardstick.lru_tokens = trace.hit_tokens(lru.hit_pages)
        for names in chosen[layout]:
            label = "/".join(names)
            own = [make_policy(name, page_tokens=trace.block_tokens) for name in names]
            tiers = Tiers(trace, own, pages, layout.writes, layout.selective_uses, layout.admission)
            outcome = tiers.replay(step.on(f"{trace.name} through {label}", trace.requests))
            rows.append(_tiers_row(trace, layout, names, pages, outcome, yardstick, _page_bytes(trace, page_bytes)))
    return rows


def _tiers_row(
    trace: Trace, layout: Layout, names: list[str], pages: list[int], outcome: TiersOutcome, yardstick: _Yardstick, page_bytes: int
) -> Row:
    # Only the last page of a request holds fewer tokens than a block.
    page_tokens = np.minimum(trace.block_tokens, np.repeat(trace.input_tokens, trace.lengths) - trace.depths * trace.block_tokens)
    places = (outcome.served - NOWHERE).astype(np.int64)
    hit_pages = np.bincount(places, minlength=1 + len(names)).tolist()[1:]
    hit_tokens = [round(tokens) for tokens in np.bincount(places, page_tokens, minlength=1 + len(names)).tolist()[1:]]
    tiers = []
    for tier, name in enumerate(layout.names):
        link = None
        if tier and layout.link_bytes_per_s:
            speed, budget = layout.link_bytes_per_s[tier - 1], max(1, pages[0] // BUDGET_SHARE)
            link = look_ahead(trace, outcome, tier, speed, page_bytes, layout.look_ahead_ms, budget)
        ratios = hit_tokens[tier] / trace.tokens, hit_pages[tier] / trace.accesses
        tiers.append(TierRow(name, names[tier], pages[tier], *ratios, outcome.evicted[tier], link))
    return Row(
        trace=trace.name,
        policy="/".join(names),
        capacity=layout.text,
        capacity_pages=sum(pages),
        token_hit_ratio=sum(hit_tokens) / trace.tokens,
        block_hit_ratio=sum(hit_pages) / trace.accesses,
        gap_closed=yardstick.gap_closed(sum(hit_tokens)),
        accesses_per_s=trace.accesses / outcome.seconds,
        written_pages=outcome.inserted,
        evicted_pages=sum(outcome.evicted),
        page_bytes=page_bytes,
        tiers=tuple(tiers),
        moved=tuple(
            MovedRow(layout.names[source], layout.names[target], count, count * page_bytes)
            for (source, target), count in sorted(outcome.moved.items())
        ),
        regret=outcome.regret,
    )


class _Yardstick:
    """LRU and optimum of one trace and capacity."""

    def __init__(self, trace: Trace, future: Future, pages: int) -> None:
        self.trace, self.pages = trace, pages
        begun = time.thread_time()
        self.hit_pages = future.hit_pages(pages)
        self.seconds = seconds_since(begun)
        self.tokens = trace.hit_tokens(self.hit_pages)
        self.lru_tokens = 0

    def gap_closed(self, tokens: int) -> float | None:
        """None where LRU is the optimum."""
        gap = self.tokens - self.lru_tokens
        return (tokens - self.lru_tokens) / gap if gap else None

    def row(self, capacity: str, page_bytes: int) -> Row:
        return Row(
            trace=self.trace.name,
            policy=OPTIMUM,
            capacity=capacity,
            capacity_pages=self.pages,
            token_hit_ratio=self.tokens / self.trace.tokens,
            block_hit_ratio=int(self.hit_pages.sum()) / self.trace.accesses,
            gap_closed=self.gap_closed(self.tokens),
            accesses_per_s=self.trace.accesses / self.seconds,
            written_pages=None,
            evicted_pages=None,
            page_bytes=page_bytes,
        )


class _Steps:
    """Requests done over all replays, for a progress bar."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.begun = progress, total, 0

    def on(self, what: str, requests: int) -> Callable[[int], None]:
        """What the next replay, of so many requests, is to report to."""
        before = self.begun
        self.begun += requests
        return lambda done: self.progress(before + done, self.total, what)


def _page_bytes(trace: Trace, page_bytes: int | None) -> int:
    return trace.block_tokens * TOKEN_BYTES if page_bytes is None else page_bytes
