"""Residency: who is in which tier. The one place where policies and mover meet.

State and its owner. The page table, the policies, the tiers' bookkeeping, the metrics and what its parts keep belong to `lock` (reentrant).
Methods say "lock held" or take it themselves; no lock is held while bytes move.

Here is the whole: what belongs to it, what requests do to it, its jobs, its end. Its parts: `eviction` (what leaves), `copying` (what goes
down and comes up), `hinted` (what hints brought up), `house` (what is done ahead of demand).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, wait
from typing import Any

import numpy as np

from kvtier.attention.store import DigestStore
from kvtier.config import Config
from kvtier.errors import Closed
from kvtier.forked import LeftBehind
from kvtier.keys import PageKey
from kvtier.layout import PageLayout
from kvtier.mover.mover import Mover
from kvtier.pages import DEVICE, NO_TIER, READY, Links, PageTable, Rows
from kvtier.policy import EvictionPolicy, SmoothedPressure, make_policy
from kvtier.policy.admission import Admission
from kvtier.pricing import Prices
from kvtier.residency.copying import Copying
from kvtier.residency.eviction import Eviction
from kvtier.residency.hinted import Hinted
from kvtier.residency.housekeeping import Housekeeping
from kvtier.residency.metrics import Metrics, TierMetrics
from kvtier.residency.opening import close_tiers, open_tiers, policy_parameters, recover, worker_nodes, write_policies
from kvtier.residency.protection import Protected
from kvtier.residency.unclosed import watch
from kvtier.tiers.base import Tier
from kvtier.tiers.disk import DiskTier

log = logging.getLogger(__name__)


class Residency:
    """Tiers, page table, policies and mover of one cache. `clock` gives seconds (for policies and pins)."""

    def __init__(self, config: Config, layout: PageLayout, namespace: bytes, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.layout = layout
        self.clock = clock
        self.lock: threading.RLock | LeftBehind = threading.RLock()
        self.left_behind: LeftBehind | None = None
        """In a forked child, where nothing of this can be used."""
        self.closed = False
        """Set by whoever is going to `close` it."""
        self.device, self.tiers = open_tiers(config, layout, namespace)
        try:
            self._start(config, layout)
        except BaseException:
            close_tiers(self.tiers)
            raise
        self._keeper = self.mover.spawn(self.house.run())
        watch(self)

    def _start(self, config: Config, layout: PageLayout) -> None:
        self.names = [tier.name for tier in self.tiers]
        self.last = len(self.tiers) - 1
        self.entry = write_policies(config)
        """Per tier, the write policy by which pages come into it from the tier above."""
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
        self._jobs: set[Future[None]] = set()
        kept = config.attention.digest_bytes
        self.digests = DigestStore(layout, kept, self.device.accelerator) if kept else None
        """The digests of committed pages, as many as there is room for."""
        self.watcher: Callable[[Sequence[PageKey | None]], None] | None = None
        """Told, lock held, which pages (None: an open one) got or lost a copy somewhere."""
        self.hinted = Hinted(self.table, self._prefetch_pages)
        self.eviction = Eviction(self)
        self.copying = Copying(self)
        self.house = Housekeeping(self)
        for index, tier in enumerate(self.tiers):
            if isinstance(tier, Tier):
                rows = recover(tier, index, self.table)
                self.policies[index].insert(rows, self.table.parent[rows], self.table.depth[rows], self.clock())
                self.metrics.tiers[index].pages_recovered += len(rows)
        mover = config.mover
        carried = self.copying.finished
        self.mover = Mover(self.tiers, mover.workers, mover.staging_bytes, mover.queue_bytes, carried, worker_nodes(self.tiers))

    def _prefetch_pages(self) -> int:
        budget = self.config.mover.prefetch_budget_bytes
        return max(1, self.device.capacity_slots // 2) if budget is None else budget // self.layout.page_bytes

    # -- what policies are asked and told: lock held ---------------------------------------------------------------------------

    def pressure(self, tier: int) -> float:
        """Used / capacity of a tier, 0 to 1, this moment."""
        return self.tiers[tier].bytes_used / self.tiers[tier].capacity_bytes

    def smoothed_pressure(self, tier: int) -> float:
        """Pressure as the policies see it: smoothed over the calls of this method, so that one burst does not change their bands."""
        room = self.tiers[tier]
        return self._smoothed[tier].observe(room.bytes_used, room.capacity_bytes)

    def protecting(self, tier: int, hinted: bool = False) -> Protected:
        """The pages that may not leave `tier` now, or not for a hint: for one question to its policy, in a `with`. Lock held."""
        return Protected(self.table, tier, self.clock(), hinted)

    def admit(self, rows: Rows, tier: int) -> None:
        """READY copies of pages with a key are from now on candidates of the tier's policy. Lock held."""
        self._insert(rows, tier, self.table.links(rows), self.clock())
        if self.watcher is not None:
            self.watcher(self.table.key[rows].tolist())

    def _insert(self, rows: Rows, tier: int, links: Links, now: float) -> None:
        policy = self.policies[tier]
        parents, depths, attended = links
        policy.insert(rows, parents, depths, now)
        if attended is not None:
            for row in rows[attended].tolist():
                policy.record_attention(row, float(self.table.attention[row]))

    def touch(self, rows: Rows, tier: int) -> None:
        """Copies in `tier` were used; those that its policy does not know (on their way out) are passed over. Lock held."""
        policy, now = self.policies[tier], self.clock()
        try:
            policy.touch(rows, now)
        except KeyError:
            policy.touch(rows[policy.here(rows)], now)

    # -- what requests do: lock held -------------------------------------------------------------------------------------------

    def claim(self, keys: Sequence[PageKey]) -> Rows:
        """Lease the longest visible prefix of `keys` for a request: it counts as used, and for the metrics as served. Lock held."""
        table, metrics = self.table, self.metrics
        rows = table.claim(keys)
        metrics.lookups += bool(len(keys))
        metrics.tokens_asked += len(keys) * table.page_tokens
        if not len(rows):
            return rows
        if not self.last:
            self.touch(rows, DEVICE)
            if self.hinted.count:
                self._served(rows, DEVICE)
            else:
                metrics.tiers[DEVICE].served(len(rows), table.page_tokens)
            return rows
        warmest = table.warmest(rows)
        for tier in range(len(self.tiers)):
            if len(here := rows[warmest == tier]):
                self.touch(here, tier)
                self._served(here, tier)
        for tier in range(self.last):
            self.house.tend(tier, rows[table.state[tier][rows] == READY])
        return rows

    def _served(self, rows: Rows, tier: int) -> None:
        """Count these pages as served from `tier`, or from where a hint brought them up before. Lock held."""
        if not self.hinted.count:
            self.metrics.tiers[tier].served(len(rows), self.table.page_tokens)
            return
        origins = self.table.prefetched_from[rows]
        hinted = self.hinted.unmark(rows)
        self.metrics.prefetch.in_time += hinted * (tier == DEVICE)
        self.metrics.prefetch.late += hinted * (tier != DEVICE)
        for origin, count in Counter(np.where(origins == NO_TIER, tier, origins).tolist()).items():
            self.metrics.tiers[origin].served(count, self.table.page_tokens)

    def settle_in(self, keys: Sequence[PageKey], before: PageKey, depth: int, parent: int, slots: Sequence[int]) -> Rows:
        """Pages that a request wrote into device slots become visible, leased by it once; their rows. Lock held.

        The pages follow each other, the first one at `depth` after the page `before` (row `parent`); none has a device copy, not even on
        its way.
        """
        table, now = self.table, self.clock()
        chain = table.new_chain(keys, before, depth, parent, DEVICE, slots)
        rows = None if chain is None else self.policies[DEVICE].settle(chain, now)
        if rows is None:
            rows, links = table.settle_chain(keys, before, depth, parent, DEVICE, slots)
            self._insert(rows, DEVICE, links, now)
        self._arrived(rows)
        return rows

    def written(self, rows: Rows) -> None:
        """The engine wrote these pages, which are on the device now. Lock held."""
        self.table.use(rows)
        self._insert(rows, DEVICE, self.table.links(rows), self.clock())
        self._arrived(rows)

    def _arrived(self, rows: Rows) -> None:
        if self.last:
            self.admission.computed(self.table.names(rows))
        if self.watcher is not None:
            self.watcher(self.table.key[rows].tolist())
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
        if self.hinted.waiting:
            self.hinted.room_came()

    def give_back(self, slots: Sequence[int]) -> None:
        """Device slots without a page are free; what the calling thread launched on its stream may still be using them. Lock held."""
        self.device.leave()
        self.device.free(slots)

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

    def settle(self, timeout: float | None) -> None:
        """Wait until no transfer is queued or under way, nor a job that may start one. TimeoutError after `timeout` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            with self.lock:
                waiting: list[Future[Any]] = [transfer.future for transfer in self.copying.inflight.values()]
                waiting += [job for job in self._jobs if not job.done()]
            if not waiting:
                return
            left = None if end is None else max(0.0, end - time.monotonic())
            if wait(waiting, left).not_done:
                raise TimeoutError(f"transfers were still under way after {timeout} s")

    def check_open(self) -> None:
        """Raises Closed after `close`, and in a forked child."""
        if self.closed:
            raise Closed("this cache was closed; build a new one")
        if self.left_behind is not None:
            self.left_behind.refuse()

    def after_fork_in_child(self) -> None:
        """Whoever asks for the lock, or holds a lease, gets Closed from now on."""
        self.lock = self.left_behind = LeftBehind("this cache")
        self.mover.after_fork_in_child()

    def close(self, flush: bool) -> None:
        """Write down what should survive (if there is a disk), stop the mover, release the tiers."""
        self._keeper.cancel()
        try:
            if flush and isinstance(self.tiers[self.last], DiskTier):
                self.mover.spawn(self.house.flush()).result()
        finally:
            self.mover.close()
            close_tiers(self.tiers)

    def check_integrity(self) -> None:
        """IntegrityError if table, policies and tiers disagree. Call when no transfer is under way. Slow; for tests."""
        with self.lock:
            self.table.check_integrity()
            for index, (tier, policy) in enumerate(zip(self.tiers, self.policies, strict=True)):
                tier.check_integrity()
                policy.check_integrity()
                self.table.check_tier(index, policy)
