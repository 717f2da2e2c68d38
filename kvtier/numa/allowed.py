"""Which CPUs and nodes this process may use: its affinity now, and the cpuset it cannot leave. Reads /proc and /sys at every call.

The affinity is a choice that can be changed, up to the cpuset of the control groups (version 1 or 2) that contain the process; the kernel
refuses, or silently leaves out, what lies outside.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from kvtier.numa.ids import format_ids, parse_ids
from kvtier.numa.topology import ROOT, Topology, read_ids, read_text

_CPU_FILES = ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus")
_NODE_FILES = ("cpuset.mems.effective", "cpuset.effective_mems", "cpuset.mems")


@dataclass(frozen=True)
class Allowed:
    """`cpus`: those of the cpuset, which a binding may choose from. `affinity`: those in use now. `nodes`: where memory may come from."""

    cpus: frozenset[int]
    affinity: frozenset[int]
    nodes: frozenset[int]

    def restricts(self, topology: Topology) -> bool:
        """Whether anything of the machine is out of reach."""
        return not (self.cpus >= {cpu.id for cpu in topology.cpus} and self.nodes >= set(topology.memory_nodes))

    def describe(self) -> str:
        """In words, for reports."""
        return f"CPUs {format_ids(self.cpus)} (now on {format_ids(self.affinity)}), memory of nodes {format_ids(self.nodes)}"


def read_allowed(topology: Topology, root: Path = ROOT, pid: int | None = None) -> Allowed:
    """What process `pid` (default: this one) may use of `topology`. Everything, where nothing is said."""
    process = root / "proc" / ("self" if pid is None else str(pid))
    status = read_text(process / "status")
    all_cpus = frozenset(cpu.id for cpu in topology.cpus)
    all_nodes = frozenset(topology.memory_nodes)
    affinity = _listed(status, "Cpus_allowed_list", all_cpus)
    # Mems_allowed is the cpuset's own word; unlike CPUs, a process cannot narrow it.
    nodes = _listed(status, "Mems_allowed_list", all_nodes)
    cpus = all_cpus
    for group in _cpusets(root, read_text(process / "cgroup")):
        cpus = _narrowed(cpus, group, _CPU_FILES)
        nodes = _narrowed(nodes, group, _NODE_FILES)
    return Allowed(cpus, affinity & cpus, nodes)


def _listed(status: str, name: str, everything: frozenset[int]) -> frozenset[int]:
    line = re.search(rf"^{name}:\s*([0-9,-]+)$", status, re.MULTILINE)
    return frozenset(parse_ids(line[1])) & everything if line else everything


def _narrowed(ids: frozenset[int], group: Path, names: tuple[str, ...]) -> frozenset[int]:
    for name in names:
        found = read_ids(group / name)
        if found:
            return ids & frozenset(found)
    return ids


def _cpusets(root: Path, cgroup: str) -> list[Path]:
    """The folders whose cpuset files may speak for the process: its groups, and the top of what is mounted (all a container may see)."""
    mounts = root / "sys/fs/cgroup"
    folders = []
    for line in cgroup.splitlines():
        _, controllers, name = line.split(":", 2)
        if not controllers:
            folders += [mounts, mounts / name.removeprefix("/")]
        elif "cpuset" in controllers.split(","):
            folders += [mounts / "cpuset", mounts / "cpuset" / name.removeprefix("/")]
    return folders
