"""Pages by key, for engines that own their paged cache and only want bytes kept and brought back.

The engine names pages by the keys of `kvtier.keys`; its blocks are its own. The device tier is a staging area then: `store` fills slots of
it and lets the cache write them further down, `restore` hands pages out to be copied (`handing.py`). What is held where is told as changes,
so that a scheduler in another process can keep a mirror. `store` runs on one thread at a time, `restore` beside it on one for pages that
are near and on one for others (`any_far`); `changes` on any. State: the keys that changed since they were last asked for, under the
cache's lock.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for
from typing import Any

import numpy as np
import torch

from kvtier.keys import PageKey
from kvtier.leases.handing import HOST, ComingPages, HandOut, NearPages, Part
from kvtier.leases.lease import Lease, Match
from kvtier.pages import ABSENT, DEVICE, NO_ROW, NO_TIER, READY, Rows
from kvtier.residency import Residency
from kvtier.residency.occupancy import Levels, levels
from kvtier.tiers.base import Tier

MOST_AT_ONCE = 16
"""Pages of one request in the staging area at a time, so that some are decoded while others are copied."""

Fill = Callable[[Sequence[int], Sequence[int]], None]
"""Copies pages from the engine into the staging area: their positions in the list of keys, and their slots."""


class KeyedPages:
    """Stores and restores pages by key: `TieredKVCache.by_key()`. Nothing else may put pages into that cache."""

    def __init__(self, residency: Residency, acquire: Callable[[Match], Lease]) -> None:
        self._residency = residency
        self._acquire_match = acquire
        self._changed: set[PageKey] = set()
        self._asked_for_room: Future[list[int]] | None = None
        """The last question for slots of the staging area; the storing thread's."""
        below = residency.tiers[min(HOST, residency.last)]
        self._host = below if isinstance(below, Tier) and below.in_memory else None
        """The tier below the staging area, if that is memory."""
        self.at_once = max(1, min(MOST_AT_ONCE, residency.device.capacity_slots // 8))
        self._spare_slots = min(2 * self.at_once, residency.device.capacity_slots // 4)
        """As many as a restore has in the staging area. Stores, which may wait there for a disk, leave them free."""
        with residency.lock:
            residency.watcher = self._note
            for tier in range(len(residency.tiers)):
                self._note(residency.table.key[residency.table.ready(tier)].tolist())

    def slot(self, slot: int) -> torch.Tensor:
        """The memory of one slot of the staging area, `[layers, planes, page_tokens, kv_heads, head_dim]`."""
        return self._residency.device.page(slot)

    def counts(self) -> dict[str, dict[str, int]]:
        """Since the start: pages that left each tier, and copies that were refused, by reason."""
        residency = self._residency
        with residency.lock:
            tiers = residency.metrics.tiers
            evicted = {name: sum(counts.evicted.values()) for name, counts in zip(residency.names, tiers, strict=True)}
            return {"evicted": evicted, "refused": dict(sum((counts.refused for counts in tiers), Counter()))}

    def levels(self) -> Levels:
        """How full the tiers are, and what waits on links."""
        with self._residency.lock:
            return levels(self._residency)

    def _note(self, keys: Sequence[PageKey | None]) -> None:
        """These pages got or lost a copy. Lock held."""
        self._changed.update(key for key in keys if key is not None)

    def changes(self) -> dict[PageKey, int]:
        """The pages whose copies changed since the last call (at first: all pages), as bits: bit t is set where tier t has it."""
        residency = self._residency
        with residency.lock:
            keys, self._changed = list(self._changed), set()
            if not keys:
                return {}
            rows = residency.table.rows_of(keys)
            masks = np.zeros(len(keys), np.int64)
            for tier in range(len(residency.tiers)):
                masks |= (residency.table.state[tier][rows] == READY).astype(np.int64) << tier
            masks[rows == NO_ROW] = 0
        return dict(zip(keys, masks.tolist(), strict=True))

    def store(self, keys: Sequence[PageKey], before: PageKey, depth: int, fill: Fill, enough: Future[None] | None = None) -> int:
        """Keep pages that follow each other, the first one at `depth` after the page `before`; returns how many are kept now.

        `fill` writes those that are new into the slots it is given. Waits for room; once `enough` is done, keeps only what there is room
        for at once. The first pages come first.
        """
        kept = 0
        for start in range(0, len(keys), self.at_once):
            part = keys[start : start + self.at_once]
            done = self._store_some(part, keys[start - 1] if start else before, depth + start, _shifted(fill, start), enough)
            kept += done
            if done < len(part):
                break
        return kept

    def _store_some(self, keys: Sequence[PageKey], before: PageKey, depth: int, fill: Fill, enough: Future[None] | None) -> int:
        residency = self._residency
        with residency.lock:
            missing = np.flatnonzero(self._homes(keys) == NO_TIER).tolist()
            slots = residency.eviction.reserve_now(DEVICE, len(missing), spare=self._spare_slots)
            if slots is None and residency.eviction.vacate(residency.table.ready(DEVICE)):
                slots = residency.eviction.reserve_now(DEVICE, len(missing), spare=self._spare_slots)
        if slots is None:
            slots = self._wait_for_room(len(missing), enough)
        written = missing[: len(slots)]
        try:
            if written:
                fill(written, slots)
        except BaseException:
            with residency.lock:
                residency.device.free(slots)
            raise
        with residency.lock:
            self._settle(keys, before, depth, written, slots)
        return len(keys) if len(written) == len(missing) else missing[len(written)]

    def _wait_for_room(self, count: int, enough: Future[None] | None) -> list[int]:
        """Up to `count` slots, as soon as others have left; none once `enough` is done.

        A question for room cannot be taken back: slots that come too late are freed, and until then nobody asks another.
        """
        residency = self._residency
        if (enough is not None and enough.done()) or (self._asked_for_room is not None and not self._asked_for_room.done()):
            return []
        self._asked_for_room = asked = residency.mover.spawn(residency.eviction.reserve(DEVICE, count, spare=self._spare_slots))
        waited: list[Future[Any]] = [asked] if enough is None else [asked, enough]
        wait_for(waited, return_when=FIRST_COMPLETED)
        if asked.done():
            return asked.result()
        asked.add_done_callback(residency.eviction.free_late)
        return []

    def _homes(self, keys: Sequence[PageKey]) -> Rows:
        """The warmest tier of each page, NO_TIER for those that are nowhere. Lock held."""
        table = self._residency.table
        rows = table.rows_of(keys)
        homes = table.warmest(rows)
        homes[rows == NO_ROW] = NO_TIER
        return homes

    def _settle(self, keys: Sequence[PageKey], before: PageKey, depth: int, written: Sequence[int], slots: Sequence[int]) -> None:
        """What was written becomes visible and goes on its way down; pages that others brought meanwhile are left to them. Lock held."""
        residency, table = self._residency, self._residency.table
        for index, slot in zip(written, slots, strict=True):
            row = table.row(keys[index])
            if row != NO_ROW and table.state[DEVICE, row] != ABSENT:
                residency.device.free([slot])
                continue
            parent_key = keys[index - 1] if index else before
            rows = residency.settle_in([keys[index]], parent_key, depth + index, table.row(parent_key), [slot])
            residency.house.tend(DEVICE, rows)
            residency.release(rows)

    def any_far(self, keys: Sequence[PageKey]) -> bool:
        """Whether any of these pages are further away than in the tier below the staging area, so that others should not wait for them."""
        with self._residency.lock:
            return bool((self._homes(keys) > HOST).any())

    def restore(self, keys: Sequence[PageKey], hand_out: HandOut, until_s: float | None = None, only_near: bool = False) -> int:
        """Hand these pages out, in order; how many came, counted up to the first one that did not.

        Pages in memory are handed out from where they are, others are brought up first. What has not come when `time.monotonic()` reaches
        `until_s` counts as not having come. With `only_near` it waits for nothing that is further away than the tier below the staging
        area: a page that has moved further down meanwhile counts as not having come.
        """
        parts = deque(self._parts(keys))
        ahead: deque[Part] = deque()
        came, tried_again_at = 0, -1
        try:
            while parts or ahead:
                while parts and len(ahead) < 2:  # the next part is on its way while this one is copied
                    begun = self._begin(*parts[0], only_near)
                    if begun is None:
                        parts.clear()
                        break
                    ahead.append(begun)
                    parts.popleft()
                if not ahead:
                    break
                done = ahead[0].hand_out(came, hand_out, until_s)
                came += done
                part = ahead.popleft()
                part.release()
                if done == len(part.keys):
                    continue
                if came == tried_again_at or (until_s is not None and time.monotonic() >= until_s) or not self._make_room(keys[came]):
                    break
                while ahead:
                    ahead.pop().release()
                parts = deque(self._parts(keys[came:]))
                tried_again_at = came
        finally:
            for part in ahead:
                part.release()
        return came

    def _parts(self, keys: Sequence[PageKey]) -> list[tuple[Sequence[PageKey], bool]]:
        """`keys` in parts that are handed out together, and whether each is in memory. All that follow each other in memory are one."""
        if not keys:
            return []
        with self._residency.lock:
            far = self._homes(keys) > (DEVICE if self._host is None else HOST)
        changes = {int(place) + 1 for place in np.flatnonzero(far[1:] != far[:-1])}
        ends = sorted(changes | {len(keys)})
        found: list[tuple[Sequence[PageKey], bool]] = []
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            at_once = self.at_once if far[start] else end - start
            found += [(keys[at : min(at + at_once, end)], not far[start]) for at in range(start, end, at_once)]
        return found

    def _make_room(self, wanted: PageKey) -> bool:
        """A page did not come: make what room there is; whether it is still somewhere, so that trying again makes sense."""
        residency = self._residency
        with residency.lock:
            residency.eviction.vacate(residency.table.ready(DEVICE))
            return bool(len(residency.table.find([wanted])))

    def _begin(self, keys: Sequence[PageKey], near: bool, only_near: bool) -> Part | None:
        """A hold on these pages; with `only_near` none, if any of them is further away."""
        if near and self._host is not None:
            return NearPages(self._residency, self._host, keys)
        with self._residency.lock:  # what is leased stays where it was seen
            return None if only_near and self.any_far(keys) else ComingPages(self._residency, keys, self._acquire(keys))

    def _acquire(self, keys: Sequence[PageKey]) -> Lease:
        tokens = len(keys) * self._residency.layout.page_tokens
        # Nothing is appended to these leases, so nobody asks for their tokens or their root.
        return self._acquire_match(Match(tokens, np.zeros(tokens, np.int64), tuple(keys), b"", {}, 0, None, None))


def _shifted(fill: Fill, start: int) -> Fill:
    """`fill` for a part of the keys that begins at position `start`."""
    return lambda positions, slots: fill([start + position for position in positions], slots)
