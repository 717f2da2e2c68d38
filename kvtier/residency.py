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
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from kvtier.attention.store import DigestStore
from kvtier.config import Config
from kvtier.errors import Closed, IntegrityError, NumaError
from kvtier.formats import get_format
from kvtier.housekeeping import Housekeeping
from kvtier.keys import PageKey
from kvtier.layout import PageLayout
from kvtier.metrics import Metrics, TierMetrics
from kvtier.mover.mover import Mover
from kvtier.mover.transfer import Move, Outcome, Priority, Transfer, ended
from kvtier.numa.binding import this_machine, usable_cpus
from kvtier.pages import ABSENT, NO_TIER, READY, PageTable, Rows
from kvtier.policy import A2CRParameters, EvictionPolicy, Mask, PressureBand, SmoothedPressure, make_policy
from kvtier.policy.admission import Admission
from kvtier.pricing import Prices
from kvtier.protection import Protected
from kvtier.tiers.base import Slots, Tier
from kvtier.tiers.disk import DiskTier
from kvtier.tiers.gpu import open_pool
from kvtier.tiers.host import HostTier

log = logging.getLogger(__name__)

DEVICE = 0
WRITE_BACK, SELECTIVE = "write_back", "write_through_selective"

_NO_ROWS = np.empty(0, np.int64)


class Residency:
    """Tiers, page table, policies and mover of one cache. `clock` gives seconds (for policies and pins)."""

    def __init__(self, config: Config, layout: PageLayout, namespace: bytes, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.layout = layout
        self.clock = clock
        self.lock = threading.RLock()
        self.device = open_pool(layout, config.device.capacity_bytes, config.device.place, config.device.free_memory_fraction)
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
        self.policies: list[EvictionPolicy] = [
            make_policy(config.policy.name, policy_parameters(config), layout.page_tokens) for _ in self.tiers
        ]
        for policy in self.policies:
            policy.names = self.table.names  # rows are used again for other pages
        self._smoothed = [SmoothedPressure() for _ in self.tiers]
        self.metrics = Metrics([TierMetrics() for _ in self.tiers])
        self.prices = Prices(len(self.tiers), layout.page_tokens)
        self.page_bytes = np.array([tier.format.payload_bytes(layout) for tier in self.tiers])
        """Encoded bytes of a page in each tier, the most it can take where that varies."""
        self.admission = Admission(self.tiers[self.last].capacity_bytes // int(self.page_bytes[self.last]), config.policy.admission)
        self.inflight: dict[tuple[int, int], Transfer] = {}
        self._jobs: set[Future[None]] = set()
        self._copying_from: list[list[asyncio.Future[None]]] = [[] for _ in self.tiers]
        self._unusable: set[tuple[int, int]] = set()
        self._prefetched = 0
        kept = config.attention.digest_bytes
        self.digests = DigestStore(layout, kept, self.device.accelerator) if kept else None
        """The digests of committed pages, as many as there is room for."""
        self.watcher: Callable[[Sequence[PageKey | None]], None] | None = None
        """Told, lock held, which pages (None: an open one) got or lost a copy somewhere."""
        self.house = Housekeeping(self)
        self._recover()
        mover = config.mover
        self.mover = Mover(self.tiers, mover.workers, mover.staging_bytes, mover.queue_bytes, self._finished, self._worker_nodes())

    def _worker_nodes(self) -> tuple[int, ...]:
        """The NUMA nodes of the memory that workers and storage threads read and write; none where that is not known."""
        return next((tier.worker_nodes for tier in self.tiers if isinstance(tier, HostTier)), ())

    def _worker_cpus(self) -> tuple[int, ...]:
        """The CPUs of those nodes that this process may use."""
        try:
            return tuple(sorted({cpu for node in self._worker_nodes() for cpu in usable_cpus(node, this_machine())}))
        except NumaError as error:
            log.warning("storage threads run anywhere: %s", error)
            return ()

    def _open_colder_tiers(self, namespace: bytes) -> None:
        config, layout = self.config, self.layout
        if config.host is not None:
            own = config.host
            near, gpu = str(self.device.place), self.device.accelerator
            sizes = (layout, get_format(own.format), own.capacity_bytes)
            host = HostTier(*sizes, own.mlock, own.pin, own.huge_pages, own.numa, own.numa_nodes, near, gpu)
            self.tiers.append(host)
            self.entry.append(config.host.write_policy)
        if config.disk is not None:
            path, codec = Path(config.disk.path), get_format(config.disk.format)
            engine, depth = config.disk.io_engine, config.disk.io_depth
            room, durability, cpus = config.disk.capacity_bytes, config.disk.durability, self._worker_cpus()
            disk = DiskTier(path, layout, codec, room, namespace, durability, engine, depth, cpus=cpus, gpu=self.device.accelerator)
            disk.compress = config.disk.compress
            self.tiers.append(disk)
            self.entry.append(config.disk.write_policy)

    def _recover(self) -> None:
        for index, tier in enumerate(self.tiers):
            if not isinstance(tier, Tier):
                continue
            found = []
            for slot, page in tier.recover():
                row = self.table.add(page)
                if self.table.state[index, row] != ABSENT:
                    tier.free([slot])
                    continue
                self.table.begin([row], index, [slot])
                self.table.commit([row], index)
                found.append(row)
            rows = np.array(found, np.int64)
            self.policies[index].insert(rows, self.table.parent[rows], self.table.depth[rows], self.clock())
            self.metrics.tiers[index].pages_recovered += len(rows)

    # -- what leaves: lock held ------------------------------------------------------------------------------------------------

    def pressure(self, tier: int) -> float:
        """Used / capacity of a tier, 0 to 1, this moment."""
        return self.tiers[tier].bytes_used / self.tiers[tier].capacity_bytes

    def smoothed_pressure(self, tier: int) -> float:
        """Pressure as the policies see it: smoothed over the calls of this method, so that one burst does not change their bands."""
        return self._smoothed[tier].observe(self.tiers[tier].bytes_used, self.tiers[tier].capacity_bytes)

    def protecting(self, tier: int) -> Protected:
        """The pages that may not leave `tier` now: for one question to its policy, in a `with`. Lock held."""
        return Protected(self.table, tier, self.clock())

    def is_clean(self, rows: Rows, tier: int) -> Mask:
        """Which of these copies can be dropped without moving bytes: those with a colder copy, no colder than a pin allows.

        In the coldest tier, all.
        """
        if tier == self.last:
            return np.ones(len(rows), np.bool_)
        clean = self.table.has_copy_below(rows, tier)
        now = self.clock()
        pinned = self.table.any_pinned(rows, now)
        if pinned is not None:
            for index in np.flatnonzero(pinned & clean).tolist():
                floor = self.table.pinned(int(rows[index]), now)
                clean[index] = self.table.has_copy_below(rows[index : index + 1], tier, floor if floor > tier else None)[0]
        return clean

    def drop(self, rows: Rows, tier: int, reason: str) -> None:
        """Let READY copies go that the policy of `tier` no longer knows. Lock held.

        A colder copy inherits the page's recency.
        """
        if not len(rows):
            return
        table, heirs = self.table, rows
        for below in range(tier + 1, len(self.tiers)):
            known = self.policies[below].here(heirs)
            self.policies[below].touch(heirs[known], self.clock())
            heirs = heirs[~known]
        if tier == DEVICE:
            self.metrics.prefetch.wasted += self.unmark_prefetched(rows)
        self.metrics.tiers[tier].evicted[reason] += len(rows)
        if self.watcher is not None:
            self.watcher(table.key[rows].tolist())
        self.tiers[tier].free(table.drop(rows, tier))
        if self.digests is not None:
            self.digests.drop([row for row in rows.tolist() if table.key[row] is None])

    def lose(self, rows: Rows, tier: int, reason: str) -> None:
        """`drop`, for want of room: copies without another one are gone, and may turn out to be wanted. Lock held."""
        if self.last and len(alone := rows[self.table.is_alone(rows, tier)]):
            self.admission.evict(self.table.names(alone))
        self.drop(rows, tier, reason)

    def _refuse(self, rows: Rows, tier: int) -> None:
        """`drop` what the tier below does not admit. Lock held."""
        alone = rows[self.table.is_alone(rows, tier)]
        if len(alone):
            chances = self.policies[tier].chance(alone, self.clock())
            self.admission.refuse(self.table.names(alone), chances)
        self.drop(rows, tier, "not admitted below")

    def forget(self, row: int, tier: int, reason: str) -> None:
        """Drop a copy whether the policy knows it or not. Lock held."""
        rows = np.array([row])
        if row in self.policies[tier]:
            self.policies[tier].remove(rows)
        self.drop(rows, tier, reason)

    def clear(self, rows: Rows, tier: int) -> int:
        """Drop those copies that the policy knows and nobody holds; how many. Lock held."""
        free = (self.table.leases[rows] == 0) & (self.table.readers[tier][rows] == 0)
        rows = rows[free & self.policies[tier].here(rows)]
        self.policies[tier].remove(rows)
        self.drop(rows, tier, "cleared")
        return len(rows)

    def admit(self, rows: Rows, tier: int) -> None:
        """READY copies of pages with a key are from now on candidates of the tier's policy. Lock held."""
        table, policy = self.table, self.policies[tier]
        parents, depths, attended = table.links(rows)
        policy.insert(rows, parents, depths, self.clock())
        if attended is not None:
            for row in rows[attended].tolist():
                policy.record_attention(row, float(table.attention[row]))
        if self.watcher is not None:
            self.watcher(table.key[rows].tolist())

    def touch(self, rows: Rows, tier: int) -> None:
        """Copies in `tier` were used; those that its policy does not know (on their way out) are passed over. Lock held."""
        policy, now = self.policies[tier], self.clock()
        try:
            policy.touch(rows, now)
        except KeyError:
            policy.touch(rows[policy.here(rows)], now)

    def reserve_now(self, tier: int, count: int) -> list[int] | None:
        """`count` slots if they can be had without moving bytes, else None and nothing changed. Lock held."""
        slots = self.tiers[tier].reserve(count)
        if slots is not None:
            return slots
        policy, now, pressure = self.policies[tier], self.clock(), self.smoothed_pressure(tier)
        missing = max(1, count - self.tiers[tier].free_slots)
        if tier != self.last:
            with self.protecting(tier) as protected:
                likely = policy.peek(missing, protected, now, pressure)
            if len(likely) < missing or not self.is_clean(likely, tier).all():
                return None
        with self.protecting(tier) as protected:
            victims = policy.evict(missing, protected, now, pressure)
        if victims is None:
            return None
        self.lose(victims, tier, "room needed")
        return self.tiers[tier].reserve(count)

    # -- what requests do: lock held -------------------------------------------------------------------------------------------

    def claim(self, keys: Sequence[PageKey]) -> Rows:
        """Lease the longest visible prefix of `keys` for a request: it counts as used, and for the metrics as served. Lock held."""
        table, metrics = self.table, self.metrics
        rows = table.find(keys)
        table.lease(rows)
        table.use(rows)
        metrics.lookups += bool(len(keys))
        metrics.tokens_asked += len(keys) * table.page_tokens
        if not len(rows):
            return rows
        warmest = table.warmest(rows) if self.last else None
        for tier in range(len(self.tiers)):
            here = rows if warmest is None else rows[warmest == tier]
            if len(here):
                self.touch(here, tier)
                self._served(here, tier)
        for tier in range(self.last):
            self.house.tend(tier, rows[table.state[tier][rows] == READY])
        return rows

    def _served(self, rows: Rows, tier: int) -> None:
        """Count these pages as served from `tier`, or from where a hint brought them up before. Lock held."""
        counts = {tier: len(rows)}
        if self._prefetched:
            origins = self.table.prefetched_from[rows]
            hinted = self.unmark_prefetched(rows)
            self.metrics.prefetch.in_time += hinted * (tier == DEVICE)
            self.metrics.prefetch.late += hinted * (tier != DEVICE)
            counts = Counter(np.where(origins == NO_TIER, tier, origins).tolist())
        for origin, count in counts.items():
            self.metrics.tiers[origin].pages_served += count
            self.metrics.tiers[origin].hit_tokens += count * self.table.page_tokens

    def settle_in(self, keys: Sequence[PageKey], before: PageKey, depth: int, parent: int, slots: Sequence[int]) -> Rows:
        """Pages that a request wrote into device slots become visible, leased by it once; their rows. Lock held.

        The pages follow each other, the first one at `depth` after the page `before` (row `parent`); none has a device copy, not even on
        its way.
        """
        table = self.table
        rows = table.add_chain(keys, before, depth, parent)
        table.settle(rows, DEVICE, slots)
        self._arrived(rows)
        return rows

    def written(self, rows: Rows) -> None:
        """The engine wrote these pages, which are on the device now. Lock held."""
        self.table.use(rows)
        self._arrived(rows)

    def _arrived(self, rows: Rows) -> None:
        if self.last:
            self.admission.computed(self.table.names(rows))
        self.admit(rows, DEVICE)
        self.metrics.tiers[DEVICE].pages_in += len(rows)

    def used(self, rows: Rows) -> None:
        """The engine wrote pages that are on the device already. Lock held."""
        self.table.use(rows)
        self.touch(rows, DEVICE)

    def release(self, rows: Rows | Sequence[int]) -> None:
        """A request lets go of these pages; what it launched on its stream may still be reading them. Lock held."""
        self.device.leave()
        open_slots = self.table.release(rows)
        if open_slots:
            self.device.free(open_slots)

    # -- what leaves: on the loop ----------------------------------------------------------------------------------------------

    async def reserve(self, tier: int, count: int, priority: Priority = Priority.DEMAND, within_s: float | None = None) -> list[int]:
        """Up to `count` slots of `tier`, evicting and copying down what must leave; fewer when no more can be had.

        With `within_s`, for pages that are only promised for that time: nothing leaves that is worth more.
        """
        while count > 0:
            moving = None
            with self.lock:
                if within_s is not None:
                    count = self._displaceable(count, within_s)
                    if not count:
                        break
                slots = self.reserve_now(tier, count)
                if slots is not None:
                    return slots
                policy, now, pressure = self.policies[tier], self.clock(), self.smoothed_pressure(tier)
                free = self.tiers[tier].free_slots
                with self.protecting(tier) as protected:
                    victims = policy.evict(max(1, count - free), protected, now, pressure)
                if victims is None:
                    moving = self._way_out(tier)
                    if moving is None:
                        with self.protecting(tier) as protected:
                            count = min(count - 1, free + len(policy.peek(count - free, protected, now, pressure)))
                        continue
                    dirty = _NO_ROWS
                else:
                    clean = self.is_clean(victims, tier)
                    dirty = victims[~clean]
                    self.lose(victims[clean], tier, "room needed")
            if moving is not None:
                await moving
            elif len(dirty) and not await self.sink(dirty, tier, "room needed", priority):
                with self.lock:
                    count = min(count - 1, self.tiers[tier].free_slots)
        return []

    def _displaceable(self, count: int, within_s: float) -> int:
        """How many of `count` pages wanted within so many seconds may have a device slot: a free one, or that of a page worth less.

        Pages brought up for an earlier promise are worth as much. Lock held.
        """
        free = self.device.free_slots
        if count <= free:
            return count
        policy, now, pressure = self.policies[DEVICE], self.clock(), self.smoothed_pressure(DEVICE)
        promised = policy.promised(within_s, now)
        with self.protecting(DEVICE) as protected:
            leaving = policy.peek(count - free, protected, now, pressure)
        hinted = self.table.prefetched_from[leaving] != NO_TIER
        for place, page in enumerate(leaving.tolist()):
            if hinted[place] or policy.score(page, now, pressure) >= promised:
                return free + place
        return free + len(leaving)

    def _way_out(self, tier: int) -> Awaitable[object] | None:
        """Something whose end may give room in a tier without victims: a page on its way in or out, a job that holds pages. Lock held.

        Jobs that copy down from `tier` wait only for colder tiers, and transfers for nobody, so waiting for these cannot close a circle.
        """
        for transfer in self.inflight.values():
            if tier in (transfer.source, transfer.target):
                self.mover.urge(transfer)
                return asyncio.wrap_future(transfer.future)
        return next((asyncio.shield(job) for job in self._copying_from[tier]), None)

    async def sink(self, rows: Rows, tier: int, reason: str, priority: Priority) -> int:
        """Copy victims (already out of the policy, READY in `tier`, coldest first) one tier down, then drop them; returns how many left.

        What the tier below has no room for goes further down. What it does not take, or nobody has room for, is dropped for good
        unless it is pinned; unless `priority` is DEMAND, what nobody has room for stays, too.
        """
        with self.lock:
            self.table.hold(rows, tier)
            wanted = rows[::-1][self.is_wanted_below(rows[::-1], tier)]
            homeless = wanted
        for below in range(tier + 1, len(self.tiers)):
            await self.copy(homeless, tier, below, priority)
            with self.lock:
                homeless = homeless[~self.table.has_copy_below(homeless, tier)]
            if not len(homeless):
                break
        with self.lock:
            self._let_go(rows, tier)
            rows = rows[self.table.state[tier][rows] == READY]
            saved = self.is_clean(rows, tier)
            admitted = np.isin(rows, wanted)
            pinned = self.table.any_pinned(rows, self.clock())
            precious = np.zeros(len(rows), np.bool_) if pinned is None else pinned
            if priority != Priority.DEMAND:
                precious |= admitted
            stays = (self.table.leases[rows] > 0) | (self.table.readers[tier][rows] > 0) | (precious & ~saved)
            self.admit(rows[stays], tier)
            self.drop(rows[saved & ~stays], tier, reason)
            self._refuse(rows[~saved & ~stays & ~admitted], tier)
            self.lose(rows[~saved & ~stays & admitted], tier, "no room below")
            self.admission.admit(int(np.count_nonzero(saved & admitted & ~stays)))
            return int(np.count_nonzero(~stays))

    def is_wanted_below(self, rows: Rows, tier: int) -> Mask:
        """Which of these pages the next tier takes by its write policy; with `write_back`, those worth the write. Lock held."""
        below, wanted = tier + 1, np.ones(len(rows), np.bool_)
        if self.entry[below] == WRITE_BACK:
            wanted = self.admission.worth(self.policies[tier].chance(rows, self.clock()))
        elif self.entry[below] == SELECTIVE:
            wanted = self.table.uses[rows] >= self.selective_uses(below)
        pinned = self.table.any_pinned(rows, self.clock())
        return wanted if pinned is None else wanted | pinned

    def selective_uses(self, tier: int) -> int:
        """Uses after which `write_through_selective` lets a page into `tier`. IntegrityError for a tier that has no such number."""
        section = self.config.host if self.names[tier] == "host" else self.config.disk
        if section is None:
            raise IntegrityError(f"tier {self.names[tier]} is not in the configuration")
        return section.selective_uses

    # -- what moves: on the loop -----------------------------------------------------------------------------------------------

    async def copy(self, rows: Rows, source: int, target: int, priority: Priority) -> None:
        """Copy pages down from `source` to `target` and wait for the end; what ended up READY there is in the page table.

        Rows that have or await a copy there already, or lost theirs in `source`, are passed over. Where room does not reach, the first rows
        come first.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with self.lock:
            table = self.table
            rows = rows[(table.state[source][rows] == READY) & (table.state[target][rows] == ABSENT)]
            table.hold(rows, source)
            self._copying_from[source].append(done)
        try:
            slots = await self.reserve(target, len(rows), priority)
            with self.lock:
                chosen = self._choose(rows, target, slots)
                transfers = self._plan(chosen.tolist(), source, target, slots[: len(chosen)], priority)
            await ended(self._submit(transfers))
        finally:
            with self.lock:
                self._let_go(rows, source)
                self._copying_from[source].remove(done)
            done.set_result(None)

    async def lift(
        self, rows: Iterable[int], priority: Priority, launched: Callable[[list[Transfer]], None], within_s: float = 0.0
    ) -> None:
        """Bring pages to the device, each from the warmest tier that has it, and wait for the end.

        Where room does not reach, the first rows come first; prefetches, of pages that are wanted within `within_s` seconds, also stop at
        their budget and at pages that are worth more. `launched` gets the transfers as soon as they are queued, once.
        """
        with self.lock:
            table = self.table
            asked = np.array(list(rows), np.int64)
            homes = table.warmest(asked)
            cold = (table.state[DEVICE][asked] == ABSENT) & (homes != NO_TIER)
            asked, homes = asked[cold], homes[cold]
            if priority == Priority.PREFETCH:
                self.metrics.prefetch.over_budget += max(0, len(asked) - self.prefetch_room)
                asked, homes = asked[: self.prefetch_room], homes[: self.prefetch_room]
            held = {tier: asked[homes == tier] for tier in np.unique(homes).tolist()}
            for tier, part in held.items():
                table.hold(part, tier)
        try:
            if priority == Priority.PREFETCH:
                with self.lock:
                    count = self._displaceable(len(asked), within_s)
                    self.metrics.prefetch.outranked += len(asked) - count
                slots = await self.reserve(DEVICE, count, priority, within_s)
            else:
                slots = await self.reserve(DEVICE, len(asked), priority)
            with self.lock:
                limit = self.prefetch_room if priority == Priority.PREFETCH else len(asked)
                chosen = self._choose(asked[:limit], DEVICE, slots)
                transfers = []
                used = 0
                for tier, part in held.items():
                    coming = chosen[np.isin(chosen, part)]
                    transfers += self._plan(coming.tolist(), tier, DEVICE, slots[used : used + len(coming)], priority)
                    used += len(coming)
                    if priority == Priority.PREFETCH:
                        self._mark_prefetched(coming, tier)
            queued = self._submit(transfers)
            launched(queued)
            await ended(queued)
        finally:
            with self.lock:
                for tier, part in held.items():
                    self._let_go(part, tier)

    def _choose(self, rows: Rows, target: int, slots: Sequence[int]) -> Rows:
        """The first rows that still need a copy in `target`, one per slot; slots too many are freed. Lock held."""
        chosen: Rows = rows[self.table.state[target][rows] == ABSENT][: len(slots)]
        self.tiers[target].free(slots[len(chosen) :])
        return chosen

    def _plan(self, rows: Sequence[int], source: int, target: int, slots: Sequence[int], priority: Priority) -> list[Transfer]:
        """Transfers for these rows, small enough for one staging round and for all workers to share; copies begin. Lock held."""
        table = self.table
        table.begin(rows, target, slots)
        moves = [Move(row, table.page_id(row), int(table.slot[source, row]), slot) for row, slot in zip(rows, slots, strict=True)]
        most = self.mover.staging.pages_in_one(self.tiers[source], self.tiers[target])
        size = max(1, min(most, -(-len(moves) // self.config.mover.workers)))
        transfers = []
        for node, part in self._cut(moves, source, target, size):
            transfer = Transfer(source, target, part, priority, len(part) * self.layout.page_bytes, node)
            table.hold([move.row for move in part], source)
            for move in part:
                self.inflight[move.row, target] = transfer
            transfers.append(transfer)
        return transfers

    def _cut(self, moves: Sequence[Move], source: int, target: int, size: int) -> Iterator[tuple[int | None, tuple[Move, ...]]]:
        """Moves in parts of at most `size`, with the node that each part's host memory is on, where workers are on several."""
        by_node: dict[int | None, list[Move]] = {None: list(moves)}
        host = next((tier for tier in (self.tiers[source], self.tiers[target]) if isinstance(tier, HostTier)), None)
        if host is not None and len(host.worker_nodes) > 1:
            by_node = {}
            for move in moves:
                by_node.setdefault(host.node_of(move.source_slot if host is self.tiers[source] else move.target_slot), []).append(move)
        for node, some in by_node.items():
            for start in range(0, len(some), size):
                yield node, tuple(some[start : start + size])

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
            committed, lost = [], []
            for index, move in enumerate(transfer.moves):
                self.inflight.pop((move.row, target), None)
                refused = outcome.refused.get(index)
                if refused is None and not outcome.cancelled:
                    committed.append(move.row)
                    continue
                lost.append(move.row)
                if refused is not None:
                    at_fault = source if index in outcome.lost else target
                    metrics.tiers[at_fault].refused[refused.reason] += 1
                    log.warning("page refused by tier %s: %s; it will be computed again", self.names[at_fault], refused.reason)
                    if index in outcome.lost:
                        self._unusable.add((move.row, source))
            arrived, given_up = np.array(committed, np.int64), np.array(lost, np.int64)
            table.commit(arrived, target)
            self.admit(arrived, target)
            if target == DEVICE:
                metrics.prefetch.wasted += self.unmark_prefetched(given_up)
            self.tiers[target].free(table.drop(given_up, target))
            metrics.tiers[target].pages_in += len(committed)
            if not outcome.cancelled:
                link = metrics.link(source, target)
                link.transfers += 1
                link.pages += len(committed)
                link.bytes += outcome.link_bytes
                link.seconds += outcome.seconds
            self.house.tend(target, arrived)

    def _let_go(self, rows: Rows, tier: int) -> None:
        """Undo `table.hold` of a copy job, and bury the copies that did not verify once nobody reads them. Lock held."""
        self.table.unhold(rows, tier)
        for row in rows.tolist() if self._unusable else ():
            if (row, tier) in self._unusable and not self.table.readers[tier, row]:
                self._unusable.discard((row, tier))
                self.forget(row, tier, "unusable")

    def unmark_prefetched(self, rows: Rows) -> int:
        """These pages are claimed, gone or failed: they no longer count against the prefetch budget; how many did. Lock held."""
        if not self._prefetched:
            return 0
        marked = rows[self.table.prefetched_from[rows] != NO_TIER]
        self.table.prefetched_from[marked] = NO_TIER
        self._prefetched -= len(marked)
        return len(marked)

    def _mark_prefetched(self, rows: Rows, source: int) -> None:
        """These pages are being brought up from `source` on a hint. Lock held."""
        self.table.prefetched_from[rows] = source
        self._prefetched += len(rows)
        self.metrics.prefetch.issued += len(rows)

    @property
    def prefetch_room(self) -> int:
        """Pages that may still be prefetched before those already brought up are used. Lock held."""
        budget = self.config.mover.prefetch_budget_bytes
        pages = max(1, self.device.capacity_slots // 8) if budget is None else budget // self.layout.page_bytes
        return max(0, pages - self._prefetched)

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


def policy_parameters(config: Config) -> A2CRParameters:
    """What the configuration says to the A²CR family."""
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
