"""Machines for the NUMA tests: sysfs and /proc trees written below a folder, so that any topology can be read anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvtier.numa.ids import format_ids

GiB_IN_KB = 1 << 20


@dataclass
class NodeSpec:
    """One node: CPUs, socket, GiB of memory, huge pages of 2 MiB."""

    cpus: Sequence[int]
    socket: int = 0
    gib: int = 64
    huge: int = 0


@dataclass
class PciSpec:
    """One PCI device: its path of addresses below the host bridge, class, vendor, node (of the last), node of its bridge, CPUs near it."""

    path: str
    kind: str = "0x030200"
    vendor: str = "0x10de"
    node: int = -1
    bridge_node: int = -1
    local_cpus: str = ""
    as_class: str = ""
    """"accel/accel0", "nvme/nvme0", "net/eth0": where else it is listed."""


@dataclass
class Machine:
    """What `build` writes."""

    nodes: Mapping[int, NodeSpec]
    distances: Sequence[Sequence[int]] = ()
    offline: Sequence[int] = ()
    smt: int = 1
    pci: Sequence[PciSpec] = ()
    status: Mapping[str, str] = field(default_factory=dict)
    numa: bool = True


def write(path: Path, text: object) -> None:
    """A file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def build(root: Path, machine: Machine) -> Path:
    """The tree of a machine below `root`, which is returned."""
    system = root / "sys/devices/system"
    cpus = sorted(cpu for node in machine.nodes.values() for cpu in node.cpus)
    online = [cpu for cpu in cpus if cpu not in machine.offline]
    write(system / "cpu/online", format_ids(online))
    write(system / "cpu/possible", format_ids(cpus))
    write(root / "proc/meminfo", f"MemTotal: {sum(n.gib for n in machine.nodes.values()) * GiB_IN_KB} kB\nMemFree: {GiB_IN_KB} kB")
    for position, (node_id, node) in enumerate(machine.nodes.items()):
        if machine.numa:
            folder = system / f"node/node{node_id}"
            here = [cpu for cpu in node.cpus if cpu not in machine.offline]
            write(folder / "cpulist", format_ids(here))
            row = machine.distances[position] if machine.distances else [10 if other == node_id else 20 for other in machine.nodes]
            write(folder / "distance", " ".join(map(str, row)))
            total = node.gib * GiB_IN_KB
            write(folder / "meminfo", f"Node {node_id} MemTotal: {total} kB\nNode {node_id} MemFree: {total // 2} kB")
            write(folder / "hugepages/hugepages-2048kB/nr_hugepages", node.huge)
            write(folder / "hugepages/hugepages-2048kB/free_hugepages", node.huge)
            write(folder / "numastat", "numa_hit 1000\nnuma_miss 0\nnuma_foreign 0\ninterleave_hit 0\nlocal_node 900\nother_node 100")
        for cpu in node.cpus:
            if cpu in machine.offline:
                continue
            folder = system / f"cpu/cpu{cpu}"
            core = cpu // machine.smt * machine.smt
            write(folder / "topology/physical_package_id", node.socket)
            write(folder / "topology/thread_siblings_list", format_ids(c for c in range(core, core + machine.smt) if c in online))
            for index, (level, kind, size) in enumerate([(1, "Data", "32K"), (1, "Instruction", "32K"), (3, "Unified", "32M")]):
                cache = folder / f"cache/index{index}"
                write(cache / "level", level)
                write(cache / "type", kind)
                write(cache / "size", size)
                write(cache / "shared_cpu_list", format_ids(c for c in node.cpus if c in online) if level == 3 else cpu)
    if machine.numa:
        write(system / "node/online", format_ids(machine.nodes))
    for device in machine.pci:
        _pci(root, device)
    everything = {
        "Cpus_allowed_list": format_ids(online),
        "Mems_allowed_list": format_ids(node_id for node_id, node in machine.nodes.items() if node.gib),
        **machine.status,
    }
    write(root / "proc/self/status", "Name:\tpython\n" + "\n".join(f"{key}:\t{value}" for key, value in everything.items()))
    return root


def _pci(root: Path, device: PciSpec) -> None:
    steps = device.path.split("/")
    place = root / "sys/devices" / device.path
    for depth in range(1, len(steps)):
        folder = root / "sys/devices" / "/".join(steps[: depth + 1])
        last = depth == len(steps) - 1
        write(folder / "numa_node", device.node if last else device.bridge_node)
        write(folder / "class", device.kind if last else "0x060400")
        write(folder / "vendor", device.vendor if last else "0x8086")
        listed = root / "sys/bus/pci/devices" / steps[depth]
        listed.parent.mkdir(parents=True, exist_ok=True)
        if not listed.exists():
            listed.symlink_to(folder)
    if device.local_cpus:
        write(place / "local_cpulist", device.local_cpus)
    if device.as_class:
        entry = root / "sys/class" / device.as_class
        entry.mkdir(parents=True)
        (entry / "device").symlink_to(place)


ONE_NODE = Machine({0: NodeSpec(range(4))})
NO_NUMA = Machine({0: NodeSpec(range(4))}, numa=False)
TWO_SOCKETS = Machine(
    {0: NodeSpec(range(8), 0, huge=16), 1: NodeSpec(range(8, 16), 1)},
    [[10, 21], [21, 10]],
    smt=2,
    pci=[
        PciSpec("pci0000:00/0000:00:01.0/0000:17:00.0", node=0, bridge_node=0),
        PciSpec("pci0000:80/0000:80:01.0/0000:ca:00.0", node=1, bridge_node=1),
        PciSpec("pci0000:80/0000:80:02.0/0000:cb:00.0", kind="0x010802", vendor="0x144d", node=1, as_class="nvme/nvme0"),
        PciSpec("pci0000:00/0000:00:03.0/0000:19:00.0", kind="0x020000", vendor="0x15b3", node=0, as_class="net/eth0"),
    ],
)
GAPS = Machine({0: NodeSpec([0, 1]), 8: NodeSpec([2, 3], 1), 64: NodeSpec([4, 5], 2)}, [[10, 20, 40], [20, 10, 40], [40, 40, 10]])
MEMORY_ONLY = Machine({0: NodeSpec([0, 1], 0), 1: NodeSpec([2, 3], 1), 2: NodeSpec([], gib=96)}, [[10, 20, 30], [20, 10, 60], [30, 60, 10]])
OFFLINE = Machine({0: NodeSpec(range(4), 0), 1: NodeSpec(range(4, 8), 1)}, offline=[1, 6, 7])
A3 = Machine(
    {node: NodeSpec(range(40 * node, 40 * node + 40), node // 2, gib=128) for node in range(8)},
    [[10 if a == b else 12 if a // 2 == b // 2 else 24 for b in range(8)] for a in range(8)],
    pci=[
        PciSpec(f"pci{n:04x}:00/{n:04x}:00:00.0/{n:04x}:01:00.0", "0x120000", "0x19e5", n, n, as_class=f"accel/accel{n}") for n in range(8)
    ],
)
"""Four sockets of two nodes of 40 cores each, an accelerator per node: the machine of the source."""
