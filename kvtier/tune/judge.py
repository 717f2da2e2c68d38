"""What a configuration finds: the replays that a search asks for, on the first half of traces or on both halves.

The second half is served by tiers that served the first, as a running server would: what was learned and what is held stay. So a trace is
replayed whole and the requests of its second half are counted. Nothing of the second half is known to the search.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from kvtier.config import Config
from kvtier.config.tree import PolicyConfig
from kvtier.errors import KVTierError
from kvtier.policy import A2CRParameters, EvictionPolicy, PressureBand, make_policy
from kvtier.replay.lab import nobody_waits, replay
from kvtier.replay.tiers import NOWHERE, SELECTIVE, Tiers
from kvtier.replay.trace import Column, Trace
from kvtier.tune.rooms import Room

Step = Callable[[int], None]


@dataclass(frozen=True)
class Cell:
    """Token hit ratios of one trace in one room, per half; pages that travelled between tiers (0 with one) over both."""

    trace: str
    room: str
    first: float
    second: float
    moved_pages: int


class Judge:
    """Replays `traces` in `rooms`. KVTierError for a trace of fewer than two requests, or rooms that do not fit."""

    def __init__(self, traces: Sequence[Trace], rooms: Sequence[Room]) -> None:
        for trace in traces:
            if trace.requests < 2:
                raise KVTierError(f"{trace.name} has {trace.requests} request; expected at least 2: a half to search on, a half to check")
        # Shares are of the whole trace's pages: both halves meet the same tiers.
        self._planned = [(trace, trace.head(trace.requests // 2), room, room.pages(trace)) for trace in traces for room in rooms]

    @property
    def requests(self) -> int:
        """Requests that one call of `first_half` replays."""
        return sum(half.requests for _, half, _, _ in self._planned)

    def first_half(self, config: Config, step: Step = nobody_waits) -> float:
        """Mean token hit ratio over traces and rooms on the first halves."""
        ratios = []
        done = 0
        for _, half, room, pages in self._planned:
            tokens, _ = _found(config, half, room, pages, lambda requests, done=done: step(done + requests))  # type: ignore[misc]
            ratios.append(int(tokens.sum()) / half.tokens)
            done += half.requests
        return float(np.mean(ratios))

    def both_halves(self, config: Config, step: Step = nobody_waits) -> list[Cell]:
        """A cell for each trace and room."""
        cells = []
        done = 0
        for trace, half, room, pages in self._planned:
            tokens, moved = _found(config, trace, room, pages, lambda requests, done=done: step(done + requests))  # type: ignore[misc]
            first = int(tokens[: half.requests].sum())
            second = (int(tokens.sum()) - first) / (trace.tokens - half.tokens)
            cells.append(Cell(trace.name, room.text, first / half.tokens, second, moved))
            done += trace.requests
        return cells


def mean_first(cells: Sequence[Cell]) -> float:
    """What `first_half` says of them."""
    return float(np.mean([cell.first for cell in cells]))


def mean_second(cells: Sequence[Cell]) -> float:
    """The same on the second halves."""
    return float(np.mean([cell.second for cell in cells]))


def check_replayable(config: Config, rooms: Sequence[Room]) -> None:
    """KVTierError if the lab cannot replay what the configuration says."""
    for room in rooms:
        uses = {getattr(config, tier).selective_uses for tier in room.names[1:] if getattr(config, tier).write_policy == SELECTIVE}
        if len(uses) > 1:
            raise KVTierError("host.selective_uses and disk.selective_uses differ; replay knows one for all tiers, so make them equal")


def _found(config: Config, trace: Trace, room: Room, pages: list[int], step: Step) -> tuple[Column, int]:
    """Tokens that each request finds in any tier, and pages that travelled."""
    policies = [_policy(config.policy, trace.block_tokens) for _ in pages]
    if len(pages) == 1:
        hit_pages, moved = replay(trace, policies[0], pages[0], step).hit_pages, 0
    else:
        below = [getattr(config, tier) for tier in room.names[1:]]
        uses = next((section.selective_uses for section in below if section.write_policy == SELECTIVE), 2)
        writes = [section.write_policy for section in below]
        outcome = Tiers(trace, policies, pages, writes, uses, config.policy.admission).replay(step)
        hit_pages, moved = trace.sum_per_request(outcome.served != NOWHERE), outcome.moved.total()
    return np.minimum(hit_pages * trace.block_tokens, trace.input_tokens), moved


def _policy(config: PolicyConfig, page_tokens: int) -> EvictionPolicy:
    bands = tuple(PressureBand(**band.model_dump()) for band in config.bands)
    plain = {field.name: getattr(config, field.name) for field in fields(A2CRParameters) if field.name != "bands"}
    return make_policy(config.name, A2CRParameters(**plain, bands=bands), page_tokens)
