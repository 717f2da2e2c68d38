"""`kvtier replay`: what policies would have found in a trace of requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kvtier.cli.app import app
from kvtier.cli.output import JsonOption, check_apart, check_json_target, check_plot_target, human_console, write_json
from kvtier.cli.reading import BlockTokensOption, PlotOption, TracesArgument, progress_bar, read_traces
from kvtier.cli.values import parse_some
from kvtier.errors import KVTierError

if TYPE_CHECKING:
    from kvtier.replay.capacities import Layout

CAPACITIES = "1%,2%,5%,10%,20%,50%"
WRITE_POLICY = "write_back"
SELECTIVE_USES = 2
ADMISSION = "auto"
LOOK_AHEAD_MS = "10,50,100,250,500,1000"


@app.command()
def replay(
    traces: TracesArgument,
    policy: Annotated[
        str, typer.Option(metavar="NAME,...", help="Eviction policies, or all. With --tiers also like lru/a2cr-classic, one per tier.")
    ] = "all",
    capacity: Annotated[
        str | None, typer.Option(metavar="SIZE,...", help=f"Shares of the distinct pages or numbers of pages. Default: {CAPACITIES}.")
    ] = None,
    tiers: Annotated[
        list[str] | None, typer.Option(metavar="NAME=SIZE,...", help="Several tiers at once, warmest first: device=1%,host=9%. Repeatable.")
    ] = None,
    write_policy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[/...]",
            help=f"How pages come into the tiers below the first: as configured, or exclusive. Default: {WRITE_POLICY}.",
        ),
    ] = None,
    selective_uses: Annotated[
        int | None, typer.Option(min=1, help=f"The use at which write_through_selective writes. Default: {SELECTIVE_USES}.")
    ] = None,
    admission: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"Which leaving pages write_back writes: auto, or always. Default: {ADMISSION}."),
    ] = None,
    link_speed: Annotated[
        str | None,
        typer.Option(metavar="SIZE,...", help="Bytes a second from each tier below up to the first, like 12GB: times look-ahead."),
    ] = None,
    look_ahead_ms: Annotated[
        str | None, typer.Option(metavar="MS,...", help=f"How long before its start a request is known. Default: {LOOK_AHEAD_MS}.")
    ] = None,
    page_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Bytes of a page. Default: 128 KiB a token (Llama-3-8B, bf16), 64 MiB for 512.")
    ] = None,
    block_tokens: BlockTokensOption = 512,
    json: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Replay traces through the live cache's eviction policies: hit ratios beside LRU's and the offline optimum's."""
    from kvtier.replay.capacities import Capacity, check_policies
    from kvtier.replay.runs import replay_capacities, replay_tiers
    from kvtier.replay.show import plot_capacities, plot_tiers, print_capacities, print_tiers

    size = None if page_bytes is None else parse_some("--page-bytes", page_bytes)
    names = [name.strip() for name in policy.split(",")]
    layouts: list[Layout] = []
    if tiers:
        if capacity is not None:
            raise KVTierError("--capacity is for one tier; with --tiers the capacities are in there, like device=1%,host=9%")
        layouts = _layouts(tiers, write_policy, selective_uses, admission, link_speed, look_ahead_ms)
        names = [one for name in names for one in (check_policies(["all"]) if name == "all" else [name])]
        for layout in layouts:
            for name in names:
                layout.policies(name)
    else:
        named = {"--write-policy": write_policy, "--selective-uses": selective_uses, "--admission": admission}
        for option, given in (named | {"--link-speed": link_speed, "--look-ahead-ms": look_ahead_ms}).items():
            if given is not None:
                raise KVTierError(f"{option} is about tiers; add --tiers, like device=1%,host=9%")
        names = check_policies(names)
    capacities = [Capacity.parse(text) for text in (CAPACITIES if capacity is None else capacity).split(",")]
    check_apart({"--json": json, "--plot": plot}, traces)
    check_json_target(json)
    check_plot_target(plot)
    console = human_console(json)
    loaded = read_traces(console, traces, block_tokens)
    with progress_bar(console) as progress:
        if layouts:
            rows = replay_tiers(loaded, names, layouts, size, progress)
        else:
            rows = replay_capacities(loaded, names, capacities, size, progress)
    (print_tiers if layouts else print_capacities)(console, rows)
    write_json([row.as_json() for row in rows], json)
    if plot is not None:
        (plot_tiers if layouts else plot_capacities)(rows, plot)


def _layouts(
    tiers: list[str],
    write_policy: str | None,
    selective_uses: int | None,
    admission: str | None,
    link_speed: str | None,
    look_ahead_ms: str | None,
) -> list[Layout]:
    from kvtier.replay.capacities import Layout

    if look_ahead_ms is not None and link_speed is None:
        raise KVTierError("--look-ahead-ms needs the speed of the links: add --link-speed, like 12GB")
    speeds = [] if link_speed is None else [parse_some("--link-speed", text) for text in link_speed.split(",")]
    aheads = []
    for text in (LOOK_AHEAD_MS if look_ahead_ms is None else look_ahead_ms).split(","):
        try:
            aheads.append(float(text))
        except ValueError:
            aheads.append(-1.0)
        if not 0 <= aheads[-1] < 1e9:
            raise KVTierError(f"--look-ahead-ms {look_ahead_ms}: expected milliseconds with commas between, like 50,250")
    writes, uses, admitted = write_policy or WRITE_POLICY, selective_uses or SELECTIVE_USES, admission or ADMISSION
    return [Layout.parse(text, writes, uses, speeds, aheads, admitted) for text in tiers]
