"""How everything is dropped that nobody holds, tier by tier, a part at a time so that requests get the lock in between."""

from __future__ import annotations

from kvtier.residency.residency import Residency
from kvtier.tiers.base import Tier

DROPPED_AT_ONCE = 16384
"""Pages that are dropped before others may have the lock."""


def clear(residency: Residency) -> int:
    """See `TieredKVCache.clear`. Call when no transfer is under way; takes the lock."""
    dropped = 0
    for tier in range(len(residency.tiers)):
        with residency.lock:
            rows = residency.table.ready(tier)[::-1]
        for start in range(0, len(rows), DROPPED_AT_ONCE):
            with residency.lock:
                dropped += residency.eviction.clear(rows[start : start + DROPPED_AT_ONCE], tier)
    for tier_slots in residency.tiers:
        if isinstance(tier_slots, Tier):
            residency.mover.spawn(residency.mover.work(tier_slots.tidy)).result()
    return dropped
