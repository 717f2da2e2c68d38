"""Copying: how pages get from one tier to another. Chooses what is carried, has the mover carry it, writes down how that ended.

One object per `kvtier.residency`, whose lock guards everything here, `inflight` too. `down` gives pages a copy in a colder tier, `lift` one
on the device, each from the warmest tier that has it. Coroutines run on the mover's loop and see the world change at every `await`, so they
hold what they rely on: rows they work on cannot vanish while `table.hold` or a lease keeps them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from kvtier.errors import Closed
from kvtier.mover.transfer import Move, Outcome, Priority, Transfer, ended
from kvtier.pages import ABSENT, DEVICE, NO_TIER, READY, WRITING, Rows
from kvtier.repeated import RepeatedWarning
from kvtier.tiers.base import Refused, Tier
from kvtier.tiers.host import HostTier

if TYPE_CHECKING:
    from kvtier.residency.residency import Residency

log = logging.getLogger(__name__)

FIRST_BYTES = 2 << 20
"""Encoded bytes of the pages that are read while the others are planned: a fast disk is busy with them as long as that takes."""


@dataclass(frozen=True)
class Shortfall:
    """How a hint fared: so many pages `begun`; `rows`, in order, are left. Of these, so many for want of budget, and so many because what
    is on the device is worth more."""

    begun: int
    rows: Rows
    over_budget: int
    outranked: int


@dataclass(frozen=True)
class _Coming:
    """Pages on their way up, in order, and the tier that each comes from."""

    rows: Rows
    homes: Rows

    @cached_property
    def by_tier(self) -> dict[int, Rows]:
        """The rows that come from each tier, warmest first."""
        tiers = sorted(set(self.homes.tolist()))
        return {tier: self.rows if len(tiers) == 1 else self.rows[self.homes == tier] for tier in tiers}


class Copying:
    """The copies of one residency that are on their way. `inflight`: by row and tier they go to."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self.inflight: dict[tuple[int, int], Transfer] = {}
        self.copying_from: list[list[asyncio.Future[None]]] = [[] for _ in residency.tiers]
        """Per tier, the jobs that copy down from it."""
        self._unusable: set[tuple[int, int]] = set()
        self._warnings = RepeatedWarning(log)

    async def down(self, rows: Rows, source: int, target: int, priority: Priority) -> Rows:
        """Copy pages down from `source` to `target` and wait for the end; what ended up READY there is in the page table.

        Rows that have or await a copy there already, or lost theirs in `source`, are passed over. Where room does not reach, the first rows
        come first; gives those for which no slot was found.
        """
        residency = self._residency
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with residency.lock:
            table = residency.table
            rows = rows[(table.state[source][rows] == READY) & (table.state[target][rows] == ABSENT)]
            table.hold(rows, source)
            self.copying_from[source].append(done)
        try:
            slots = await residency.eviction.reserve(target, len(rows), priority)
            with residency.lock:
                chosen = self._choose(rows, target, slots)
                left: Rows = rows[table.state[target][rows] == ABSENT][len(chosen) :]
                transfers = self._plan(chosen, source, target, slots[: len(chosen)], priority)
            await ended(self._submit(transfers))
            return left
        finally:
            with residency.lock:
                self.let_go(rows, source)
                self.copying_from[source].remove(done)
            done.set_result(None)

    async def lift(self, rows: Iterable[int], launched: Callable[[list[Transfer]], None]) -> None:
        """Bring pages that are wanted now to the device, each from the warmest tier that has it, and wait for the end.

        Where room does not reach, the first rows come first. `launched` gets the transfers as soon as they are queued, once.
        """
        residency = self._residency
        with residency.lock:
            coming = self._cold(np.array(list(rows), np.int64))
            self._hold_all(coming)
        try:
            queued: list[Transfer] = []
            for part, share in self._parts(coming):
                slots = await residency.eviction.reserve(DEVICE, len(part))
                with residency.lock:
                    transfers = self._plan_up(coming, part, slots, Priority.DEMAND, share)
                queued += self._submit(transfers)
                if len(slots) < len(part):
                    break
            launched(queued)
            await ended(queued)
        finally:
            self._let_go_all(coming)

    async def bring(self, rows: Rows) -> None:
        """As `lift`, and wait for those that others bring already."""
        residency, table = self._residency, self._residency.table
        for _ in range(2):  # a hint that brought some may have been taken back
            await self.lift([row for row in rows.tolist() if table.state[DEVICE, row] == ABSENT], lambda _: None)
            with residency.lock:
                coming = {self.inflight[row, DEVICE] for row in rows.tolist() if table.state[DEVICE, row] == WRITING}
            for transfer in coming:
                residency.mover.urge(transfer)
            await ended(coming)

    async def lift_ahead(self, rows: Rows, launched: Callable[[list[Transfer]], None], within_s: float) -> Shortfall:
        """As `lift`, of pages that a hint promises to be wanted within `within_s` seconds, as far as the prefetch budget and pages that are
        worth more allow; says which are left over."""
        residency = self._residency
        hinted = residency.hinted
        with residency.lock:
            cold = self._cold(rows)
            coming = _Coming(cold.rows[: hinted.room], cold.homes[: hinted.room])
            self._hold_all(coming)
        try:
            with residency.lock:
                count = residency.eviction.displaceable(len(coming.rows), within_s)
            slots = await residency.eviction.reserve(DEVICE, count, Priority.PREFETCH, within_s)
            with residency.lock:
                transfers = self._plan_up(coming, coming.rows[: hinted.room], slots, Priority.PREFETCH)
            queued = self._submit(transfers)
            launched(queued)
            begun = np.array([move.row for transfer in transfers for move in transfer.moves], np.int64)
            await ended(queued)
        finally:
            self._let_go_all(coming)
        over_budget, outranked = len(cold.rows) - len(coming.rows), len(coming.rows) - count
        return Shortfall(len(begun), cold.rows[~np.isin(cold.rows, begun)], over_budget, outranked)

    def _cold(self, rows: Rows) -> _Coming:
        """Those of `rows` that are not on the device but elsewhere. Lock held."""
        table = self._residency.table
        homes = table.warmest(rows)
        cold = (table.state[DEVICE][rows] == ABSENT) & (homes != NO_TIER)
        return _Coming(rows[cold], homes[cold])

    def _parts(self, coming: _Coming) -> list[tuple[Rows, int]]:
        """What to make room for and to plan at once, and how many pages go together, 0 for a worker's share of them.

        Where pages are read by themselves once that has begun, a few go first: they are being read while the others are planned.
        """
        residency = self._residency
        homes = [residency.tiers[tier] for tier in coming.by_tier]
        if len(homes) != 1 or not isinstance(homes[0], Tier) or not homes[0].reads_ahead:
            return [(coming.rows, 0)]
        if residency.device.memory() is None or residency.config.mover.workers == 1:  # who would carry the others meanwhile?
            return [(coming.rows, 0)]
        first = max(1, FIRST_BYTES // homes[0].slot_bytes)
        return [(part, len(part)) for part in (coming.rows[:first], coming.rows[first:]) if len(part)]

    def _hold_all(self, coming: _Coming) -> None:
        """Keep them where they come from. Lock held."""
        for tier, part in coming.by_tier.items():
            self._residency.table.hold(part, tier)

    def _let_go_all(self, coming: _Coming) -> None:
        with self._residency.lock:
            for tier, part in coming.by_tier.items():
                self.let_go(part, tier)

    def _plan_up(self, coming: _Coming, wanted: Rows, slots: Sequence[int], priority: Priority, share: int = 0) -> list[Transfer]:
        """Transfers of the first of `wanted` into these device slots, those too many being freed. Lock held."""
        residency = self._residency
        chosen = self._choose(wanted, DEVICE, slots)
        transfers, used = [], 0
        for tier, part in coming.by_tier.items():
            some = chosen if len(coming.by_tier) == 1 else chosen[np.isin(chosen, part)]
            transfers += self._plan(some, tier, DEVICE, slots[used : used + len(some)], priority, share)
            used += len(some)
            if priority == Priority.PREFETCH:
                residency.hinted.mark(some, tier)
                residency.metrics.prefetch.issued += len(some)
        return transfers

    def _choose(self, rows: Rows, target: int, slots: Sequence[int]) -> Rows:
        """The first rows that still need a copy in `target`, one per slot; slots too many are freed. Lock held."""
        residency = self._residency
        chosen: Rows = rows[residency.table.state[target][rows] == ABSENT][: len(slots)]
        residency.tiers[target].free(slots[len(chosen) :])
        return chosen

    def _plan(self, rows: Rows, source: int, target: int, slots: Sequence[int], priority: Priority, share: int = 0) -> list[Transfer]:
        """Transfers for these rows, small enough for one staging round and for all workers to share, or of `share` pages; copies begin.
        Lock held."""
        residency = self._residency
        table = residency.table
        table.begin(rows, target, slots)
        moves = [*map(Move, rows.tolist(), table.page_ids(rows), table.slot[source][rows].tolist(), slots)]
        most = residency.mover.staging.pages_in_one(residency.tiers[source], residency.tiers[target])
        size = max(1, min(most, share or -(-len(moves) // residency.config.mover.workers)))
        transfers = []
        for node, part in self._cut(moves, source, target, size):
            transfer = Transfer(source, target, part, priority, len(part) * residency.layout.page_bytes, node)
            table.hold([move.row for move in part], source)
            self.inflight.update(dict.fromkeys([(move.row, target) for move in part], transfer))
            transfers.append(transfer)
        return transfers

    def _cut(self, moves: Sequence[Move], source: int, target: int, size: int) -> Iterator[tuple[int | None, tuple[Move, ...]]]:
        """Moves in parts of at most `size`, with the node that each part's host memory is on, where workers are on several."""
        residency = self._residency
        by_node: dict[int | None, list[Move]] = {None: list(moves)}
        host = next((tier for tier in (residency.tiers[source], residency.tiers[target]) if isinstance(tier, HostTier)), None)
        if host is not None and len(host.worker_nodes) > 1:
            by_node = {}
            for move in moves:
                by_node.setdefault(host.node_of(move.source_slot if host is residency.tiers[source] else move.target_slot), []).append(move)
        for node, some in by_node.items():
            for start in range(0, len(some), size):
                yield node, tuple(some[start : start + size])

    def _submit(self, transfers: Sequence[Transfer]) -> list[Transfer]:
        """Queue transfers; one whose link is full, or that comes when the mover is closing, ends as cancelled."""
        residency = self._residency
        queued = []
        for transfer in transfers:
            try:
                if residency.mover.submit(transfer):
                    queued.append(transfer)
                    continue
                with residency.lock:
                    residency.metrics.link(transfer.source, transfer.target).turned_away += 1
                    residency.house.turned_away(transfer)
            except Closed:
                pass
            outcome = Outcome(cancelled=True)
            self.finished(transfer, outcome)
            transfer.finish(outcome)
        return queued

    def finished(self, transfer: Transfer, outcome: Outcome) -> None:
        """Write the outcome of a transfer into the page table. Loop thread, before anybody who waits for it wakes."""
        residency = self._residency
        source, target = transfer.source, transfer.target
        with residency.lock:
            table, metrics = residency.table, residency.metrics
            rows = np.array([move.row for move in transfer.moves], np.int64)
            table.unhold(rows, source)
            for row in rows.tolist():
                self.inflight.pop((row, target), None)
            came = np.full(len(rows), not outcome.cancelled)
            came[list(outcome.refused)] = False
            arrived = rows[came]
            table.commit(arrived, target)
            residency.admit(arrived, target)
            if len(given_up := rows[~came]):
                self._blame(transfer, outcome)
                if target == DEVICE:
                    metrics.prefetch.wasted += residency.hinted.unmark(given_up)
                residency.tiers[target].free(table.drop(given_up, target))
            metrics.tiers[target].pages_in += len(arrived)
            if not outcome.cancelled:
                metrics.link(source, target).carried(len(arrived), outcome.link_bytes, outcome.seconds)
            residency.house.tend(target, arrived)

    def _blame(self, transfer: Transfer, outcome: Outcome) -> None:
        """Count what was refused where, and remember copies that are of no use. Lock held."""
        for index, refused in outcome.refused.items():
            if index in outcome.lost:
                self.lose(transfer.moves[index].row, transfer.source, refused)
            else:
                self._refuse(transfer.target, refused)

    def _refuse(self, tier: int, refused: Refused) -> None:
        residency = self._residency
        residency.metrics.tiers[tier].refused[refused.reason] += 1
        name = residency.names[tier]
        self._warnings.say((tier, refused.reason), "page refused by tier %s: %s; it will be computed again", name, refused.reason)

    def lose(self, row: int, tier: int, refused: Refused) -> None:
        """A copy that its reader, who holds it, could not use: `let_go` buries it. Lock held."""
        self._refuse(tier, refused)
        self._unusable.add((row, tier))

    def let_go(self, rows: Rows, tier: int) -> None:
        """Undo `table.hold` of a copy job, and bury the copies that did not verify once nobody reads them. Lock held."""
        residency = self._residency
        residency.table.unhold(rows, tier)
        for row in rows.tolist() if self._unusable else ():
            if (row, tier) in self._unusable and not residency.table.readers[tier, row]:
                self._unusable.discard((row, tier))
                residency.eviction.forget(row, tier, "unusable")
