"""How the device tier changes its size while it is in use: memory at its end is taken, or emptied and given back.

Emptying moves pages of the last slots to free ones further in front, one copy on the GPU each, for which others may have to leave; what
finds no room leaves itself. Leased pages are not moved, since engines know their slots, nor are pages that a transfer reads. Coroutines of
the mover's loop, one at a time; the bookkeeping is done under the residency's lock, copies and memory calls are not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np

from kvtier.errors import ConfigError, DeviceError
from kvtier.mover.transfer import Priority
from kvtier.pages import DEVICE, READY, Rows
from kvtier.residency.residency import Residency
from kvtier.tiers.gpu import GpuPool

_one_at_a_time: WeakKeyDictionary[Residency, asyncio.Lock] = WeakKeyDictionary()


async def resize(residency: Residency, slots: int) -> int:
    """Bring the device tier to `slots` pages, or as near as leases allow; how many it has then. See `TieredKVCache.resize_device`."""
    pool = residency.device
    if not isinstance(pool, GpuPool):
        raise ConfigError("the device tier is in CPU memory, which has a fixed size; only on a GPU can it be resized")
    async with _one_at_a_time.setdefault(residency, asyncio.Lock()):
        try:
            if slots > pool.capacity_slots:
                await residency.mover.work(pool.reach, slots)
                with residency.lock:
                    pool.extend(slots)
            elif slots < pool.capacity_slots:
                await _shrink(residency, pool, slots)
        except DeviceError as error:
            raise ConfigError(f"resize_device to {slots * pool.slot_bytes} bytes: {error}") from error
        return pool.capacity_slots


async def _shrink(residency: Residency, pool: GpuPool, slots: int) -> None:
    with residency.lock:
        pool.retire(slots)
    try:
        await _empty(residency, pool, slots)
    finally:
        with residency.lock:
            pool.end()
        await residency.mover.work(pool.give_back)


async def _empty(residency: Residency, pool: GpuPool, limit: int) -> None:
    """Let the pages behind slot `limit` that nobody holds move in front of it, or leave."""
    table = residency.table
    with residency.lock:
        rows = _movable(residency, limit)
        table.hold(rows, DEVICE)
    fresh: list[int] = []
    try:
        fresh = await residency.eviction.reserve(DEVICE, len(rows))
        moving = rows[: len(fresh)]
        with residency.lock:
            old = table.slot[DEVICE][moving].tolist()
        await residency.mover.work(pool.copy_to, old, pool, fresh)
        with residency.lock:
            fresh = _change_slots(residency, pool, moving, fresh)
    finally:
        with residency.lock:
            pool.free(fresh)
            residency.copying.let_go(rows, DEVICE)
    with residency.lock:
        left = _movable(residency, limit)
        left = left[residency.policies[DEVICE].here(left)]
        residency.policies[DEVICE].remove(left)
    await residency.eviction.sink(left, DEVICE, "device shrinks", Priority.DEMAND)


def _movable(residency: Residency, limit: int) -> Rows:
    """Rows with a copy behind slot `limit` that is neither leased nor read by anybody. Lock held."""
    table, used = residency.table, slice(0, residency.table.rows)
    free = (table.leases[used] == 0) & (table.readers[DEVICE, used] == 0)
    rows: Rows = np.flatnonzero((table.state[DEVICE, used] == READY) & (table.slot[DEVICE, used] >= limit) & free)
    return rows


def _change_slots(residency: Residency, pool: GpuPool, rows: Rows, fresh: Sequence[int]) -> list[int]:
    """The copies are made: these rows are in the fresh slots now, unless somebody took hold of them meanwhile. Slots to free. Lock held."""
    table = residency.table
    still = (table.leases[rows] == 0) & (table.readers[DEVICE][rows] == 1) & (table.state[DEVICE][rows] == READY)
    slots = np.array(fresh, np.int64)
    old = table.slot[DEVICE][rows[still]].tolist()
    table.slot[DEVICE, rows[still]] = slots[still]
    pool.free(old)
    unused: list[int] = slots[~still].tolist()
    return unused
