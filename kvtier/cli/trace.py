"""`kvtier trace`: make traces up, describe them, and bring others into Mooncake's format."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvtier.cli.output import JsonOption, check_apart, check_json_target, check_plot_target, human_console, write_json
from kvtier.cli.reading import BlockTokensOption, PlotOption, TracesArgument, progress_bar, read_traces
from kvtier.cli.stopping import stopped_in_order
from kvtier.errors import KVTierError

if TYPE_CHECKING:
    from kvtier.replay.trace import Request

app = typer.Typer(help="Make, describe and convert traces of requests.", no_args_is_help=True)

OutArgument = Annotated[str, typer.Argument(metavar="[OUT]", help="The trace to write, Mooncake JSONL; .gz packs it. Default: stdout.")]
RateOption = Annotated[float, typer.Option(help="Requests a second.")]
SeedOption = Annotated[int, typer.Option(help="Equal seeds make equal traces.")]


@app.command()
def make(
    out: OutArgument = "-",
    mix: Annotated[
        str,
        typer.Option(metavar="NAME[=SHARE],...", help="Who sends requests: chat, system, retrieval, agents, scan; shares of the requests."),
    ] = "chat",
    requests: Annotated[int, typer.Option(min=1, help="How many requests.")] = 10_000,
    rate: RateOption = 3.4,
    seed: SeedOption = 0,
    block_tokens: BlockTokensOption = 512,
) -> None:
    """Make up a trace of chats, programs, retrieval, agents or batch jobs, or a mixture of them."""
    from kvtier.replay.workloads import make_requests

    shares: dict[str, float] = {}
    for part in mix.split(","):
        name, mark, share = part.partition("=")
        try:
            shares[name.strip()] = shares.get(name.strip(), 0.0) + (float(share) if mark else 1.0)
        except ValueError:
            raise KVTierError(f"--mix {mix}: {part!r} is no workload with its share; expected one like chat=0.7,scan=0.3") from None
    _write(out, make_requests(shares, requests, rate, seed, block_tokens), requests)


@app.command()
def stats(
    traces: TracesArgument,
    block_tokens: BlockTokensOption = 512,
    json: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """What traces are like: sizes, reuse distances and gaps, working set, what an endless cache would find."""
    from kvtier.replay.show import plot_stats, print_stats
    from kvtier.replay.stats import trace_stats

    check_apart({"--json": json, "--plot": plot}, traces)
    check_json_target(json)
    check_plot_target(plot)
    console = human_console(json)
    loaded = read_traces(console, traces, block_tokens)
    found = []
    with progress_bar(console) as progress:
        for place, trace in enumerate(loaded):
            progress(place, len(loaded), f"looking at {trace.name}")
            found.append(trace_stats(trace))
    print_stats(console, found)
    write_json([one.as_json() for one in found], json)
    if plot is not None:
        plot_stats(found, plot)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="The trace to read, plain or .gz.")],
    out: OutArgument = "-",
    from_format: Annotated[
        str | None,
        typer.Option("--from", metavar="FORMAT", help="What IN is: mooncake, bailian, azure or sharegpt. Default: what it looks like."),
    ] = None,
    block_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a block in OUT.")] = 512,
    from_block_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a block in IN, if it is mooncake's.")] = 512,
    rate: RateOption = 3.4,
    seed: SeedOption = 0,
) -> None:
    """Bring another trace into Mooncake's format. --rate and --seed are for sharegpt, which has no times."""
    from kvtier.replay.convert import Wish, convert

    converted = convert(source, from_format, Wish(block_tokens, from_block_tokens, rate, seed))
    _write(out, converted.requests, len(converted.requests))
    for note in converted.notes:
        human_console("-").print(f"{source.name}: {note}", style="yellow")


def _write(out: str, requests: Iterable[Request], total: int) -> None:
    from kvtier.replay.lines import written_whole
    from kvtier.replay.trace import write_trace

    console = human_console(out)
    with stopped_in_order(), progress_bar(console) as progress:
        counted = _counted(requests, lambda done: progress(done, total, f"writing {out}"))
        if out == "-":
            written = write_trace(counted, sys.stdout)
        else:
            try:
                with written_whole(Path(out)) as file:
                    written = write_trace(counted, file)
            except OSError as error:
                raise KVTierError(f"cannot write {out}: {error.strerror}; give it a file in an existing, writable directory") from None
    console.print(f"{out}: {written} requests")


def _counted(requests: Iterable[Request], step: Callable[[int], None]) -> Iterator[Request]:
    for done, request in enumerate(requests):
        if done % 500 == 0:
            step(done)
        yield request
