"""Housekeeping: what the residency does ahead of demand and at the end, so that demand seldom has to wait.

Writes through what must be, and later what found its link full or no slot; copies down what would leave next; lets go what fell below the
policies' thresholds; has pages of the host tier moved between NUMA nodes (`node_moves.py`), tidies the disk, flushes.
All of it runs on the mover's loop under the rules of `kvtier.residency`, whose lock guards the state here too. A job that fails
keeps none of the others from going on, and rests longer after each failure, so that what stays broken neither fills the log nor takes time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from kvtier.keys import PageKey
from kvtier.mover.transfer import Priority, Transfer, ended
from kvtier.pages import ABSENT, READY, Rows
from kvtier.residency.node_moves import move_between_nodes
from kvtier.residency.opening import WRITE_BACK
from kvtier.tiers.base import Tier

if TYPE_CHECKING:
    from kvtier.residency.residency import Residency

log = logging.getLogger(__name__)

TIDY_EVERY_S = 1.0
MOST_REST_ROUNDS = 600
"""For so many rounds at most does a job rest that fails again and again."""
NO_SLOT = "no slot"
"""Why a page that should be written through is refused by a tier in which nothing may leave for it."""
LOOKED_AT_ONCE = 4096
"""Pages that one pass of the thresholds, or over those that wait for slots, looks at, per tier: it runs under the lock, the next goes on.
"""


class RecurringJob:
    """Work that is done every round. After failures in a row it rests for 1, 3, 7, ... rounds; a new failure is logged with a trace."""

    def __init__(self, name: str, work: Callable[[], Awaitable[object]]) -> None:
        self.name = name
        self._work = work
        self._failures = 0
        self._rest = 0
        self._logged = ""

    async def round(self) -> None:
        """Do it, or rest. Never raises what the work raises: house-keeping goes on."""
        if self._rest:
            self._rest -= 1
            return
        try:
            await self._work()
        except Exception as error:
            self._failures += 1
            self._rest = min(2 ** min(self._failures, 30) - 1, MOST_REST_ROUNDS)
            what = f"{type(error).__name__}: {error}"
            log.error(
                "house-keeping: %s failed %d times in a row (%s); the rest goes on, this is tried again after %d rounds",
                *(self.name, self._failures, what, self._rest),
                exc_info=what != self._logged,
            )
            self._logged = what
            return
        if self._failures:
            log.warning("house-keeping: %s works again after %d failures", self.name, self._failures)
        self._failures, self._logged = 0, ""


class Housekeeping:
    """The background jobs of one residency. `task` is the one that runs all the time."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._cleaning = [False] * len(residency.tiers)
        self._behind: set[int] = set()
        """Tiers with pages that should be written through and found their link full."""
        self._without_slot: list[dict[int, PageKey]] = [{} for _ in residency.tiers]
        """Per tier, pages that should be written through and found no slot below: row and key, since rows are used again."""
        self._catching_up = [False] * len(residency.tiers)
        self._next_cleanup = residency.clock() + residency.config.policy.cleanup_interval
        self.task: asyncio.Task[object] | None = None

    def tend(self, tier: int, rows: Rows) -> None:
        """After pages came into `tier` or were used there: write through what must be, start cleaning if room is scarce. Lock held."""
        residency = self._residency
        if tier == residency.last:
            return
        if residency.entry[tier + 1] != WRITE_BACK:
            dirty = rows[~residency.eviction.is_clean(rows, tier)]
            if len(dirty) and len(through := dirty[residency.eviction.is_wanted_below(dirty, tier)]):
                residency.start(self._write_through(through, tier))
        elif residency.pressure(tier) > residency.config.mover.clean_pressure and not self._cleaning[tier]:
            self._cleaning[tier] = True
            residency.start(self._clean(tier))

    async def _write_through(self, rows: Rows, tier: int) -> None:
        """Copy pages of `tier` down. Those for which no slot is found are counted, once each, and follow when slots are free."""
        residency, waiting = self._residency, self._without_slot[tier]
        left = await residency.copying.down(rows, tier, tier + 1, Priority.DEMOTION)
        if not len(left) and not waiting:
            return
        with residency.lock:
            without = set(left.tolist())
            for row in rows.tolist():
                key = residency.table.key[row]
                if row not in without:
                    waiting.pop(row, None)
                elif key is not None and waiting.get(row) != key:
                    waiting[row] = key
                    residency.metrics.tiers[tier + 1].refused[NO_SLOT] += 1

    def turned_away(self, transfer: Transfer) -> None:
        """The link of a transfer is full. Pages that must be written through follow when it is not. Lock held."""
        if transfer.target == transfer.source + 1 and self._residency.entry[transfer.target] != WRITE_BACK:
            self._behind.add(transfer.source)

    async def _catch_up_where_behind(self) -> None:
        residency = self._residency
        with residency.lock:
            for tier in range(residency.last):
                has_room = self._without_slot[tier] and residency.tiers[tier + 1].free_slots
                if (tier in self._behind or has_room) and not self._catching_up[tier]:
                    self._catching_up[tier] = True
                    residency.start(self._catch_up(tier))

    async def _catch_up(self, tier: int) -> None:
        """Write through what found no slot below `tier`, as far as slots are free there now, and what found its link full."""
        try:
            await self._fill_free_slots(tier)
            await self._use_the_link(tier)
        finally:
            with self._residency.lock:
                self._catching_up[tier] = False

    async def _fill_free_slots(self, tier: int) -> None:
        """Prefixes first. Nothing leaves for these pages, which nobody used since: what is there should be there, too."""
        residency, table, waiting = self._residency, self._residency.table, self._without_slot[tier]
        with residency.lock:
            looked = list(islice(waiting.items(), min(residency.tiers[tier + 1].free_slots, LOOKED_AT_ONCE)))
            rows = np.array([row for row, key in looked if table.key[row] == key], np.int64)
            rows = rows[(table.state[tier][rows] == READY) & (table.state[tier + 1][rows] == ABSENT)]
            due = rows[~residency.eviction.is_clean(rows, tier) & residency.eviction.is_wanted_below(rows, tier)]
            for row in {row for row, _ in looked}.difference(due.tolist()):
                del waiting[row]
        await self._write_through(due, tier)

    async def _use_the_link(self, tier: int) -> None:
        """As many pages of `tier` as its link may have queued, prefixes first; the others another time."""
        residency = self._residency
        with residency.lock:
            if tier not in self._behind:
                return
            self._behind.discard(tier)
            rows = residency.table.ready(tier)
            rows = rows[residency.table.state[tier + 1][rows] == ABSENT]  # few of many: what follows takes longer, under the lock
            due = rows[~residency.eviction.is_clean(rows, tier) & residency.eviction.is_wanted_below(rows, tier)]
            most = max(1, residency.config.mover.queue_bytes // residency.layout.page_bytes)
            if len(due) > most:
                self._behind.add(tier)
        await self._write_through(due[:most], tier)

    async def _clean(self, tier: int) -> None:
        """Copy down the pages that would leave next, without dropping them, so that room can later be made at once."""
        residency = self._residency
        try:
            with residency.lock:
                share = 1.0 - residency.config.mover.clean_pressure
                count = int(residency.tiers[tier].capacity_slots * share) - residency.tiers[tier].free_slots
                with residency.protecting(tier) as protected:
                    coldest = residency.policies[tier].peek(max(0, count), protected, residency.clock(), residency.smoothed_pressure(tier))
                dirty = coldest[~residency.eviction.is_clean(coldest, tier) & residency.eviction.is_wanted_below(coldest, tier)]
            await residency.copying.down(dirty, tier, tier + 1, Priority.DEMOTION)
        finally:
            with residency.lock:
                self._cleaning[tier] = False

    async def run(self) -> None:
        """Tidy the disk now and then, and every `cleanup_interval` seconds let go what fell below the policy's threshold."""
        self.task = asyncio.current_task()
        jobs = [
            RecurringJob("tidying the tiers", self._tidy),
            RecurringJob("moving pages between NUMA nodes", partial(move_between_nodes, self._residency)),
            RecurringJob("writing through what found its link full or no slot", self._catch_up_where_behind),
            RecurringJob("letting go what fell below the thresholds", self._clean_up_when_due),
        ]
        while True:
            await asyncio.sleep(TIDY_EVERY_S)
            for job in jobs:
                await job.round()

    async def _tidy(self) -> None:
        for tier in self._residency.tiers:
            if isinstance(tier, Tier):
                await self._residency.mover.work(tier.tidy)

    async def _clean_up_when_due(self) -> None:
        residency = self._residency
        if residency.clock() >= self._next_cleanup:
            self._next_cleanup = residency.clock() + residency.config.policy.cleanup_interval
            await self.clean_up()

    async def clean_up(self) -> None:
        """One pass of the policies' thresholds. A page's last copy is left alone while its tier still has room."""
        residency = self._residency
        for tier, policy in enumerate(residency.policies):
            with residency.lock:
                pressure = residency.smoothed_pressure(tier)
                if tier == residency.last and pressure <= residency.config.mover.clean_pressure:
                    continue
                with residency.protecting(tier) as protected:
                    expired = policy.expired(min(len(policy), LOOKED_AT_ONCE), protected, residency.clock(), pressure)
                if pressure <= residency.config.mover.clean_pressure:
                    expired = expired[residency.eviction.is_clean(expired, tier) | residency.eviction.is_wanted_below(expired, tier)]
                policy.remove(expired)
                clean = residency.eviction.is_clean(expired, tier)
                dirty = expired[~clean]
                residency.eviction.lose(expired[clean], tier, "score under threshold")
            if len(dirty):
                await residency.eviction.sink(dirty, tier, "score under threshold", Priority.DEMOTION)
        for tier_slots in residency.tiers:
            if isinstance(tier_slots, Tier):
                await residency.mover.work(tier_slots.checkpoint)

    async def flush(self) -> None:
        """Copy what the last tier does not have yet into it, prefixes first, so that a later process finds it."""
        residency = self._residency
        for tier in range(residency.last - 1, -1, -1):
            await self._arrived(residency.last)
            with residency.lock:
                rows = residency.table.ready(tier)
                dirty = rows[residency.table.state[residency.last][rows] == ABSENT]
            await residency.copying.down(dirty, tier, residency.last, Priority.DEMAND)
        await self._arrived(residency.last)

    async def _arrived(self, tier: int) -> None:
        """Wait for the copies that are on their way into `tier` now."""
        residency = self._residency
        with residency.lock:
            coming = dict.fromkeys(transfer for (_, target), transfer in residency.copying.inflight.items() if target == tier)
        for transfer in coming:
            residency.mover.urge(transfer)
        await ended(coming)
