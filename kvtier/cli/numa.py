"""`kvtier numa`: what is near to what on this machine; plans that bind groups of processes, applied, verified and undone."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from kvtier.cli.output import JsonOption, check_json_target, human_console, write_json

if TYPE_CHECKING:
    from rich.table import Table

    from kvtier.numa.devices import Device
    from kvtier.numa.topology import Topology

app = typer.Typer(help="See, plan, apply and verify where processes and their memory live.", no_args_is_help=True)


@app.command()
def topo(json: JsonOption = None) -> None:
    """Nodes, CPUs, memory, distances and devices of this machine, and what this process may use of them."""
    from kvtier.numa.allowed import read_allowed
    from kvtier.numa.devices import find_devices
    from kvtier.numa.ids import format_ids
    from kvtier.numa.topology import read_topology

    check_json_target(json)
    topology = read_topology()
    devices = find_devices(topology)
    allowed = read_allowed(topology)
    console = human_console(json)
    smt = f"{topology.threads_per_core} threads per core" if topology.threads_per_core > 1 else "no SMT"
    kernel = "" if topology.numa else "; the kernel knows no NUMA nodes, so this is one made up"
    console.print(f"{_count(topology.nodes, 'node')}, {_count(topology.sockets, 'socket')}, {_count(topology.cpus, 'CPU')}, {smt}{kernel}")
    console.print(_nodes(topology))
    for cache in topology.caches:
        console.print(f"last-level cache L{cache.level}, {cache.size_bytes / 2**20:.0f} MiB: CPUs {format_ids(cache.cpus)}")
    if len(topology.nodes) > 1:
        console.print(_distances(topology))
    console.print(_devices(devices) if devices else "no GPU, accelerator, NVMe drive or network card found")
    console.print(f"This process may use {allowed.describe()}{', not all there is' if allowed.restricts(topology) else ''}.")
    write_json(
        {
            **asdict(topology),
            "sockets": topology.sockets,
            "threads_per_core": topology.threads_per_core,
            "devices": [asdict(device) for device in devices],
            "allowed": {"cpus": sorted(allowed.cpus), "affinity": sorted(allowed.affinity), "nodes": sorted(allowed.nodes)},
        },
        json,
    )


def _nodes(topology: Topology) -> Table:
    from rich.table import Table

    from kvtier.numa.ids import format_ids

    socket_of = {node: socket for socket, nodes in topology.sockets.items() for node in nodes}
    table = Table("node", "socket", "CPUs", "memory", "free", "huge pages (free)", box=None, header_style="bold")
    for node in topology.nodes:
        huge = ", ".join(f"{pages.total} x {pages.size_bytes >> 20} MiB ({pages.free})" for pages in node.huge_pages if pages.total)
        table.add_row(
            str(node.id),
            str(socket_of.get(node.id, "-")),
            format_ids(node.cpus) or "none",
            f"{node.memory_bytes / 2**30:.1f} GiB" if node.memory_bytes else "none",
            f"{node.free_bytes / 2**30:.1f} GiB" if node.memory_bytes else "",
            huge or "-",
        )
    return table


def _distances(topology: Topology) -> Table:
    from rich.table import Table

    table = Table("distance", *(str(node) for node in topology.node_ids), box=None, header_style="bold")
    for source in topology.node_ids:
        table.add_row(str(source), *(str(topology.distance(source, target)) for target in topology.node_ids))
    return table


def _devices(devices: tuple[Device, ...]) -> Table:
    from rich.table import Table

    table = Table("device", "kind", "node", "found by", "PCI address", box=None, header_style="bold")
    for device in devices:
        table.add_row(device.name, device.kind, str(device.node) if device.node >= 0 else "unknown", device.how, device.address or "-")
    return table


def _count(things: Sized, noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"
