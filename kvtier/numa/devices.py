"""Which node a device belongs to: GPUs, other accelerators, NVMe drives, network cards. Reads sysfs at every call.

The kernel says -1 where firmware says nothing (virtual machines, single sockets), which means unknown, not node 0. In this order:

1. `numa_node` of the device, then of the bridges above it on its PCI path;
2. its `local_cpulist`, if all of it lies on one node and it is not simply every CPU;
3. the nearest device by PCI path whose node is known (same bridge, else same host bridge), if those that are equally near agree;
4. the only node with memory, if there is one only.

Otherwise it stays unknown (-1); `spread_unknown` then deals such devices round robin over the nodes with CPUs, and says so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Literal

from kvtier.errors import NumaError
from kvtier.numa.topology import ROOT, UNKNOWN_NODE, Topology, read_ids, read_number, read_text

DeviceKind = Literal["cuda", "gpu", "accel", "nvme", "nic"]
How = Literal["numa_node", "bridge", "local_cpulist", "nearest", "only node", "round robin", "unknown"]
_NVIDIA = "0x10de"
_GPU_VENDORS = {"0x1002", "0x8086"}  # others' display controllers are the management card's
_ACCELERATOR_CLASSES = ("0x12",)  # processing accelerators: NPUs and such


@dataclass(frozen=True)
class Device:
    """A device: `name` as people call it ("0000:17:00.0", "accel0", "nvme1", "eth0"), PCI `address` if it has one, `node` (-1: unknown) and
    how that was found. `index` counts within its kind."""

    kind: DeviceKind
    name: str
    index: int
    address: str
    node: int
    how: How


def normal_address(address: str) -> str:
    """A PCI address as sysfs spells it: lower case, four digits of domain. NumaError if it is none.

    CUDA and NVML print upper case and up to eight digits.
    """
    match = re.fullmatch(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}:[0-9a-f]{2}\.[0-7])", address.strip().lower())
    if match is None:
        raise NumaError(f"{address!r} is not a PCI address; expected one like 0000:17:00.0")
    return f"{int(match[1] or '0', 16):04x}:{match[2]}"


def find_devices(topology: Topology, root: Path = ROOT) -> tuple[Device, ...]:
    """All devices whose place matters, by kind and index."""
    pci = _PciTree(topology, root)
    accelerators = [(folder.name, folder / "device") for folder in _entries(root / "sys/class/accel", r"accel[0-9]+")]
    listed = {pci.address(folder) for _, folder in accelerators}
    cuda, gpus, others = [], [], []
    for folder in _entries(root / "sys/bus/pci/devices", r".*"):
        vendor, kind = read_text(folder / "vendor"), read_text(folder / "class")
        if kind.startswith("0x03") and vendor == _NVIDIA:
            cuda.append((folder.name, folder))
        elif kind.startswith(_ACCELERATOR_CLASSES) and folder.name not in listed:
            others.append((folder.name, folder))
        elif kind.startswith("0x03") and vendor in _GPU_VENDORS:
            gpus.append((folder.name, folder))
    drives = [(folder.name, folder / "device") for folder in _entries(root / "sys/class/nvme", r"nvme[0-9]+")]
    ports = [
        (folder.name, folder / "device")
        for kind in ("net", "infiniband")
        for folder in _entries(root / "sys/class" / kind, r".*")
        if (folder / "device").exists()
    ]
    kinds: tuple[tuple[DeviceKind, list[tuple[str, Path]]], ...] = (
        ("cuda", cuda),
        ("gpu", gpus),
        ("accel", accelerators + others),
        ("nvme", drives),
        ("nic", ports),
    )
    return tuple(
        Device(kind, name, index, pci.address(folder), *pci.locate(folder))
        for kind, found in kinds
        for index, (name, folder) in enumerate(found)
    )


def spread_unknown(devices: Iterable[Device], topology: Topology) -> tuple[Device, ...]:
    """The same devices, those of unknown node dealt round robin, by index, over the nodes with CPUs."""
    nodes = topology.cpu_nodes
    return tuple(
        device if device.node != UNKNOWN_NODE else replace(device, node=nodes[device.index % len(nodes)], how="round robin")
        for device in devices
    )


def choose_device(devices: Iterable[Device], wanted: int | str, root: Path = ROOT) -> Device:
    """The device meant by an index (as CUDA counts those that are visible, else as accelerators are numbered), by "cuda:0", "npu:1",
    "accel1", by the name of a drive or network card, or by a PCI address. NumaError if there is none."""
    known = tuple(devices)
    text = str(wanted).strip()
    found: Iterable[Device] = ()
    kind, colon, number = text.partition(":")
    if isinstance(wanted, int) or (text.isdecimal()):
        kind = "cuda" if any(device.kind == "cuda" for device in known) else "accel"
        number = text
    elif colon and number.isdecimal():
        kind = {"npu": "accel", "gpu": "cuda" if any(device.kind == "cuda" for device in known) else "gpu"}.get(kind, kind)
    else:
        number = ""
    if number:
        if kind == "cuda":
            visible = _visible_cuda([device for device in known if device.kind == "cuda"], root)
            found = visible[int(number) : int(number) + 1]
        else:
            found = [device for device in known if device.kind == kind and device.index == int(number)]
    elif re.fullmatch(r"(?i)([0-9a-f]{4,8}:)?[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", text):
        found = [device for device in known if device.address == normal_address(text)]
    else:
        drive = re.match(r"nvme[0-9]+", text)
        found = [device for device in known if device.name == (drive[0] if drive else text)]
    for device in found:
        return device
    names = ", ".join(device.name for device in known) or "none"
    raise NumaError(f"there is no device {wanted!r} here; known ones: {names}")


def _visible_cuda(cuda: list[Device], root: Path) -> list[Device]:
    """NVIDIA GPUs as CUDA counts them under CUDA_VISIBLE_DEVICES (numbers or UUIDs), in the order of the PCI bus.

    CUDA itself puts the fastest first unless CUDA_DEVICE_ORDER is PCI_BUS_ID, which differs only where GPUs of several models are mixed:
    give the PCI address there.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return cuda
    uuids = {}
    for information in (root / "proc/driver/nvidia/gpus").glob("*/information"):
        match = re.search(r"GPU UUID:\s*(\S+)", read_text(information))
        if match:
            uuids[match[1]] = normal_address(information.parent.name)
    chosen = []
    for entry in filter(None, (part.strip() for part in visible.split(","))):
        if entry.isdecimal():
            matching = cuda[int(entry) : int(entry) + 1]
        else:
            addresses = {address for uuid, address in uuids.items() if uuid.startswith(entry)}
            matching = [device for device in cuda if device.address in addresses]
        if len(matching) != 1:
            break  # as CUDA does: what follows an entry it does not know is not visible either
        chosen += matching
    return chosen


def _entries(folder: Path, pattern: str) -> list[Path]:
    """Entries of a folder of /sys/class or /sys/bus, numbers within names in their order."""
    found = [entry for entry in folder.iterdir() if re.fullmatch(pattern, entry.name)] if folder.is_dir() else []
    return sorted(found, key=lambda entry: [(len(part), part) for part in re.split(r"([0-9a-f]+)", entry.name)])


class _PciTree:
    """Where the PCI devices below one root are, and what their numa_node files say."""

    def __init__(self, topology: Topology, root: Path) -> None:
        self._topology = topology
        self._top = (root / "sys/devices").resolve()
        self._known: dict[tuple[str, ...], int] = {}
        for folder in _entries(root / "sys/bus/pci/devices", r".*"):
            node = read_number(folder / "numa_node", UNKNOWN_NODE)
            if node in topology.node_ids:
                self._known[self._steps(folder)] = node

    def address(self, folder: Path) -> str:
        """The PCI address of the device or of what carries it; empty if it is not on a PCI bus."""
        return next((step for step in reversed(self._steps(folder)) if re.fullmatch(r"[0-9a-f]{4,}(:[0-9a-f]{2}){2}\.[0-7]", step)), "")

    def locate(self, folder: Path) -> tuple[int, How]:
        """The node of a device and how it was found: the rule of this file's head."""
        steps = self._steps(folder)
        place = folder.resolve()
        for depth, above in enumerate((place, *place.parents[: max(0, len(steps) - 1)])):
            node = read_number(above / "numa_node", UNKNOWN_NODE)
            if node in self._topology.node_ids:
                return node, "bridge" if depth and (above / "class").exists() and (place / "class").exists() else "numa_node"
        local = set(read_ids(place / "local_cpulist"))
        if local and local < {cpu.id for cpu in self._topology.cpus}:
            owners = [node.id for node in self._topology.nodes if local <= set(node.cpus)]
            if len(owners) == 1:
                return owners[0], "local_cpulist"
        near = self._nearest(steps)
        if near != UNKNOWN_NODE:
            return near, "nearest"
        if len(self._topology.memory_nodes) == 1 and self._topology.cpu_nodes:
            return self._topology.memory_nodes[0], "only node"
        return UNKNOWN_NODE, "unknown"

    def _nearest(self, steps: tuple[str, ...]) -> int:
        """The node that all known devices with the longest path in common are on; at least the host bridge must be in common."""
        best, nodes = 0, set[int]()
        for other, node in self._known.items():
            common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(steps, other, strict=False)))
            if common > best:
                best, nodes = common, {node}
            elif common == best:
                nodes.add(node)
        return nodes.pop() if best and len(nodes) == 1 else UNKNOWN_NODE

    def _steps(self, folder: Path) -> tuple[str, ...]:
        """The path below /sys/devices; empty where the entry leads elsewhere."""
        place = folder.resolve()
        return place.relative_to(self._top).parts if place.is_relative_to(self._top) else ()
