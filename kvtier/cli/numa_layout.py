"""`kvtier numa layout`: which layers and heads of a model's KV belong to which node, and the configuration that puts them there."""

from __future__ import annotations

from typing import Annotated, Literal, cast, get_args

import typer

from kvtier.cli.numa import app
from kvtier.cli.output import JsonOption, check_json_target, human_console, write_json
from kvtier.errors import NumaError


@app.command()
def layout(
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model.")],
    kv_heads: Annotated[int, typer.Option(min=1, help="KV heads of each.")] = 1,
    split: Annotated[
        str, typer.Option(metavar="layers|heads|both", help="What nodes share; both: sockets layers, their nodes heads.")
    ] = "layers",
    nodes: Annotated[str, typer.Option(metavar="LIST", help="Of these nodes, like 0-3. Default: all with CPUs and memory.")] = "",
    json: JsonOption = None,
) -> None:
    """Layer and head ranges for a model that spans sockets, with the host tier's settings for each."""
    from dataclasses import asdict

    from rich.table import Table

    from kvtier.numa.executor import usable_nodes
    from kvtier.numa.ids import parse_ids
    from kvtier.numa.kv_layout import Split, plan_kv
    from kvtier.numa.memory import check_nodes
    from kvtier.numa.topology import read_topology

    check_json_target(json)
    if split not in get_args(Split):
        raise NumaError(f"--split {split}: expected layers, heads or both")
    topology = read_topology()
    chosen = parse_ids(nodes) if nodes else usable_nodes(topology)
    check_nodes(chosen, topology)
    sockets = {socket: [node for node in members if node in chosen] for socket, members in topology.sockets.items()}
    sockets = {socket: members for socket, members in sockets.items() if members}
    without_cpus = [node for node in chosen if node not in {node for members in sockets.values() for node in members}]
    if without_cpus:
        raise NumaError(f"node {without_cpus[0]} has no CPUs that could work on its share; name nodes with CPUs")
    parts = plan_kv(layers, kv_heads, sockets, cast(Literal["layers", "heads", "both"], split))
    table = Table("node", "layers", "KV heads", "share", box=None, header_style="bold")
    for part in parts:
        ranges = [f"{first}-{stop - 1}" for first, stop in (part.layers, part.heads)]
        table.add_row(str(part.node), *ranges, f"{part.share(layers, kv_heads):.1%}")
    console = human_console(json)
    console.print(table)
    named = ", ".join(str(part.node) for part in parts)
    if split == "layers":
        advice = f"one cache: host.numa: layers, host.numa_nodes: [{named}]"
    else:
        advice = "one process and cache per node, each with its layers and heads: host.numa: explicit, host.numa_nodes: [its node]"
    console.print(advice, soft_wrap=True)
    write_json({"split": split, "parts": [asdict(part) for part in parts], "advice": advice}, json)
