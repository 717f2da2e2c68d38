"""What a cache counted and achieved, as plain values: the answer to `TieredKVCache.stats`. Reads under the residency's lock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvtier.pages import DEVICE
from kvtier.residency import Residency
from kvtier.residency.metrics import LinkMetrics
from kvtier.residency.occupancy import levels


def stats(residency: Residency, routing: Mapping[str, object], machine: bool) -> dict[str, Any]:
    """See `TieredKVCache.stats`. `routing`: what those who attend in place add to the counts of their choices."""
    achieved = [tier.report() if machine else {} for tier in residency.tiers]
    with residency.lock:
        metrics, names, now = residency.metrics, residency.names, levels(residency)
        tiers = {
            name: {
                "format": tier.format.name,
                **now["tiers"][name],
                "pressure": round(residency.pressure(index), 4),
                "pages": len(residency.policies[index]),
                "pages_in": counts.pages_in,
                "pages_served": counts.pages_served,
                "hit_tokens": counts.hit_tokens,
                "pages_recovered": counts.pages_recovered,
                "evicted": dict(counts.evicted),
                "refused": dict(counts.refused),
                "achieved": achieved[index],
            }
            for index, (name, tier, counts) in enumerate(zip(names, residency.tiers, metrics.tiers, strict=True))
        }
        counted = {f"{names[source]}->{names[target]}": link for (source, target), link in metrics.links.items()}
        links = {
            name: {
                "transfers": link.transfers,
                "pages": link.pages,
                "bytes": link.bytes,
                "turned_away": link.turned_away,
                "seconds": round(link.seconds, 6),
                "gb_per_s": round(link.gb_per_s, 4),
                **waiting,
            }
            for name, waiting in now["links"].items()
            for link in [counted.get(name, LinkMetrics())]
        }
        return {
            "layout": str(residency.layout),
            "policy": residency.policies[DEVICE].name,
            "tiers": tiers,
            "links": links,
            "admission": vars(residency.admission.regret).copy(),
            "mover": residency.mover.report(),
            "prefetch": vars(metrics.prefetch).copy(),
            "routing": {**vars(metrics.routing), **routing},
            "lookups": metrics.lookups,
            "tokens_asked": metrics.tokens_asked,
            "tokens_declined": metrics.tokens_declined,
            "prices": residency.prices.as_json(),
            "attention_ignored": metrics.attention_ignored,
            "recalls": metrics.recalls,
            "pages": len(residency.table),
            "leased_pages": int((residency.table.leases[: residency.table.rows] > 0).sum()),
        }
