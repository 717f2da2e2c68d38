"""What an engine tells a cache beside its KV: which pages are to be kept and for how long, and what computing costs. Where attention goes:
`attending.py`.

Stateless; what is told is written under the residency's lock.
"""

from __future__ import annotations

import math

from kvtier.errors import LeaseError
from kvtier.leases.lease import Match
from kvtier.pages import NO_ROW
from kvtier.residency import Residency


def pin(residency: Residency, match: Match, ttl: float | None, tier: str | None) -> int:
    """See `TieredKVCache.pin`."""
    if tier is not None and tier not in residency.names:
        raise LeaseError(f"pin: there is no tier {tier!r}; this cache has {', '.join(residency.names)}")
    if ttl is not None and not ttl >= 0:
        raise LeaseError(f"pin: ttl is {ttl} s; expected 0 or more, or None for a pin that lasts until unpin")
    with residency.lock:
        rows = residency.table.find(match.keys)
        until = math.inf if ttl is None else residency.clock() + ttl
        residency.table.pin(rows, residency.last if tier is None else residency.names.index(tier), until)
    return len(rows)


def unpin(residency: Residency, match: Match) -> None:
    """See `TieredKVCache.unpin`."""
    with residency.lock:
        rows = residency.table.rows_of(match.keys)
        residency.table.unpin(rows[rows != NO_ROW])


def record_prefill(residency: Residency, start: int, tokens: int, seconds: float) -> None:
    """See `TieredKVCache.record_prefill`."""
    if not (start >= 0 and tokens > 0 and 0 < seconds < math.inf):
        raise LeaseError(f"record_prefill: {tokens} tokens after {start} in {seconds} s; expected tokens and a time above 0")
    with residency.lock:
        residency.prices.computed(start, tokens, seconds)
