"""What the connector counts, in vLLM's own statistics: the log line "KV Transfer metrics" and `vllm:kvtier_*` in Prometheus.

Counts of an interval: both sides of the connector hand theirs over once per step, vLLM adds them up. How full the tiers are goes the same
way, from all workers in the same step when the scheduler asks for it; of two readings of a worker the later one counts. State: whoever
counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvtier.series import GAUGES

LEVELS = "levels"
"""What readings are called among the counts."""

COUNTERS = {
    "hit_tokens": ("Tokens that were to be loaded instead of computed, by the tier they came from.", "tier"),
    "declined_tokens": ("Tokens that were found and not loaded, because computing them again is faster.", ""),
    "loaded_pages": ("Pages (KV blocks of one worker) brought back into vLLM's cache.", ""),
    "failed_pages": ("Pages that were to be loaded and did not come; vLLM computed them again, or failed the request.", ""),
    "load_seconds": ("Seconds that loads took, from being told to the last page.", ""),
    "stored_pages": ("Pages copied out of vLLM's cache and kept.", ""),
    "store_seconds": ("Seconds that stores took, beside the engine's steps.", ""),
    "skipped_pages": (
        "Pages that were not stored: `busy`: too many were; `overwritten` before they were copied; `no room`.",
        "why",
    ),
    "refused_pages": ("Copies that did not verify or could not be written, by reason.", "why"),
    "evicted_pages": ("Pages that left a tier, by tier.", "tier"),
    "late": ("Requests that computed tokens because their pages did not come within `mover.patience_s`.", ""),
    "waits": ("Times a request was asked to wait a moment, because its pages were just being stored or loaded.", ""),
}
"""Name, what it counts, and its label if it has one."""


class Counts(KVConnectorStats):  # type: ignore[misc]
    """`data[name][label]`: how many since the last time they were taken. `data["levels"][rank]`: how full a worker's tiers are."""

    data: dict[str, dict[str, Any]]

    def add(self, name: str, count: float = 1, label: str = "") -> None:
        """Count."""
        if count:
            labels = self.data.setdefault(name, {})
            labels[label] = labels.get(label, 0) + count

    def read(self, rank: int, levels: Mapping[str, Any]) -> None:
        """How full the tiers of worker `rank` are now: `tiers` and `links`, as in `TieredKVCache.stats`."""
        self.data.setdefault(LEVELS, {})[str(rank)] = levels

    def taken(self) -> Counts | None:
        """What was counted and read so far, which starts anew; None if nothing."""
        if self.is_empty():
            return None
        data, self.data = self.data, {}
        return Counts(data)

    def reset(self) -> None:
        """Start anew."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> Counts:
        """Add the other's counts to these; its readings are newer."""
        for name, labels in other.data.items():
            if name == LEVELS:
                self.data.setdefault(LEVELS, {}).update(labels)
                continue
            for label, count in labels.items():
                self.add(name, count, label)
        return self

    def reduce(self) -> dict[str, int | float]:
        """Flat, for the log: the counts, and how full each tier is, 0 to 1."""
        counted = {name: labels for name, labels in self.data.items() if name != LEVELS}
        flat = {f"{name} {label}".strip(): round(count, 3) for name, labels in counted.items() for label, count in labels.items()}
        gauges = together(self.data.get(LEVELS, {}))
        for labels, capacity_bytes in gauges["tier_capacity_bytes"].items():
            flat[f"tier_used_share {' '.join(labels)}"] = round(gauges["tier_used_bytes"][labels] / capacity_bytes, 3)
        return flat

    def is_empty(self) -> bool:
        """Whether nothing was counted or read."""
        return not self.data


def together(levels: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[tuple[str, ...], float]]:
    """The readings of all workers added up: by the name of a gauge and the values of its labels."""
    gauges: dict[str, dict[tuple[str, ...], float]] = {gauge.name: {} for gauge in GAUGES}
    for gauge in GAUGES:
        sums = gauges[gauge.name]
        for reading in levels.values():
            for labels, number in gauge.samples(reading):
                sums[labels] = sums.get(labels, 0) + number
    return gauges


class PrometheusMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """The counters and gauges in vLLM's Prometheus registry."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: self._counter_cls(
                name=f"vllm:kvtier_{name}", documentation=text, labelnames=[*self._labelnames, label] if label else self._labelnames
            )
            for name, (text, label) in COUNTERS.items()
        }
        self._gauges = {
            gauge.name: self._gauge_cls(
                name=f"vllm:kvtier_{gauge.name}",
                documentation=gauge.text,
                labelnames=[*self._labelnames, *gauge.labels],
                multiprocess_mode="mostrecent",  # several API servers: each hears of some steps
            )
            for gauge in GAUGES
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add what one engine counted, and say how full its tiers are."""
        engine = self.per_engine_labelvalues[engine_idx]
        for name, sums in together(transfer_stats_data.get(LEVELS, {})).items():
            for values, number in sums.items():
                self._gauges[name].labels(*engine, *values).set(number)
        for name, labels in transfer_stats_data.items():
            for label, count in labels.items() if name != LEVELS else ():
                self._counters[name].labels(*engine, *([label] if COUNTERS[name][1] else [])).inc(count)
