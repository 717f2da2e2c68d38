"""Eviction: carries out what the policies choose. Which copies leave a tier, where their pages go, and who gets the room.

One object per `kvtier.residency`, whose lock guards everything here. A victim with a colder copy just leaves (`reserve_now`), and so does
one that is not worth a copy below; another one is first copied down (`reserve`, `sink`), as far as the tiers below take it. Coroutines run
on the mover's loop and see the world change at every `await`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np

from kvtier.errors import IntegrityError
from kvtier.keys import PageKey
from kvtier.mover.transfer import Priority
from kvtier.pages import DEVICE, READY, Rows, names_of
from kvtier.policy import Mask
from kvtier.residency.opening import SELECTIVE, WRITE_BACK
from kvtier.residency.protection import Protected

if TYPE_CHECKING:
    from kvtier.residency.residency import Residency

_NO_ROWS = np.empty(0, np.int64)


class Eviction:
    """What leaves the tiers of one residency."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency

    def is_clean(self, rows: Rows, tier: int) -> Mask:
        """Which of these copies can be dropped without moving bytes: those with a colder copy, no colder than a pin allows.

        In the coldest tier, all.
        """
        residency = self._residency
        if tier == residency.last:
            return np.ones(len(rows), np.bool_)
        clean = residency.table.has_copy_below(rows, tier)
        now = residency.clock()
        pinned = residency.table.any_pinned(rows, now)
        if pinned is not None:
            for index in np.flatnonzero(pinned & clean).tolist():
                floor = residency.table.pinned(int(rows[index]), now)
                clean[index] = residency.table.has_copy_below(rows[index : index + 1], tier, floor if floor > tier else None)[0]
        return clean

    def is_wanted_below(self, rows: Rows, tier: int) -> Mask:
        """Which of these pages the next tier takes by its write policy; with `write_back`, those worth the write. Lock held."""
        residency = self._residency
        below, wanted = tier + 1, np.ones(len(rows), np.bool_)
        if residency.entry[below] == WRITE_BACK:
            wanted = residency.admission.worth(residency.policies[tier].chance(rows, residency.clock()))
        elif residency.entry[below] == SELECTIVE:
            wanted = residency.table.uses[rows] >= self.selective_uses(below)
        pinned = residency.table.any_pinned(rows, residency.clock())
        return wanted if pinned is None else wanted | pinned

    def selective_uses(self, tier: int) -> int:
        """Uses after which `write_through_selective` lets a page into `tier`. IntegrityError for a tier that has no such number."""
        residency = self._residency
        section = residency.config.host if residency.names[tier] == "host" else residency.config.disk
        if section is None:
            raise IntegrityError(f"tier {residency.names[tier]} is not in the configuration")
        return section.selective_uses

    def drop(self, rows: Rows, tier: int, reason: str) -> None:
        """Let READY copies go that the policy of `tier` no longer knows. Lock held.

        A colder copy inherits the page's recency.
        """
        residency = self._residency
        if not len(rows):
            return
        if tier == DEVICE and residency.hinted.count:
            residency.metrics.prefetch.wasted += residency.hinted.unmark(rows)
        if residency.watcher is not None:
            residency.watcher(residency.table.key[rows].tolist())
        residency.tiers[tier].free(residency.table.drop(rows, tier))
        self._dropped(rows, tier, reason)

    def _dropped(self, rows: Rows, tier: int, reason: str) -> None:
        """Copies of these pages are in `tier` no more. Lock held."""
        residency = self._residency
        if tier < residency.last:
            self._bequeath(rows, tier)
        residency.metrics.tiers[tier].evicted[reason] += len(rows)
        if residency.digests is not None:
            residency.digests.drop([row for row in rows.tolist() if residency.table.key[row] is None])

    def _bequeath(self, rows: Rows, tier: int) -> None:
        """The next colder copy of each of these pages inherits its recency. Lock held."""
        residency = self._residency
        for below in range(tier + 1, residency.last + 1):
            policy, now = residency.policies[below], residency.clock()
            try:
                policy.touch(rows, now)  # mostly all are in the next tier
            except KeyError:
                known = policy.here(rows)
                if known.any():
                    policy.touch(rows[known], now)
                rows = rows[~known]
            else:
                return

    def lose(self, rows: Rows, tier: int, reason: str) -> None:
        """`drop`, for want of room: copies without another one are gone, and may turn out to be wanted. Lock held."""
        residency = self._residency
        if residency.last and len(alone := rows[residency.table.is_alone(rows, tier)]):
            residency.admission.evict(residency.table.names(alone))
        self.drop(rows, tier, reason)

    def _refuse(self, rows: Rows, tier: int) -> None:
        """`drop` what the tier below does not admit. Lock held."""
        residency = self._residency
        alone = rows[residency.table.is_alone(rows, tier)]
        if len(alone):
            chances = residency.policies[tier].chance(alone, residency.clock())
            residency.admission.refuse(residency.table.names(alone), chances)
        self.drop(rows, tier, "not admitted below")

    def forget(self, row: int, tier: int, reason: str) -> None:
        """Drop a copy whether the policy knows it or not. Lock held."""
        residency = self._residency
        rows = np.array([row])
        if row in residency.policies[tier]:
            residency.policies[tier].remove(rows)
        self.drop(rows, tier, reason)

    def clear(self, rows: Rows, tier: int) -> int:
        """Drop those copies that the policy knows and nobody holds; how many. Lock held."""
        residency = self._residency
        free = (residency.table.leases[rows] == 0) & (residency.table.readers[tier][rows] == 0)
        rows = rows[free & residency.policies[tier].here(rows)]
        residency.policies[tier].remove(rows)
        self.drop(rows, tier, "cleared")
        return len(rows)

    def vacate(self, rows: Rows) -> int:
        """Take pages that are in a colder tier too, and that nobody holds, off the device; how many. Lock held.

        The device's policy would not: it lets no page go before those that follow it.
        """
        return self.clear(rows[self.is_clean(rows, DEVICE)], DEVICE)

    def reserve_now(self, tier: int, count: int, hinted: bool = False, spare: int = 0) -> list[int] | None:
        """`count` slots if they can be had without moving bytes, else None and nothing changed. Lock held.

        `hinted`: for pages that a hint is about. `spare`: so many others stay free.
        """
        residency = self._residency
        room = residency.tiers[tier]
        missing = count + spare - room.free_slots
        slots = room.reserve(count) if missing <= 0 or not count else None
        if slots is not None:
            return slots
        missing, now = max(1, missing), residency.clock()
        policy = residency.policies[tier]
        if policy.gives_way:
            left = self._give_way(missing, tier, now, hinted)
            if left is not None:
                return room.exchange(left, count)
            if tier != residency.last and residency.entry[tier + 1] not in (WRITE_BACK, SELECTIVE):
                return None  # fewer may leave, or one of the first has to be copied down
        pressure = residency.smoothed_pressure(tier)
        if tier != residency.last:
            with Protected(residency.table, tier, now, hinted) as protected:
                likely = policy.peek(missing, protected, now, pressure)
            if len(likely) < missing or self.is_wanted_below(likely[~self.is_clean(likely, tier)], tier).any():
                return None
        with Protected(residency.table, tier, now, hinted) as protected:
            victims = policy.evict(missing, protected, now, pressure)
        if victims is None:
            return None
        clean = self.is_clean(victims, tier)
        self.lose(victims[clean], tier, "room needed")
        self._refuse(victims[~clean], tier)
        return room.reserve(count)

    def _give_way(self, count: int, tier: int, now: float, hinted: bool) -> list[int] | None:
        """`count` pages leave `tier` in one step: their slots. None, and nothing done, where it takes more. Lock held."""
        residency, table = self._residency, self._residency.table
        gone: list[PageKey] | None = [] if tier == residency.last and (tier or residency.watcher is not None) else None
        exit = table.exit(tier, now, gone, hinted)
        left = None if exit is None else residency.policies[tier].give_way(count, exit, now)
        if left is None:
            return None
        rows, slots = left
        if tier == DEVICE and residency.hinted.count:
            residency.metrics.prefetch.wasted += residency.hinted.unmark(rows)
        if residency.watcher is not None:
            residency.watcher(table.key[rows].tolist() if gone is None else gone)
        if gone and tier:
            alone = [key for key, row in zip(gone, rows.tolist(), strict=True) if table.key[row] is None]
            residency.admission.evict(names_of(alone))
        self._dropped(rows, tier, "room needed")
        return slots

    async def reserve(
        self, tier: int, count: int, priority: Priority = Priority.DEMAND, within_s: float | None = None, spare: int = 0
    ) -> list[int]:
        """Up to `count` slots of `tier`, evicting and copying down what must leave; fewer when no more can be had.

        With `within_s`, for pages that are only promised for that time: nothing leaves that is worth more. `spare` others stay free.
        """
        residency, hinted = self._residency, within_s is not None
        while count > 0:
            moving = None
            with residency.lock:
                if within_s is not None:
                    count = self.displaceable(count, within_s)
                    if not count:
                        break
                slots = self.reserve_now(tier, count, hinted, spare)
                if slots is not None:
                    return slots
                policy, now, pressure = residency.policies[tier], residency.clock(), residency.smoothed_pressure(tier)
                free = residency.tiers[tier].free_slots - spare
                with residency.protecting(tier, hinted) as protected:
                    victims = policy.evict(max(1, count - free), protected, now, pressure)
                if victims is None:
                    moving = self._way_out(tier)
                    if moving is None:
                        with residency.protecting(tier, hinted) as protected:
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
                with residency.lock:
                    count = min(count - 1, residency.tiers[tier].free_slots - spare)
        return []

    def wait_for_slots(self, count: int) -> list[int]:
        """`reserve` on the device for another thread than the loop's, which waits; interrupted, it leaves no slot taken. Without lock."""
        asked = self._residency.mover.spawn(self.reserve(DEVICE, count))
        try:
            return asked.result()
        except BaseException:
            asked.add_done_callback(self.free_late)
            raise

    def free_late(self, asked: Future[list[int]]) -> None:
        """Device slots came that nobody waits for any more. Takes the lock."""
        if not asked.cancelled() and asked.exception() is None:
            with self._residency.lock:
                self._residency.device.free(asked.result())

    def displaceable(self, count: int, within_s: float) -> int:
        """How many of `count` pages wanted within so many seconds may have a device slot: a free one, or that of a page worth less.

        Pages brought up for an earlier promise stay. Lock held.
        """
        residency = self._residency
        free = residency.device.free_slots
        if count <= free:
            return count
        policy, now, pressure = residency.policies[DEVICE], residency.clock(), residency.smoothed_pressure(DEVICE)
        promised = policy.promised(within_s, now)
        with residency.protecting(DEVICE, hinted=True) as protected:
            leaving = policy.peek(count - free, protected, now, pressure)
        for place, page in enumerate(leaving.tolist()):
            if policy.score(page, now, pressure) >= promised:
                return free + place
        return free + len(leaving)

    def _way_out(self, tier: int) -> Awaitable[object] | None:
        """Something whose end may give room in a tier without victims: a page on its way in or out, a job that holds pages. Lock held.

        Jobs that copy down from `tier` wait only for colder tiers, and transfers for nobody, so waiting for these cannot close a circle.
        """
        residency = self._residency
        for transfer in residency.copying.inflight.values():
            if tier in (transfer.source, transfer.target):
                residency.mover.urge(transfer)
                return transfer.ending()
        return next((asyncio.shield(job) for job in residency.copying.copying_from[tier]), None)

    async def sink(self, rows: Rows, tier: int, reason: str, priority: Priority) -> int:
        """Copy victims (already out of the policy, READY in `tier`, coldest first) one tier down, then drop them; returns how many left.

        What the tier below has no room for goes further down. What it does not take, or nobody has room for, is dropped for good
        unless it is pinned; unless `priority` is DEMAND, what nobody has room for stays, too.
        """
        residency = self._residency
        with residency.lock:
            residency.table.hold(rows, tier)
            wanted = rows[::-1][self.is_wanted_below(rows[::-1], tier)]
            homeless = wanted
        for below in range(tier + 1, len(residency.tiers)):
            await residency.copying.down(homeless, tier, below, priority)
            with residency.lock:
                homeless = homeless[~residency.table.has_copy_below(homeless, tier)]
            if not len(homeless):
                break
        with residency.lock:
            residency.copying.let_go(rows, tier)
            rows = rows[residency.table.state[tier][rows] == READY]
            saved = self.is_clean(rows, tier)
            admitted = np.isin(rows, wanted)
            pinned = residency.table.any_pinned(rows, residency.clock())
            precious = np.zeros(len(rows), np.bool_) if pinned is None else pinned
            if priority != Priority.DEMAND:
                precious |= admitted
            stays = (residency.table.leases[rows] > 0) | (residency.table.readers[tier][rows] > 0) | (precious & ~saved)
            residency.admit(rows[stays], tier)
            self.drop(rows[saved & ~stays], tier, reason)
            self._refuse(rows[~saved & ~stays & ~admitted], tier)
            self.lose(rows[~saved & ~stays & admitted], tier, "no room below")
            residency.admission.admit(int(np.count_nonzero(saved & admitted & ~stays)))
            return int(np.count_nonzero(~stays))
