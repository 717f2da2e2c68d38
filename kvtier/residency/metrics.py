"""Counters of a running cache: per tier, per link, for prefetching. Plain numbers, changed under the cache's lock.

`TieredKVCache.stats()` turns them into one nested dict; names here are the names there.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class TierMetrics:
    """What one tier received, gave back and let go."""

    pages_in: int = 0
    """Copies committed in this tier."""
    pages_served: int = 0
    """Pages a request used from this tier: found on the device, or restored (or prefetched) from here."""
    hit_tokens: int = 0
    """Tokens of the pages served."""
    pages_recovered: int = 0
    """Copies found when the store was opened."""
    evicted: Counter[str] = field(default_factory=Counter)
    """Copies that left, by reason."""
    refused: Counter[str] = field(default_factory=Counter)
    """Copies that could not be written or did not verify, by reason."""

    def served(self, pages: int, page_tokens: int) -> None:
        """So many pages more were served."""
        self.pages_served += pages
        self.hit_tokens += pages * page_tokens


@dataclass
class LinkMetrics:
    """What crossed one link."""

    transfers: int = 0
    pages: int = 0
    bytes: int = 0
    """Encoded bytes, as they are at the colder end."""
    turned_away: int = 0
    """Transfers that could wait and were given up because the link's queue was full."""
    seconds: float = 0.0
    """Worker time spent, reading, verifying, coding and writing included."""

    def carried(self, pages: int, bytes: int, seconds: float) -> None:
        """One transfer more."""
        self.transfers += 1
        self.pages += pages
        self.bytes += bytes
        self.seconds += seconds

    @property
    def gb_per_s(self) -> float:
        """Encoded gigabytes per second of worker time; 0 before the first transfer."""
        return self.bytes / self.seconds / 1e9 if self.seconds else 0.0


@dataclass
class PrefetchMetrics:
    """Pages brought up before anybody asked."""

    issued: int = 0
    in_time: int = 0
    """Were on the device when a request wanted them."""
    late: int = 0
    """Were still on their way."""
    wasted: int = 0
    """Left the device unused, or never arrived."""
    over_budget: int = 0
    """Were hinted at but not fetched, not later either, because the prefetch budget was used up."""
    outranked: int = 0
    """Were hinted at but not fetched, not later either, because what would have had to leave the device is worth more or is held."""


@dataclass
class RoutingMetrics:
    """What `acquire_in_place` did with pages in host memory."""

    fetched: int = 0
    """Requests whose pages were brought to the device."""
    in_place: int = 0
    """Requests whose pages were attended to where they were."""


@dataclass
class Metrics:
    """All counters of one cache."""

    tiers: list[TierMetrics]
    links: dict[tuple[int, int], LinkMetrics] = field(default_factory=dict)
    prefetch: PrefetchMetrics = field(default_factory=PrefetchMetrics)
    routing: RoutingMetrics = field(default_factory=RoutingMetrics)
    lookups: int = 0
    tokens_asked: int = 0
    """Tokens of full pages that `acquire` was asked for."""
    tokens_declined: int = 0
    """Tokens of cached pages that `acquire` left out, because computing them again was expected to be faster."""
    recalls: int = 0
    """Layers of pages brought back to the device for sequences on a device budget, because a query asked for them."""
    attention_ignored: int = 0
    """Attention values that were NaN, negative, above one or for pages no longer held."""

    def link(self, source: int, target: int) -> LinkMetrics:
        """The counters of one link, made at its first use."""
        return self.links.setdefault((source, target), LinkMetrics())
