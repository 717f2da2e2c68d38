"""Replays a trace through several tiers at once, warmest first, by the rules of `kvtier.residency`, on page ids instead of pages.

A request finds the longest prefix of which every page is in some tier, takes each page from the warmest, and has all its pages in the
first tier afterwards. What leaves a tier goes one down unless a colder copy is there, which then inherits its recency; what finds no room
goes further down; what leaves the last tier is gone. Per tier below the first, a write policy says how pages come into it:

- `write_back`, `write_through`, `write_through_selective`: as in the live cache. Copies stay where they are when a page is brought up.
- `exclusive`: as `write_back`, but a page that is brought up leaves the tier it came from, so no page is anywhere twice. The live cache
  does not do this; it is how capacities add up, and the figure to hold the others against.

Into a `write_back` tier comes what is worth the write (`kvtier.policy.admission`), unless everything is to be admitted.

Not replayed: what takes time rather than room (queues, failed transfers, cleaning ahead of demand), and clean-up by thresholds.

Each tier below the first has a clock of its own that runs with the requests' and ticks between pages last used at different times, so
that a tier's policy sees them arrive in the order in which they left, as it would in a live cache.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvtier.errors import IntegrityError
from kvtier.policy import EvictionPolicy, Mask, Pages, SmoothedPressure
from kvtier.policy.admission import AUTO, Admission, Regret
from kvtier.replay.lab import STEP_REQUESTS, nobody_waits, seconds_since
from kvtier.replay.trace import Trace

EXCLUSIVE, WRITE_BACK, WRITE_THROUGH, SELECTIVE = "exclusive", "write_back", "write_through", "write_through_selective"
WRITE_POLICIES = (EXCLUSIVE, WRITE_BACK, WRITE_THROUGH, SELECTIVE)

NOWHERE = -1


@dataclass(frozen=True)
class TiersOutcome:
    """What a replay found. `served` int8 `[accesses]`: the tier that each page was found in, or NOWHERE.

    `inserted` counts pages that came into the first tier; `moved` pages per link (from, to); `evicted` per tier, whatever became of the
    page; `regret` what was worth a write and what came back; `seconds` are processor time.
    """

    served: NDArray[np.int8]
    inserted: int
    moved: Counter[tuple[int, int]]
    evicted: list[int]
    regret: Regret
    seconds: float


class Tiers:
    """Tiers of `capacities` pages with a new policy each; `writes` are the write policies of those below the first."""

    def __init__(
        self,
        trace: Trace,
        policies: Sequence[EvictionPolicy],
        capacities: Sequence[int],
        writes: Sequence[str],
        selective_uses: int = 2,
        admission: str = AUTO,
    ) -> None:
        self.trace = trace
        self.policies = policies
        self.capacities = capacities
        self.entry = ["", *writes]
        self.selective_uses = selective_uses
        self.last = len(policies) - 1
        self.free = list(capacities)
        self.here = np.zeros((len(policies), trace.distinct), np.bool_)
        self.running = np.zeros(trace.distinct, np.bool_)
        self.uses = np.zeros(trace.distinct, np.int64)
        """Uses since the page came from nowhere; being computed is the first."""
        self.used_at = np.zeros(trace.distinct)
        self.clock = [-math.inf for _ in policies]
        self.smoothed = [SmoothedPressure() for _ in policies]
        self.moved: Counter[tuple[int, int]] = Counter()
        self.inserted = 0
        self.evicted = [0 for _ in policies]
        self.admission = Admission(capacities[-1], admission)
        self._parents, self._depths = np.empty(trace.distinct, np.int64), np.empty(trace.distinct, np.int64)
        self._parents[trace.pages], self._depths[trace.pages] = trace.parents, trace.depths

    def replay(self, step: Callable[[int], None] = nobody_waits) -> TiersOutcome:
        """Serve all requests; `step` hears how many are done. Once."""
        trace = self.trace
        served = np.full(trace.accesses, NOWHERE, np.int8)
        starts = trace.starts.tolist()
        begun = time.thread_time()
        for request, now in enumerate(trace.at_s.tolist()):
            start, stop = starts[request], starts[request + 1]
            homes = self.serve(trace.pages[start : min(stop, start + self.capacities[0])], now)
            served[start : start + len(homes)] = homes
            if request % STEP_REQUESTS == 0:
                step(request)
        return TiersOutcome(served, self.inserted, self.moved, self.evicted, self.admission.regret, seconds_since(begun))

    def serve(self, named: Pages, now: float) -> NDArray[np.int64]:
        """One request for these pages, which fit the first tier; the tiers of those that were found."""
        self.clock = [max(clock, now) for clock in self.clock]
        here = self.here[:, named]
        found: Mask = np.logical_or.reduce(here)
        head = named if found.all() else named[: int(found.argmin())]
        homes: NDArray[np.int64] = here[:, : len(head)].argmax(0)
        self.running[named] = True
        self._touch(head[homes == 0], 0)
        for tier in range(1, self.last + 1):
            self._bring_up(head[homes == tier], tier)
        coming = named[~self.here[0, named]]
        self._make_room(0, len(coming))
        self.admission.computed(named[len(homes) :])
        self._insert(coming, 0)
        self.inserted += len(coming)
        self.uses[named] += 1
        self.used_at[named] = now
        for tier in range(self.last):
            self._tend(tier, named[self.here[tier, named]])
        self.running[named] = False
        return homes

    def _bring_up(self, pages: Pages, tier: int) -> None:
        if not len(pages):
            return
        self.moved[tier, 0] += len(pages)
        if self.entry[tier] == EXCLUSIVE:
            self.policies[tier].remove(pages)
            self._left(pages, tier)
        else:
            self._touch(pages, tier)

    def _tend(self, tier: int, pages: Pages) -> None:
        """Write down what must be, of pages that came into `tier` or were used there."""
        if tier == self.last or self.entry[tier + 1] in (WRITE_BACK, EXCLUSIVE):
            return
        self._place(tier + 1, pages[~self._has_copy_below(pages, tier) & self._is_wanted_below(pages, tier)], tier)

    def _make_room(self, tier: int, count: int) -> int:
        """Let pages go until `count` are free, or as many as can be had; how many are."""
        missing = count - self.free[tier]
        if missing > 0:
            policy, used = self.policies[tier], self.capacities[tier] - self.free[tier]
            protected, now = self.running.__getitem__, self.clock[tier]
            pressure = self.smoothed[tier].observe(used, self.capacities[tier])
            victims = policy.evict(missing, protected, now, pressure)
            if victims is None:
                victims = policy.evict(len(policy.peek(missing, protected, now, pressure)), protected, now, pressure)
            if victims is None or (tier == 0 and len(victims) < missing):
                raise IntegrityError(f"{policy.name} gave no {missing} of {used} pages, though nobody holds them")
            self._sink(victims, tier)
        return min(count, self.free[tier])

    def _sink(self, victims: Pages, tier: int) -> None:
        """Pages that the policy of `tier` let go, in leaving order."""
        self.evicted[tier] += len(victims)
        refused: Mask = np.zeros(len(victims), np.bool_)
        if tier < self.last:
            saved = self._has_copy_below(victims, tier)
            heirs = victims[saved]
            for below in range(tier + 1, self.last + 1):
                known = self.here[below, heirs]
                self._touch(heirs[known], below)
                heirs = heirs[~known]
            homeless = victims[~saved]
            chances = self.policies[tier].chance(homeless, self.clock[tier])
            worth = self._is_wanted_below(homeless, tier) & self._is_worth_writing(chances, tier)
            refused[~saved] = ~worth
            promised = chances[~worth]
            homeless = homeless[worth][::-1]
            for below in range(tier + 1, self.last + 1):
                before = len(homeless)
                homeless = self._place(below, homeless, tier)
                self.admission.admit(before - len(homeless))
        self._left(victims, tier)
        gone = self._is_gone(victims)
        self.uses[victims[gone]] = 0
        if tier < self.last:
            self.admission.refuse(victims[refused & gone], promised[gone[refused]])
        self.admission.evict(victims[gone & ~refused])

    def _is_gone(self, pages: Pages) -> Mask:
        gone: Mask = ~np.logical_or.reduce(self.here[:, pages])
        return gone

    def _is_worth_writing(self, chances: NDArray[np.float64], tier: int) -> Mask:
        if self.entry[tier + 1] != WRITE_BACK:
            return np.ones(len(chances), np.bool_)
        return self.admission.worth(chances)

    def _place(self, tier: int, pages: Pages, source: int) -> Pages:
        """Copy `pages`, hottest first, from `source` into `tier`, as many as it has room for; the others."""
        if not len(pages):
            return pages
        room = self._make_room(tier, min(len(pages), self.capacities[tier]))
        placed = pages[:room][::-1]
        bounds = [0, *(np.flatnonzero(np.diff(self.used_at[placed])) + 1).tolist(), len(placed)]
        for start, stop in itertools.pairwise(bounds):
            part = placed[start:stop]
            self.clock[tier] = math.nextafter(self.clock[tier], math.inf)
            self._insert(part, tier)
        self.moved[source, tier] += room
        self._tend(tier, placed)
        return pages[room:]

    def _has_copy_below(self, pages: Pages, tier: int) -> Mask:
        below: Mask = np.logical_or.reduce(self.here[tier + 1 :, pages])
        return below

    def _is_wanted_below(self, pages: Pages, tier: int) -> Mask:
        if self.entry[tier + 1] != SELECTIVE:
            return np.ones(len(pages), np.bool_)
        wanted: Mask = self.uses[pages] >= self.selective_uses
        return wanted

    def _touch(self, pages: Pages, tier: int) -> None:
        if len(pages):
            self.policies[tier].touch(pages, self.clock[tier])

    def _insert(self, pages: Pages, tier: int) -> None:
        if len(pages):
            self.policies[tier].insert(pages, self._parents[pages], self._depths[pages], self.clock[tier])
            self.here[tier, pages] = True
            self.free[tier] -= len(pages)

    def _left(self, pages: Pages, tier: int) -> None:
        self.here[tier, pages] = False
        self.free[tier] += len(pages)

    def check_integrity(self) -> None:
        """IntegrityError if a tier and its policy disagree about who is here. For tests."""
        for tier, policy in enumerate(self.policies):
            policy.check_integrity()
            here = np.flatnonzero(self.here[tier])
            if len(policy) != len(here) or not policy.here(here).all() or self.free[tier] != self.capacities[tier] - len(here):
                raise IntegrityError(f"tier {tier} holds {len(here)} pages, its policy {len(policy)}, {self.free[tier]} are free")
            if self.entry[tier] == EXCLUSIVE and self.here[:tier, here].any():
                raise IntegrityError(f"pages of the exclusive tier {tier} are also above it")
