"""`kvtier numa bench` and `kvtier numa stats`: what distance costs on this machine, whether binding pays, and what the kernel counted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from kvtier.cli.numa import app
from kvtier.cli.output import JsonOption, check_json_target, human_console, write_json
from kvtier.cli.progress import shown_progress
from kvtier.cli.values import parse_size
from kvtier.errors import NumaError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from kvtier.numa.choosing import Comparison
    from kvtier.numa.device_copies import DeviceCopies
    from kvtier.numa.measure import Matrix, Measured

_TINY_BYTES = 4 << 20


@app.command()
def bench(
    size_bytes: Annotated[str, typer.Option(metavar="SIZE", help="Memory per measurement, well beyond the caches.")] = "256MiB",
    repeats: Annotated[int, typer.Option(min=1, help="How often each thing is measured; the median counts.")] = 5,
    tiny: Annotated[bool, typer.Option(help="Very small sizes: shows that it works, the figures say nothing.")] = False,
    json: JsonOption = None,
) -> None:
    """Bandwidth, latency and first touch between all nodes; the same work unbound and bound, and whether binding pays."""
    from kvtier.cli.cuda_links import cuda_links
    from kvtier.config.units import format_bytes
    from kvtier.numa.choosing import compare_binding, get_optimal_numa_node
    from kvtier.numa.device_copies import measure_device_copies
    from kvtier.numa.measure import measure_nodes
    from kvtier.numa.pmu import NODE_LOAD_MISSES, NODE_LOADS, Counters, remote_share
    from kvtier.numa.topology import read_topology

    check_json_target(json)
    size = _TINY_BYTES if tiny else parse_size("--size-bytes", size_bytes)
    if size < _TINY_BYTES:
        raise NumaError(f"--size-bytes {size_bytes}: give at least {format_bytes(_TINY_BYTES)}, better several times the last-level cache")
    topology = read_topology()
    console = human_console(json)
    try:
        with shown_progress(console) as progress:
            task = progress.add_task("", total=None)
            found = measure_nodes(topology, size, repeats, lambda what: progress.update(task, description=what))
            links = cuda_links(size)
            copies = measure_device_copies(links, topology, size, repeats, lambda what: progress.update(task, description=what))
            progress.update(task, description="the same work unbound and bound")
            with Counters([NODE_LOADS, NODE_LOAD_MISSES]) as counters:
                comparison = compare_binding(get_optimal_numa_node(), size, repeats)
                counts = counters.read()
    except OSError as error:
        raise NumaError(f"the kernel refuses to measure: {error.strerror}; lower --size-bytes, or see `kvtier doctor`") from None
    _print_distances(console, found)
    _print_copies(console, copies)
    remote = remote_share(counts)
    meanwhile = "; ".join(f"{name}: {why}" for name, why in counters.refused.items()) or "none counted"
    _print_binding(console, size, comparison, meanwhile if remote is None else f"{remote:.1%} of another node")
    write_json(
        {
            "size_bytes": size,
            "repeats": repeats,
            **asdict(found),
            "device_copies": [asdict(each) for each in copies],
            "counters": {"counts": counts, "refused": counters.refused, "remote_share": remote},
            "comparison": {
                **asdict(comparison),
                "gain": comparison.gain,
                "break_even_pages": comparison.break_even_pages,
                "verdict": comparison.verdict(),
            },
        },
        json,
    )


def _print_distances(console: Console, found: Measured) -> None:
    console.print(_matrix("reads, GB/s: CPUs of", found.read_gb_per_s, "{:.1f}"))
    if found.latency_ns is None:
        console.print("latency: not measured, the walk was not compiled (needs a C compiler when kvtier is installed)")
    else:
        console.print(_matrix("latency, ns (4 KiB pages): CPUs of", found.latency_ns, "{:.0f}"))
    console.print(_matrix("first touch, GB/s: CPUs of", found.first_touch_gb_per_s, "{:.2f}"))


def _print_copies(console: Console, copies: Sequence[DeviceCopies]) -> None:
    for each in copies:
        pinned = "" if each.pinned else " (not pinned)"
        console.print(
            f"{each.device}, memory of node {each.node}: {each.to_device_gb_per_s:.1f} GB/s up, {each.to_host_gb_per_s:.1f} down{pinned}",
            soft_wrap=True,
        )
    if not copies:
        console.print("device copies: not measured, there is no CUDA device")


def _print_binding(console: Console, size: int, comparison: Comparison, reads: str) -> None:
    from kvtier.config.units import format_bytes

    console.print(
        f"the same work, copying {format_bytes(size)} in pages: {comparison.unbound * 1e6:.1f} us a page unbound, "
        f"{comparison.bound * 1e6:.1f} us bound to node {comparison.node}",
        soft_wrap=True,
    )
    console.print(f"memory reads meanwhile: {reads}", soft_wrap=True)
    console.print(comparison.verdict(), soft_wrap=True)


@app.command()
def stats(
    seconds: Annotated[float, typer.Option(min=0.0, max=3600.0, help="How long to count.")] = 1.0,
    pid: Annotated[int | None, typer.Option(help="Also where the memory of this process is.")] = None,
    json: JsonOption = None,
) -> None:
    """What the kernel counted meanwhile: pages taken locally and remotely, balance of the nodes, pages moved per second."""
    from kvtier.numa.counters import local_remote_ratio, node_balance, rates, read_counters
    from kvtier.numa.placement import bytes_by_node, read_numa_maps
    from kvtier.numa.pmu import Counters, uncore_events

    check_json_target(json)
    console = human_console(json)
    memory = None
    if pid is not None:
        try:
            memory = bytes_by_node(read_numa_maps(pid))
        except OSError as error:
            raise NumaError(f"--pid {pid}: its memory cannot be looked at: {error.strerror}") from None
    events = uncore_events()
    with Counters(events) as counters:
        before = read_counters()
        time.sleep(seconds)
        change = rates(before, read_counters())
        counts = counters.read()
    console.print(
        f"{change.local_pages} pages taken locally, {change.remote_pages} remotely ({change.local_share:.1%} local), {change.misses} not "
        f"where preferred; balance of the nodes {change.balance:.2f}; {change.migrations_per_s:.1f} pages moved per second",
        soft_wrap=True,
    )
    units = {event.name: event.unit for event in events}
    for name, count in counts.items():
        console.print(f"{name}: {count / change.seconds:.1f} {units[name] or 'events'} per second")
    for name, why in counters.refused.items():
        console.print(f"{name}: {why}", soft_wrap=True)
    if not events:
        console.print("link and memory controller use: this kernel describes no such counters (usual in virtual machines)")
    if memory is not None:
        console.print(
            f"process {pid}: " + (", ".join(f"{size / 2**20:.1f} MiB on node {node}" for node, size in memory.items()) or "no memory")
        )
    ratio = local_remote_ratio(change.local_pages, change.remote_pages)
    write_json(
        {
            **asdict(change),
            "local_share": change.local_share,
            "local_remote_ratio": ratio if change.remote_pages else None,
            "uncore": {"counts": counts, "units": units, "refused": counters.refused},
            "process": None if memory is None else {"pid": pid, "bytes_by_node": memory, "balance": node_balance(list(memory.values()))},
        },
        json,
    )


def _matrix(title: str, matrix: Matrix, form: str) -> Table:
    from rich.table import Table

    targets = sorted({target for row in matrix.values() for target in row})
    table = Table(title, *(f"memory of {target}" for target in targets), box=None, header_style="bold")
    for source, row in matrix.items():
        table.add_row(f"node {source}", *(form.format(row[target]) for target in targets))
    return table
