"""Residency: decides with the policies and carries out with the mover who is in which tier. The one place where both meet.

State and its owner. The page table, the policies, the tiers' bookkeeping, the metrics and `inflight` belong to `lock` (reentrant).
Methods say "lock held" or take it themselves; no lock is held while bytes move. Coroutines run on the mover's loop and see the world
change at every `await`, so they hold what they rely on: rows they work on cannot vanish while `table.hold` or a lease keeps them.

Down: `reserve` makes room by evicting the policy's victims; a victim with a colder copy just leaves, another one is first copied down.
Up: `lift` places pages on the device, each from the warmest tier that has it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from kvtier.config import Config
from kvtier.errors import Closed
from kvtier.formats import get_format
from kvtier.housekeeping import Housekeeping
from kvtier.layout import PageLayout
from kvtier.metrics import Metrics, TierMetrics
from kvtier.mover.mover import Mover
from kvtier.mover.transfer import Move, Outcome, Priority, Transfer, ended
from kvtier.pages import ABSENT, NO_TIER, READY, PageTable
from kvtier.policy import A2CRParameters, EvictionPolicy, PressureBand, SmoothedPressure, make_policy
from kvtier.tiers.base import Slots, Tier
from kvtier.tiers.device import DevicePool
from kvtier.tiers.disk import DiskTier
from kvtier.tiers.host import HostTier

log = logging.getLogger(__name__)

DEVICE = 0
WRITE_BACK, SELECTIVE = "write_back", "write_through_selective"


class Residency:
    """Tiers, page table, policies and mover of one cache. `clock` gives seconds (for policies and pins)."""

    def __init__(self, config: Config, layout: PageLayout, namespace: bytes, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.layout = layout
        self.clock = clock
        self.lock = threading.RLock()
        self.device = DevicePool(layout, config.device.capacity_bytes, config.device.place)
        self.tiers: list[Slots] = [self.device]
        self.entry: list[str] = [WRITE_BACK]
        """Per tier, the write policy by which pages come into it from the tier above."""
        try:
            self._open_colder_tiers(namespace)
            self._start(config, layout)
        except BaseException:
            self._close_tiers()
            raise
        self._keeper = self.mover.spawn(self.house.run())

    def _start(self, config: Config, layout: PageLayout) -> None:
        self.names = [tier.name for tier in self.tiers]
        self.last = len(self.tiers) - 1
        self.table = PageTable(len(self.tiers), layout.page_tokens)
        self.policies: list[EvictionPolicy] = [make_policy(config.policy.name, _parameters(config)) for _ in self.tiers]
        self._smoothed = [SmoothedPressure() for _ in self.tiers]
        self.metrics = Metrics([TierMetrics() for _ in self.tiers])
        self.inflight: dict[tuple[int, int], Transfer] = {}
        self._jobs: set[Future[None]] = set()
        self._copying_from: list[list[asyncio.Future[None]]] = [[] for _ in self.tiers]
        self._unusable: set[tuple[int, int]] = set()
        self._prefetched = 0
        self.house = Housekeeping(self)
        self._recover()
        mover = config.mover
        self.mover = Mover(self.tiers, mover.workers, mover.staging_bytes, mover.queue_bytes, self._finished)

    def _open_colder_tiers(self, namespace: bytes) -> None:
        config, layout = self.config, self.layout
        if config.host is not None:
            host = HostTier(layout, get_format(config.host.format), config.host.capacity_bytes, config.host.mlock, config.host.pin)
            self.tiers.append(host)
            self.entry.append(config.host.write_policy)
        if config.disk is not None:
            path, codec = Path(config.disk.path), get_format(config.disk.format)
            disk = DiskTier(path, layout, codec, config.disk.capacity_bytes, namespace, config.disk.durability)
            self.tiers.append(disk)
            self.entry.append(config.disk.write_policy)

    def _recover(self) -> None:
        for index, tier in enumerate(self.tiers):
            if not isinstance(tier, Tier):
                continue
            now = self.clock()
            for slot, page in tier.recover():
                row = self.table.add(page)
                if self.table.state[index, row] != ABSENT:
                    tier.free([slot])
                    continue
                self.table.begin([row], index, [slot])
                self.table.commit(row, index)
                self.policies[index].insert(row, int(self.table.parent[row]), page.depth, now)
                self.metrics.tiers[index].pages_recovered += 1

    # -- what leaves: lock held ------------------------------------------------------------------------------------------------

    def pressure(self, tier: int) -> float:
        """Used / capacity of a tier, 0 to 1, this moment."""
        return self.tiers[tier].bytes_used / self.tiers[tier].capacity_bytes

    def smoothed_pressure(self, tier: int) -> float:
        """Pressure as the policies see it: smoothed over the calls of this method, so that one burst does not change their bands."""
        return self._smoothed[tier].observe(self.tiers[tier].bytes_used, self.tiers[tier].capacity_bytes)

    def protected(self, tier: int) -> Protected:
        """The pages that may not leave `tier` now, as a container asked page by page. Lock held while it is in use."""
        return Protected(self, tier)

    def is_clean(self, row: int, tier: int) -> bool:
        """Whether the copy can be dropped without moving bytes: there is a colder copy, no colder than a pin allows, or no colder tier."""
        floor = self.table.pinned(row, self.clock())
        return tier == self.last or self.table.has_copy_below(row, tier, floor if floor > tier else None)

    def drop(self, row: int, tier: int, reason: str) -> None:
        """Let a READY copy go that the policy of `tier` no longer knows. Lock held.

        A colder copy inherits the page's recency.
        """
        table = self.table
        for below in range(tier + 1, len(self.tiers)):
            if row in self.policies[below]:
                self.policies[below].touch(row, self.clock())
                break
        if tier == DEVICE and table.prefetched_from[row] != NO_TIER:
            self.unmark_prefetched(row)
            self.metrics.prefetch.wasted += 1
        self.metrics.tiers[tier].evicted[reason] += 1
        self.tiers[tier].free([table.drop(row, tier)])

    def forget(self, row: int, tier: int, reason: str) -> None:
        """Drop a copy whether the policy knows it or not. Lock held."""
        if row in self.policies[tier]:
            self.policies[tier].remove(row)
        self.drop(row, tier, reason)

    def admit(self, row: int, tier: int) -> None:
        """A READY copy of a page with a key is from now on a candidate of the tier's policy. Lock held."""
        self.policies[tier].insert(row, int(self.table.parent[row]), int(self.table.depth[row]), self.clock())
        mass = float(self.table.attention[row])
        if not math.isnan(mass):
            self.policies[tier].record_attention(row, mass)

    def reserve_now(self, tier: int, count: int) -> list[int] | None:
        """`count` slots if they can be had without moving bytes, else None and nothing changed. Lock held."""
        slots = self.tiers[tier].reserve(count)
        if slots is not None:
            return slots
        policy, now, pressure = self.policies[tier], self.clock(), self.smoothed_pressure(tier)
        missing = max(1, count - self.tiers[tier].free_slots)
        victims = policy.peek(missing, self.protected(tier), now, pressure)
        if len(victims) < missing or not all(self.is_clean(row, tier) for row in victims):
            return None
        for row in policy.evict(missing, self.protected(tier), now, pressure) or ():
            self.drop(row, tier, "room needed")
        return self.tiers[tier].reserve(count)

    # -- what leaves: on the loop ----------------------------------------------------------------------------------------------

    async def reserve(self, tier: int, count: int, priority: Priority = Priority.DEMAND) -> list[int]:
        """Up to `count` slots of `tier`, evicting and copying down what must leave; fewer when no more can be had."""
        while count > 0:
            moving = None
            with self.lock:
                slots = self.reserve_now(tier, count)
                if slots is not None:
                    return slots
                policy, now, pressure = self.policies[tier], self.clock(), self.smoothed_pressure(tier)
                free = self.tiers[tier].free_slots
                victims = policy.evict(max(1, count - free), self.protected(tier), now, pressure)
                if victims is None:
                    moving = self._way_out(tier)
                    if moving is None:
                        count = min(count - 1, free + len(policy.peek(count - free, self.protected(tier), now, pressure)))
                        continue
                dirty = [row for row in victims or () if not self.is_clean(row, tier)]
                for row in victims or ():
                    if self.is_clean(row, tier):
                        self.drop(row, tier, "room needed")
            if moving is not None:
                await moving
            elif dirty and not await self.sink(dirty, tier, "room needed", priority):
                with self.lock:
                    count = min(count - 1, self.tiers[tier].free_slots)
        return []

    def _way_out(self, tier: int) -> Awaitable[object] | None:
        """Something whose end may give room in a tier without victims: a page on its way in or out, a job that holds pages. Lock held.

        Jobs that copy down from `tier` wait only for colder tiers, and transfers for nobody, so waiting for these cannot close a circle.
        """
        for transfer in self.inflight.values():
            if tier in (transfer.source, transfer.target):
                self.mover.urge(transfer)
                return asyncio.wrap_future(transfer.future)
        return next((asyncio.shield(job) for job in self._copying_from[tier]), None)

    async def sink(self, rows: Sequence[int], tier: int, reason: str, priority: Priority) -> int:
        """Copy victims (already out of the policy, READY in `tier`, coldest first) one tier down, then drop them; returns how many left.

        What the tier below has no room for goes further down. What it does not admit, or nobody has room for, is dropped for good
        unless it is pinned; unless `priority` is DEMAND, what nobody has room for stays, too.
        """
        with self.lock:
            self.table.hold(rows, tier)
            homeless = [row for row in reversed(rows) if self.is_wanted_below(row, tier)]
            wanted = frozenset(homeless)
        for below in range(tier + 1, len(self.tiers)):
            await self.copy(homeless, tier, below, priority)
            with self.lock:
                homeless = [row for row in homeless if not self.table.has_copy_below(row, tier)]
            if not homeless:
                break
        left = 0
        with self.lock:
            now = self.clock()
            self._let_go(rows, tier)
            for row in rows:
                if self.table.state[tier, row] != READY:
                    continue
                saved = self.is_clean(row, tier)
                precious = self.table.pinned(row, now) != NO_TIER or (row in wanted and priority != Priority.DEMAND)
                if self.table.leases[row] or self.table.readers[tier, row] or (precious and not saved):
                    self.admit(row, tier)
                    continue
                why = reason if saved else "not admitted below" if row not in wanted else "no room below"
                self.drop(row, tier, why)
                left += 1
        return left

    def is_wanted_below(self, row: int, tier: int) -> bool:
        """Whether the next tier's write policy admits this page. Lock held."""
        below = tier + 1
        if self.entry[below] == SELECTIVE and self.table.pinned(row, self.clock()) == NO_TIER:
            return int(self.table.uses[row]) >= self.selective_uses(below)
        return True

    def selective_uses(self, tier: int) -> int:
        """Uses after which `write_through_selective` lets a page into `tier`."""
        section = self.config.host if self.names[tier] == "host" else self.config.disk
        assert section is not None
        return section.selective_uses

    # -- what moves: on the loop -----------------------------------------------------------------------------------------------

    async def copy(self, rows: Iterable[int], source: int, target: int, priority: Priority) -> None:
        """Copy pages down from `source` to `target` and wait for the end; what ended up READY there is in the page table.

        Rows that have or await a copy there already, or lost theirs in `source`, are passed over. Where room does not reach, the first rows
        come first.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with self.lock:
            table = self.table
            rows = [row for row in rows if table.state[source, row] == READY and table.state[target, row] == ABSENT]
            table.hold(rows, source)
            self._copying_from[source].append(done)
        try:
            slots = await self.reserve(target, len(rows), priority)
            with self.lock:
                chosen = self._choose(rows, target, slots)
                transfers = self._plan(chosen, source, target, slots[: len(chosen)], priority)
            await ended(self._submit(transfers))
        finally:
            with self.lock:
                self._let_go(rows, source)
                self._copying_from[source].remove(done)
            done.set_result(None)

    async def lift(self, rows: Iterable[int], priority: Priority, launched: Callable[[list[Transfer]], None]) -> None:
        """Bring pages to the device, each from the warmest tier that has it, and wait for the end.

        Where room does not reach, the first rows come first; prefetches also stop at their budget. `launched` gets the transfers as
        soon as they are queued, once.
        """
        with self.lock:
            table = self.table
            rows = [row for row in rows if table.state[DEVICE, row] == ABSENT and (table.state[:, row] == READY).any()]
            if priority == Priority.PREFETCH:
                self.metrics.prefetch.over_budget += max(0, len(rows) - self.prefetch_room)
                rows = rows[: self.prefetch_room]
            home = dict(zip(rows, table.warmest(np.array(rows, np.int64)).tolist(), strict=True))
            for row, tier in home.items():
                table.hold([row], tier)
        try:
            slots = await self.reserve(DEVICE, len(rows), priority)
            with self.lock:
                limit = self.prefetch_room if priority == Priority.PREFETCH else len(rows)
                chosen = self._choose(rows[:limit], DEVICE, slots)
                transfers = []
                for tier in sorted({home[row] for row in chosen}):
                    part = [row for row in chosen if home[row] == tier]
                    transfers += self._plan(part, tier, DEVICE, [slots.pop(0) for _ in part], priority)
                    if priority == Priority.PREFETCH:
                        self._mark_prefetched(part, tier)
            queued = self._submit(transfers)
            launched(queued)
            await ended(queued)
        finally:
            with self.lock:
                for row, tier in home.items():
                    self._let_go([row], tier)

    def _choose(self, rows: Sequence[int], target: int, slots: Sequence[int]) -> list[int]:
        """The first rows that still need a copy in `target`, one per slot; slots too many are freed. Lock held."""
        chosen = [row for row in rows if self.table.state[target, row] == ABSENT][: len(slots)]
        self.tiers[target].free(slots[len(chosen) :])
        return chosen

    def _plan(self, rows: Sequence[int], source: int, target: int, slots: Sequence[int], priority: Priority) -> list[Transfer]:
        """Transfers for these rows, small enough for one staging round and for all workers to share; copies begin. Lock held."""
        table = self.table
        table.begin(rows, target, slots)
        moves = [Move(row, table.page_id(row), int(table.slot[source, row]), slot) for row, slot in zip(rows, slots, strict=True)]
        size = max(1, min(self.mover.staging.pages_per_round, -(-len(moves) // self.config.mover.workers)))
        transfers = []
        for start in range(0, len(moves), size):
            part = tuple(moves[start : start + size])
            transfer = Transfer(source, target, part, priority, len(part) * self.layout.page_bytes)
            table.hold([move.row for move in part], source)
            for move in part:
                self.inflight[move.row, target] = transfer
            transfers.append(transfer)
        return transfers

    def _submit(self, transfers: Sequence[Transfer]) -> list[Transfer]:
        """Queue transfers; one whose link is full, or that comes when the mover is closing, ends as cancelled."""
        queued = []
        for transfer in transfers:
            try:
                if self.mover.submit(transfer):
                    queued.append(transfer)
                    continue
                with self.lock:
                    self.metrics.link(transfer.source, transfer.target).turned_away += 1
            except Closed:
                pass
            outcome = Outcome(cancelled=True)
            self._finished(transfer, outcome)
            transfer.finish(outcome)
        return queued

    def _finished(self, transfer: Transfer, outcome: Outcome) -> None:
        """Write the outcome of a transfer into the page table. Loop thread, before anybody who waits for it wakes."""
        source, target = transfer.source, transfer.target
        with self.lock:
            table, metrics = self.table, self.metrics
            table.unhold([move.row for move in transfer.moves], source)
            committed = []
            for index, move in enumerate(transfer.moves):
                self.inflight.pop((move.row, target), None)
                refused = outcome.refused.get(index)
                if refused is None and not outcome.cancelled:
                    table.commit(move.row, target)
                    self.admit(move.row, target)
                    committed.append(move.row)
                    continue
                if target == DEVICE and table.prefetched_from[move.row] != NO_TIER:
                    self.unmark_prefetched(move.row)
                    metrics.prefetch.wasted += 1
                if refused is not None:
                    at_fault = source if index in outcome.lost else target
                    metrics.tiers[at_fault].refused[refused.reason] += 1
                    log.warning("page refused by tier %s: %s; it will be computed again", self.names[at_fault], refused.reason)
                    if index in outcome.lost:
                        self._unusable.add((move.row, source))
                self.tiers[target].free([table.drop(move.row, target)])
            metrics.tiers[target].pages_in += len(committed)
            if not outcome.cancelled:
                link = metrics.link(source, target)
                link.transfers += 1
                link.pages += len(committed)
                link.bytes += outcome.link_bytes
                link.seconds += outcome.seconds
            self.house.tend(target, committed)

    def _let_go(self, rows: Sequence[int], tier: int) -> None:
        """Undo `table.hold` of a copy job, and bury the copies that did not verify once nobody reads them. Lock held."""
        self.table.unhold(rows, tier)
        for row in rows:
            if (row, tier) in self._unusable and not self.table.readers[tier, row]:
                self._unusable.discard((row, tier))
                self.forget(row, tier, "unusable")

    def unmark_prefetched(self, row: int) -> None:
        """The page is claimed, gone or failed: it no longer counts against the prefetch budget. Lock held."""
        self.table.prefetched_from[row] = NO_TIER
        self._prefetched -= 1

    def _mark_prefetched(self, rows: Sequence[int], source: int) -> None:
        """These pages are being brought up from `source` on a hint. Lock held."""
        self.table.prefetched_from[rows] = source
        self._prefetched += len(rows)
        self.metrics.prefetch.issued += len(rows)

    @property
    def prefetch_room(self) -> int:
        """Pages that may still be prefetched before those already brought up are used. Lock held."""
        return max(0, self.config.mover.prefetch_budget_bytes // self.layout.page_bytes - self._prefetched)

    # -- jobs ------------------------------------------------------------------------------------------------------------------

    def start(self, coroutine: Coroutine[Any, Any, None]) -> Future[None]:
        """Run a job on the mover's loop that nobody may wait for; if it fails, the log says so."""
        future = self.mover.spawn(coroutine)
        with self.lock:
            self._jobs.add(future)
        future.add_done_callback(self._job_ended)
        return future

    def _job_ended(self, job: Future[None]) -> None:
        with self.lock:
            self._jobs.discard(job)
        if not job.cancelled() and (error := job.exception()) is not None:
            log.error("a background job failed", exc_info=error)

    def under_way(self) -> list[Future[Any]]:
        """The transfers that are queued or running and the jobs that may start more. Lock held."""
        return [*(transfer.future for transfer in self.inflight.values()), *(job for job in self._jobs if not job.done())]

    def close(self, flush: bool) -> None:
        """Write down what should survive (if there is a disk), stop the mover, release the tiers."""
        self._keeper.cancel()
        try:
            if flush and isinstance(self.tiers[self.last], DiskTier):
                self.mover.spawn(self.house.flush()).result()
        finally:
            self.mover.close()
            self._close_tiers()

    def _close_tiers(self) -> None:
        for tier in reversed(self.tiers):
            tier.close()

    def check_integrity(self) -> None:
        """IntegrityError if table, policies and tiers disagree. Call when no transfer is under way. Slow; for tests."""
        with self.lock:
            self.table.check_integrity()
            for index, (tier, policy) in enumerate(zip(self.tiers, self.policies, strict=True)):
                tier.check_integrity()
                policy.check_integrity()
                self.table.check_tier(index, policy)


class Protected:
    """Pages that may not leave a tier: leased, being read, pinned to it, or the last copy of a page that others build on."""

    def __init__(self, residency: Residency, tier: int) -> None:
        self._residency = residency
        self._table = residency.table
        self._tier = tier
        self._now = residency.clock()

    def __contains__(self, page: object) -> bool:
        assert isinstance(page, int)
        table, tier = self._table, self._tier
        needed = tier == DEVICE or table.state[DEVICE, page] != READY  # a lease holds the device copy, or what it will be made from
        if (table.leases[page] and needed) or table.readers[tier, page]:
            return True
        if table.children[page] and tier == self._residency.last and not (table.state[:tier, page] != ABSENT).any():
            return True
        floor = table.pinned(page, self._now)
        if floor == NO_TIER or tier < floor:
            return False
        others = table.state[: floor + 1, page].copy()
        if tier <= floor:
            others[tier] = ABSENT
        return not (others == READY).any()


def _parameters(config: Config) -> A2CRParameters:
    policy = config.policy
    bands = tuple(PressureBand(band.above, band.eviction_threshold, band.time_decay_factor) for band in policy.bands)
    return A2CRParameters(
        policy.attention_weight,
        policy.frequency_weight,
        policy.recency_weight,
        policy.time_decay_factor,
        policy.eviction_threshold,
        policy.cleanup_interval,
        policy.adaptive,
        bands,
        policy.hysteresis,
    )
