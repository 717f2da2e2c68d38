"""What kvtier tells Prometheus about a cache: names, meanings, and where in `TieredKVCache.stats()` each number is.

For `kvtier.prometheus`, and for vLLM's connector, which shows the gauges under `vllm:`. Plain data: needs no package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Series:
    """The metric `kvtier_<name>`, a counter with `_total` behind it.

    Its numbers are `stats[key]`, or `stats[section][label][key]` for each label of the section; where that is a dict, for each of its keys,
    which is a label, too. `labels` are the names of these.
    """

    name: str
    text: str
    key: str
    section: str = ""
    labels: tuple[str, ...] = ()

    def samples(self, stats: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], float]]:
        """The values of the labels and the number, for all that there are."""
        parts = {(label,): part for label, part in stats[self.section].items()} if self.section else {(): stats}
        for labels, part in parts.items():
            found = part[self.key]
            for more, number in found.items() if isinstance(found, Mapping) else [(None, found)]:
                yield (labels if more is None else (*labels, more)), number


def _of_tiers(name: str, text: str, key: str, *more: str) -> Series:
    return Series(name, text, key, "tiers", ("tier", *more))


def _of_links(name: str, text: str, key: str) -> Series:
    return Series(name, text, key, "links", ("link",))


GAUGES = (
    _of_tiers("tier_capacity_bytes", "Bytes that the tier may hold.", "capacity_bytes"),
    _of_tiers("tier_used_bytes", "Bytes that copies in the tier take.", "bytes_used"),
    _of_tiers("tier_capacity_slots", "Copies of pages that the tier has room for, each of the most bytes it can take.", "capacity_slots"),
    _of_tiers("tier_used_slots", "Copies in the tier, those being written included.", "used_slots"),
    _of_tiers("tier_leased_slots", "Copies that requests hold in the tier, so that they cannot leave.", "leased_slots"),
    _of_tiers("tier_moving_slots", "Copies that are being read or written by transfers, or wait for that.", "moving_slots"),
    _of_links("link_queued_bytes", "Bytes of raw pages that wait to cross the link; bounded by mover.queue_bytes.", "queued_bytes"),
)

COUNTERS = (
    _of_tiers("hit_tokens", "Tokens that requests found, by the tier they came from.", "hit_tokens"),
    _of_tiers("served_pages", "Pages that requests found, by the tier they came from.", "pages_served"),
    _of_tiers("arrived_pages", "Copies that were made in the tier.", "pages_in"),
    _of_tiers("evicted_pages", "Copies that left the tier, by reason.", "evicted", "why"),
    _of_tiers("refused_pages", "Copies that did not verify or could not be written, by tier and reason.", "refused", "why"),
    _of_links("link_pages", "Pages that crossed the link.", "pages"),
    _of_links("link_bytes", "Encoded bytes that crossed the link.", "bytes"),
    _of_links("link_seconds", "Seconds that workers spent on the link, coding included.", "seconds"),
    _of_links("link_turned_away", "Transfers that were given up because the queue of the link was full.", "turned_away"),
    Series("prefetch_pages", "Pages that hints were about, by what became of them.", "prefetch", labels=("outcome",)),
    Series("hit_requests", "Requests that found pages and took them.", "lookups"),
    Series("declined_tokens", "Tokens that were found and not restored, because computing them again is faster.", "tokens_declined"),
)
