"""The kernel's own NUMA counters (`numastat`, /proc/vmstat), and what they say: local share, balance of nodes, pages moved per second.

The kernel counts where pages were taken from, not every access; accesses over the links between sockets only show in the CPUs' uncore
counters (`perf stat`). Stateless: a reading is a plain value, two of them make a rate.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvtier.numa.topology import ROOT, read_text


@dataclass(frozen=True)
class Reading:
    """Counters since boot, at `seconds` on the monotonic clock: numastat by node, pages moved between nodes."""

    seconds: float
    by_node: Mapping[int, Mapping[str, int]]
    migrated: int


@dataclass(frozen=True)
class Rates:
    """What happened between two readings."""

    seconds: float
    local_pages: int
    """Pages taken on the node of the CPU that asked."""
    remote_pages: int
    misses: int
    """Pages taken elsewhere than where the policy preferred, because that node was full."""
    migrations_per_s: float
    balance: float
    """Of the pages taken per node: 1 is even."""

    @property
    def local_share(self) -> float:
        """Local pages of all; 1 if none was taken."""
        total = self.local_pages + self.remote_pages
        return self.local_pages / total if total else 1.0


def read_counters(root: Path = ROOT) -> Reading:
    """The counters now. No nodes where the kernel counts none."""
    by_node = {}
    for folder in (root / "sys/devices/system/node").glob("node[0-9]*"):
        text = read_text(folder / "numastat")
        by_node[int(folder.name.removeprefix("node"))] = {name: int(value) for name, value in map(str.split, text.splitlines())}
    vmstat = dict(re.findall(r"^(\w+) ([0-9]+)$", read_text(root / "proc/vmstat"), re.MULTILINE))
    return Reading(time.monotonic(), dict(sorted(by_node.items())), int(vmstat.get("pgmigrate_success", 0)))


def rates(before: Reading, after: Reading) -> Rates:
    """What happened between two readings of one machine."""

    def grown(node: int, name: str) -> int:
        return after.by_node[node].get(name, 0) - before.by_node[node].get(name, 0)

    nodes = [node for node in after.by_node if node in before.by_node]
    seconds = after.seconds - before.seconds
    taken = [grown(node, "local_node") + grown(node, "other_node") for node in nodes]
    return Rates(
        seconds=seconds,
        local_pages=sum(grown(node, "local_node") for node in nodes),
        remote_pages=sum(grown(node, "other_node") for node in nodes),
        misses=sum(grown(node, "numa_miss") for node in nodes),
        migrations_per_s=(after.migrated - before.migrated) / seconds if seconds > 0 else 0.0,
        balance=node_balance(taken),
    )


def local_remote_ratio(local: float, remote: float) -> float:
    """Local accesses per remote one; infinite if there is no remote one."""
    return local / remote if remote else math.inf


def node_balance(loads: Sequence[float]) -> float:
    """1 - sigma / mu of the nodes' loads: 1 if all are equal (or idle), lower the more they differ, below 0 at worst."""
    mean = sum(loads) / len(loads) if loads else 0.0
    if mean == 0:
        return 1.0
    return 1 - math.sqrt(sum((load - mean) ** 2 for load in loads) / len(loads)) / mean
