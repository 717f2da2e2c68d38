"""The machine as sysfs describes it: nodes, CPUs, memory, distances, caches, huge pages. Plain values, read once.

Node ids may have gaps; a node may have no CPUs (HBM, CXL) or no memory. Where the kernel knows no nodes there is one, made up, with
everything. `root` stands for / so that any machine can be described anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kvtier.errors import NumaError
from kvtier.numa.ids import parse_ids

ROOT = Path("/")
LOCAL_DISTANCE = 10
"""What ACPI calls the distance of a node to itself; others are relative to it."""
UNKNOWN_NODE = -1


@dataclass(frozen=True)
class HugePages:
    """Huge pages of one size set apart on a node."""

    size_bytes: int
    total: int
    free: int


@dataclass(frozen=True)
class Node:
    """One node: its online CPUs, memory in bytes, huge pages. As of when it was read: what is free, and what is available without driving
    anybody out, which is free memory and half of the file caches."""

    id: int
    cpus: tuple[int, ...]
    memory_bytes: int
    free_bytes: int
    available_bytes: int
    huge_pages: tuple[HugePages, ...] = ()


@dataclass(frozen=True)
class Cpu:
    """One online CPU: node, socket, and the CPUs it shares a core with (itself too)."""

    id: int
    node: int
    socket: int
    siblings: tuple[int, ...]


@dataclass(frozen=True)
class Cache:
    """A last-level cache and the CPUs that share it."""

    level: int
    size_bytes: int
    cpus: tuple[int, ...]


@dataclass(frozen=True)
class Topology:
    """A machine. `distances[a][b]`: the kernel's relative cost of node `a` reaching memory of node `b`. `numa`: whether it knows nodes."""

    nodes: tuple[Node, ...]
    cpus: tuple[Cpu, ...]
    caches: tuple[Cache, ...]
    distances: Mapping[int, Mapping[int, int]]
    numa: bool

    @property
    def node_ids(self) -> tuple[int, ...]:
        """Ids of all nodes, ascending; not necessarily contiguous."""
        return tuple(node.id for node in self.nodes)

    @property
    def cpu_nodes(self) -> tuple[int, ...]:
        """Nodes that have CPUs."""
        return tuple(node.id for node in self.nodes if node.cpus)

    @property
    def memory_nodes(self) -> tuple[int, ...]:
        """Nodes that have memory."""
        return tuple(node.id for node in self.nodes if node.memory_bytes)

    @property
    def sockets(self) -> Mapping[int, tuple[int, ...]]:
        """Nodes with CPUs per socket, both ascending."""
        owned: dict[int, set[int]] = {}
        for cpu in self.cpus:
            owned.setdefault(cpu.socket, set()).add(cpu.node)
        return {socket: tuple(sorted(owned[socket])) for socket in sorted(owned)}

    @property
    def threads_per_core(self) -> int:
        """CPUs of the fullest core: 1 without SMT."""
        return max((len(cpu.siblings) for cpu in self.cpus), default=1)

    def node(self, node_id: int) -> Node:
        """The node with this id. NumaError if there is none."""
        for node in self.nodes:
            if node.id == node_id:
                return node
        raise NumaError(f"there is no NUMA node {node_id}; this machine has {', '.join(map(str, self.node_ids))}")

    def node_of_cpu(self, cpu_id: int) -> int:
        """The node an online CPU is on. NumaError if there is no such CPU."""
        for cpu in self.cpus:
            if cpu.id == cpu_id:
                return cpu.node
        raise NumaError(f"there is no online CPU {cpu_id}")

    def distance(self, source: int, target: int) -> int:
        """The kernel's distance between two nodes of this machine. NumaError for other ids."""
        return self.distances[self.node(source).id][self.node(target).id]

    def nearest(self, source: int, among: Iterable[int] | None = None) -> tuple[int, ...]:
        """Nodes (`among`, or all) by rising distance from `source`, ties by id; `source` first if it is among them."""
        candidates = self.node_ids if among is None else tuple(among)
        return tuple(sorted(candidates, key=lambda target: (self.distance(source, target), target != source, target)))

    def cpus_nearest(self, node_id: int) -> tuple[int, ...]:
        """The CPUs of a node, or for a node without any those of the nearest one that has some."""
        return next(self.node(near).cpus for near in self.nearest(node_id, self.cpu_nodes))


def read_topology(root: Path = ROOT) -> Topology:
    """The topology of the machine whose / is `root`. NumaError if /sys says nothing about CPUs there."""
    system = root / "sys/devices/system"
    online = read_ids(system / "cpu/online")
    if not online:
        raise NumaError(f"{system / 'cpu/online'} lists no CPUs; kvtier.numa needs Linux with /sys mounted")
    folders = sorted(
        (int(folder.name.removeprefix("node")), folder)
        for folder in (system / "node").glob("node[0-9]*")
        if re.fullmatch(r"node[0-9]+", folder.name)
    )
    ids = read_ids(system / "node/online") or tuple(node_id for node_id, _ in folders)
    folders = [(node_id, folder) for node_id, folder in folders if node_id in ids]
    numa = bool(folders)
    nodes = tuple(_node(node_id, folder) for node_id, folder in folders) if numa else (_whole_machine(root, online),)
    placed = {cpu: node.id for node in nodes for cpu in node.cpus}
    return Topology(
        nodes=nodes,
        cpus=tuple(_cpu(cpu, placed[cpu], system / f"cpu/cpu{cpu}/topology") for cpu in online if cpu in placed),
        caches=_last_level_caches(system / "cpu", online),
        distances=_distances(dict(folders)) if numa else {nodes[0].id: {nodes[0].id: LOCAL_DISTANCE}},
        numa=numa,
    )


def read_text(path: Path) -> str:
    """A file's text without surrounding white space; empty where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def read_number(path: Path, otherwise: int) -> int:
    """The whole number in a file, or `otherwise` where there is none."""
    text = read_text(path)
    return int(text) if re.fullmatch(r"-?[0-9]+", text) else otherwise


def read_ids(path: Path) -> tuple[int, ...]:
    """The CPU or node list in a file; empty where it cannot be read."""
    return parse_ids(read_text(path))


def _node(node_id: int, folder: Path) -> Node:
    memory = _meminfo(folder / "meminfo")
    huge = []
    for pool in sorted(folder.glob("hugepages/hugepages-*kB")):
        kilobytes = int(pool.name.removeprefix("hugepages-").removesuffix("kB"))
        huge.append(HugePages(kilobytes << 10, read_number(pool / "nr_hugepages", 0), read_number(pool / "free_hugepages", 0)))
    return Node(
        id=node_id,
        cpus=read_ids(folder / "cpulist"),
        memory_bytes=memory.get("MemTotal", 0),
        free_bytes=memory.get("MemFree", 0),
        available_bytes=_available(memory),
        huge_pages=tuple(sorted(huge, key=lambda pages: pages.size_bytes)),
    )


def _whole_machine(root: Path, online: tuple[int, ...]) -> Node:
    memory = _meminfo(root / "proc/meminfo")
    return Node(0, online, memory.get("MemTotal", 0), memory.get("MemFree", 0), _available(memory))


def _meminfo(path: Path) -> dict[str, int]:
    """Bytes by name, of a node ("Node 0 MemFree: 12 kB") or of the machine ("MemFree: 12 kB")."""
    return {name: int(kilobytes) << 10 for name, kilobytes in re.findall(r"([\w()]+):\s+([0-9]+) kB", read_text(path))}


def _available(memory: Mapping[str, int]) -> int:
    given_up = sum(memory.get(name, 0) for name in ("Active(file)", "Inactive(file)", "SReclaimable"))
    return memory.get("MemFree", 0) + given_up // 2


def _cpu(cpu: int, node: int, folder: Path) -> Cpu:
    socket = read_number(folder / "physical_package_id", -1)
    # Some machines (arm64 without firmware tables) do not number packages: then every node is a socket of its own.
    return Cpu(cpu, node, socket if socket >= 0 else node, read_ids(folder / "thread_siblings_list") or (cpu,))


def _distances(folders: Mapping[int, Path]) -> dict[int, dict[int, int]]:
    """Each file holds one number per online node, in the order of their ids."""
    table = {}
    for node_id, folder in folders.items():
        row = [int(word) for word in read_text(folder / "distance").split()]
        if len(row) != len(folders):
            row = [LOCAL_DISTANCE if other == node_id else 2 * LOCAL_DISTANCE for other in folders]
        table[node_id] = dict(zip(folders, row, strict=True))
    return table


def _last_level_caches(folder: Path, online: tuple[int, ...]) -> tuple[Cache, ...]:
    found: dict[tuple[int, ...], Cache] = {}
    for cpu in online:
        last = None
        for entry in (folder / f"cpu{cpu}/cache").glob("index[0-9]*"):
            size = re.fullmatch(r"([0-9]+)([KMG]?)", read_text(entry / "size"))
            if size is None or read_text(entry / "type") == "Instruction":
                continue
            size_bytes = int(size[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[size[2]]
            cache = Cache(read_number(entry / "level", 0), size_bytes, read_ids(entry / "shared_cpu_list") or (cpu,))
            if last is None or cache.level > last.level:
                last = cache
        if last is not None:
            found.setdefault(last.cpus, last)
    return tuple(found.values())
