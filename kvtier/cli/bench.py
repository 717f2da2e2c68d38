"""`kvtier bench NAME`: one command per benchmark of `kvtier.bench` (the folder `benchmarks/` of the sources)."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer

from kvtier.cli.measuring import LayoutOption, PathOption, PlotOption, RepeatsOption, TinyOption, measured
from kvtier.cli.output import JsonOption
from kvtier.cli.profile import ProfileOption
from kvtier.cli.values import checked_path, parse_numbers, parse_size
from kvtier.errors import KVTierError

app = typer.Typer(help="Measure this machine and kvtier on it, each figure beside its ceiling.", no_args_is_help=True)


@app.command()
def arena(
    size_bytes: Annotated[str, typer.Option(metavar="SIZE", help="How much memory, like 4GiB; at most half of what can be had.")] = "4GiB",
    raise_pool: Annotated[bool, typer.Option("--raise-pool", help="With explicit huge pages too: sets vm.nr_hugepages meanwhile.")] = False,
    repeats: RepeatsOption = 5,
    tiny: TinyOption = False,
    json: JsonOption = None,
    plot: PlotOption = None,
    profile: ProfileOption = None,
) -> None:
    """How long a host tier's memory takes to be ready, beside touching it page by page; how fast it is then."""
    size = parse_size("--size-bytes", size_bytes)
    if size == 0:
        raise KVTierError("--size-bytes 0: give at least one page of memory, better gigabytes")
    measured("arena", repeats, tiny, json, plot, profile, size_bytes=size, raise_pool=raise_pool)


@app.command()
def disk(
    path: Annotated[Path | None, typer.Option(metavar="DIR", help="Where to measure. Default: the system's temporary directory.")] = None,
    size_bytes: Annotated[str, typer.Option(metavar="SIZE", help="Size of the file, like 1GiB; it is removed at the end.")] = "1GiB",
    repeats: RepeatsOption = 5,
    tiny: TinyOption = False,
    json: JsonOption = None,
    plot: PlotOption = None,
    profile: ProfileOption = None,
) -> None:
    """How fast the file engines read and write at random, beside fio with the same block size and depth."""
    size = parse_size("--size-bytes", size_bytes)
    note = importlib.import_module("kvtier.bench.disk").ceiling_note()
    measured("disk", repeats, tiny, json, plot, profile, note, path=path, size_bytes=size)


@app.command()
def table(
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Requests to replay, Mooncake JSONL. Default: chats that the benchmark makes up.")
    ] = None,
    share: Annotated[float, typer.Option(help="Capacity of the replay, as a share of the distinct pages.")] = 0.05,
    vllm: Annotated[bool, typer.Option("--vllm", help="vLLM's own bookkeeping over the same requests, too. Needs vLLM.")] = False,
    repeats: RepeatsOption = 5,
    tiny: TinyOption = False,
    json: JsonOption = None,
    plot: PlotOption = None,
    profile: ProfileOption = None,
) -> None:
    """What the bookkeeping costs: page table and policies at 10^4 to 10^6 pages, and a whole stream of requests."""
    note = "the ceilings are plain dicts; that of a stream is a floor"
    measured("table", repeats, tiny, json, plot, profile, note, trace=trace, share=share, vllm=vllm)


@app.command()
def eviction(
    table: Annotated[str, typer.Argument(metavar="traffic|parts", help="Made-up traffic of many kinds, or a2cr without its parts.")],
    traces: Annotated[list[Path] | None, typer.Argument(metavar="[TRACE...]", help="For parts: Mooncake JSONL too, plain or .gz.")] = None,
    capacity: Annotated[str, typer.Option(metavar="SIZE,...", help="Shares of the distinct pages or numbers of pages.")] = "1%,5%,10%,20%",
    tiny: TinyOption = False,
    json: JsonOption = None,
    plot: PlotOption = None,
    profile: ProfileOption = None,
) -> None:
    """The tables of docs/eviction.md: tokens that policies find, and what each part of a2cr is worth, beside the optimum."""
    note = "tokens found, of all; ceiling: the offline optimum; nothing here is timed"
    measured("eviction", 1, tiny, json, plot, profile, note, table=table, traces=traces or (), capacities=capacity)


@app.command()
def codecs(
    layout: Annotated[str, typer.Option(help="Whose pages: smollm2 (3 heads of 64) or llama (8 of 128).")] = "smollm2",
    formats: Annotated[str, typer.Option(metavar="NAME,...", help="As in the configuration.")] = "q8,q6,q4,q3,q8_0,q4_0",
    size_bytes: Annotated[str, typer.Option(metavar="SIZE", help="How many bytes of pages, like 512MiB.")] = "512MiB",
    repeats: RepeatsOption = 5,
    tiny: TinyOption = False,
    json: JsonOption = None,
    plot: PlotOption = None,
    profile: ProfileOption = None,
) -> None:
    """How fast pages are encoded and decoded on the CPU, beside copying them with one thread."""
    size = parse_size("--size-bytes", size_bytes)
    note = importlib.import_module("kvtier.bench.codecs").note()
    measured("codecs", repeats, tiny, json, plot, profile, note, layout=layout, formats=formats.split(","), size_bytes=size)


@app.command()
def links(
    layout: LayoutOption = "smollm2",
    path: PathOption = None,
    repeats: RepeatsOption = 5,
    tiny: TinyOption = False,
    json: JsonOption = None,
    plot: PlotOption = None,
    profile: ProfileOption = None,
) -> None:
    """How fast pages cross each link between tiers, one page to 64 MiB at once; restoring a long prefix from the disk."""
    ceiling = importlib.import_module("kvtier.bench.disk").ceiling_note()
    note = f"pages of {layout}; restore: {ceiling}"
    measured("links", repeats, tiny, json, plot, profile, note, layout=layout, path=checked_path(path))


@app.command()
def tiers(
    layout: LayoutOption = "smollm2",
    sequence_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each sequence.")] = 512,
    path: PathOption = None,
    repeats: RepeatsOption = 5,
    tiny: TinyOption = False,
    json: JsonOption = None,
    plot: PlotOption = None,
    profile: ProfileOption = None,
) -> None:
    """Offload and restore of 1 to 64 sequences at once through one cache, beside a plain copy of their pages."""
    note = f"pages of {layout}, sequences of {sequence_tokens} tokens"
    measured("tiers", repeats, tiny, json, plot, profile, note, layout=layout, sequence_tokens=sequence_tokens, path=checked_path(path))


@app.command()
def load(
    layout: LayoutOption = "smollm2",
    batch: Annotated[str, typer.Option(metavar="N,...", help="Sequences per request.")] = "1",
    sequence_tokens: Annotated[str, typer.Option(metavar="N,...", help="Tokens of each sequence.")] = "1024",
    concurrency: Annotated[str, typer.Option(metavar="N,...", help="Threads that serve requests.")] = "8",
    rate: Annotated[str, typer.Option(metavar="R,...", help="Requests that arrive per second, served or not.")] = "20",
    duration: Annotated[float, typer.Option(metavar="SECONDS", help="How long requests arrive, per combination.")] = 20.0,
    ramp_up: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="How much of that the rate takes to climb. Default: a quarter.")
    ] = None,
    path: PathOption = None,
    repeats: RepeatsOption = 1,
    tiny: TinyOption = False,
    json: JsonOption = None,
    plot: PlotOption = None,
    profile: ProfileOption = None,
) -> None:
    """Throughput, latency and stress of the whole cache under random requests; fails if one fails or a page comes back wrong.

    Options with N,... take several values: every combination is measured.
    """
    options: dict[str, Any] = {
        "batches": parse_numbers("--batch", batch, int),
        "sequence_tokens": parse_numbers("--sequence-tokens", sequence_tokens, int),
        "concurrency": parse_numbers("--concurrency", concurrency, int),
        "rates": parse_numbers("--rate", rate, float),
    }
    note = f"pages of {layout}"
    options |= {
        "layout": layout,
        "duration_s": duration,
        "ramp_up_s": duration / 4 if ramp_up is None else ramp_up,
        "path": checked_path(path),
    }
    measured("load", repeats, tiny, json, plot, profile, note, **options)


@app.command("no-reuse")
def no_reuse(
    model: Annotated[str, typer.Option(metavar="NAME|DIR", help="synthetic, packaged, or a Hugging Face folder.")] = "synthetic",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt, computed at once.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens computed one by one after it.")] = 32,
    path: PathOption = None,
    repeats: RepeatsOption = 9,
    tiny: TinyOption = False,
    json: JsonOption = None,
    plot: PlotOption = None,
    profile: ProfileOption = None,
) -> None:
    """What the cache costs work that never finds anything in it: the same requests with and without it, in turns."""
    options = {"model": model, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "path": checked_path(path)}
    measured("no_reuse", repeats, tiny, json, plot, profile, f"engine: {model}", **options)


@app.command()
def pricing(
    layout: LayoutOption = "smollm2",
    path: PathOption = None,
    repeats: RepeatsOption = 5,
    tiny: TinyOption = False,
    json: JsonOption = None,
    plot: PlotOption = None,
    profile: ProfileOption = None,
) -> None:
    """Whether the choice between restoring and recomputing ever takes the slower way, for engines of many speeds."""
    note = f"pages of {layout}; ceiling: the faster of restoring all and computing all"
    measured("pricing", repeats, tiny, json, plot, profile, note, layout=layout, path=checked_path(path))


@app.command()
def gpu(
    check: Annotated[bool, typer.Option(help="First let every format go down and up, and compare with the CPU.")] = True,
    path: PathOption = None,
    repeats: RepeatsOption = 7,
    tiny: TinyOption = False,
    json: JsonOption = None,
    plot: PlotOption = None,
    profile: ProfileOption = None,
) -> None:
    """What the link to a GPU gives: scattered pages, coded pages, launches, layers read while others come, decoding beside an offload."""
    program = importlib.import_module("kvtier.bench.gpu")
    program.find_gpu()
    directory = checked_path(path)
    measured("gpu", repeats, tiny, json, plot, profile, program.note(directory), check=check, directory=directory)


@app.command()
def attend(
    layout: LayoutOption = "smollm2",
    prefix_tokens: Annotated[int, typer.Option(min=1, help="Tokens in host memory that each request attends over.")] = 1024,
    repeats: RepeatsOption = 5,
    tiny: TinyOption = False,
    json: JsonOption = None,
    plot: PlotOption = None,
    profile: ProfileOption = None,
) -> None:
    """Fetching pages from host memory or attending to them in place, and whether the router between them takes the faster way."""
    note = f"pages of {layout}; ceiling: the faster of both ways"
    measured("attend", repeats, tiny, json, plot, profile, note, layout=layout, prefix_tokens=prefix_tokens)


@app.command()
def engines(
    systems: Annotated[str, typer.Option(metavar="NAME,...", help="Some of the systems it knows. Default: those of docs/vllm.md.")] = "",
    workload: Annotated[
        str, typer.Option(metavar="NAME,...", help="Some of documents, chat, agent and no-reuse.")
    ] = "documents,chat,agent,no-reuse",
    contexts: Annotated[int, typer.Option(help="Documents, chats or agents that take turns; at least 4.")] = 4,
    document_tokens: Annotated[int, typer.Option(help="Tokens of each document; the other workloads' sizes follow from it.")] = 3000,
    rounds: Annotated[int, typer.Option(help="How often each comes back from memory; at least once.")] = 2,
    path: PathOption = None,
    repeats: RepeatsOption = 5,
    tiny: TinyOption = False,
    json: JsonOption = None,
    plot: PlotOption = None,
    profile: ProfileOption = None,
) -> None:
    """Time to first token inside vLLM: kvtier beside vLLM's own tiers and LMCache, cold, from memory and from disk after a restart."""
    program = importlib.import_module("kvtier.bench.engines")
    options: dict[str, Any] = {"workloads": workload.split(","), "contexts": contexts, "document_tokens": document_tokens, "rounds": rounds}
    options |= {"systems": systems.split(",") if systems else program.USUAL, "path": checked_path(path)}
    measured("engines", repeats, tiny, json, plot, profile, program.note(), **options)
