"""How full the tiers are, and what waits between them: one reading, taken under the residency's lock.

Tiers and mover know their numbers; only for what leases keep, one column of the page table is looked through. No state.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from kvtier.pages import DEVICE, READY, PageTable

if TYPE_CHECKING:
    from kvtier.residency.residency import Residency

Levels = dict[str, dict[str, dict[str, int]]]
"""`tiers` and `links`, by name, as in `TieredKVCache.stats`."""


def levels(residency: Residency) -> Levels:
    """The size of each tier, how much of it is taken, leased and moving, and what waits on each link that was used. Lock held.

    Bytes and slots. `capacity_slots`: copies that there is room for, each of the most bytes it can take; `used_slots`: those there are,
    reserved ones included, which is more where copies take less than that. `leased_slots`: what leases keep there. `moving_slots`: what
    transfers that are queued or under way read or write; a copy that two of them read counts twice. `queued_bytes`: of raw pages, to be
    held against `mover.queue_bytes`.
    """
    names, table = residency.names, residency.table
    moving, links = Counter[int](), set(residency.metrics.links)
    for transfer in set(residency.copying.inflight.values()):
        links.add((transfer.source, transfer.target))
        moving[transfer.source] += len(transfer.moves)
        moving[transfer.target] += len(transfer.moves)
    leased = _leased(table)
    tiers = {
        names[index]: {
            "capacity_bytes": tier.capacity_bytes,
            "bytes_used": tier.bytes_used,
            "capacity_slots": tier.capacity_slots,
            "used_slots": tier.used_slots,
            "leased_slots": leased[index],
            "moving_slots": moving[index],
        }
        for index, tier in enumerate(residency.tiers)
    }
    queued = {
        f"{names[source]}->{names[target]}": {"queued_bytes": residency.mover.queued_bytes(source, target)}
        for source, target in sorted(links)
    }
    return {"tiers": tiers, "links": queued}


def _leased(table: PageTable) -> list[int]:
    """Copies that leases keep, per tier: on the device, arriving ones included; elsewhere those of pages that are not there yet."""
    leased = np.flatnonzero(table.leases[: table.rows] != 0)  # of truth values: NumPy finds those several times faster
    states = table.state[:, leased]
    kept = (states == READY) & (states[DEVICE] != READY)
    kept[DEVICE] = states[DEVICE]
    return [int(np.count_nonzero(here)) for here in kept]
