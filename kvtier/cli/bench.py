"""`kvtier bench NAME`: one command per benchmark of `kvtier.bench` (the folder `benchmarks/` of the sources)."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from kvtier.cli.output import check_json_target, human_console, write_json
from kvtier.errors import KVTierError, MissingExtra

app = typer.Typer(help="Measure this machine and kvtier on it, each figure beside its ceiling.", no_args_is_help=True)

PlotOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the rows (.svg, .png, .pdf).")]
TinyOption = Annotated[bool, typer.Option(help="Very small sizes: shows that it works, the figures say nothing.")]
RepeatsOption = Annotated[int, typer.Option(min=1, help="How often each thing is measured; the median counts.")]
ProfileOption = Annotated[
    Path | None, typer.Option(metavar="FILE.json", help="Record every call of every thread; ui.perfetto.dev opens the file. Slows the run.")
]


def measured(
    name: str, repeats: int, tiny: bool, json: str | None, plot: Path | None, profile: Path | None, note: str = "", **options: Any
) -> None:
    """Run `kvtier.bench.NAME.measure(run, **options)`; print, write and draw its rows."""
    from rich.progress import Progress

    from kvtier.machine import describe_machine

    check_json_target(json)
    kit, program = importlib.import_module("kvtier.bench.measure"), importlib.import_module(f"kvtier.bench.{name}")
    console = human_console(json)
    with Progress(console=console, transient=True) as progress, profiled(profile):
        rows = program.measure(kit.Run(repeats, tiny, progress), **options)
    machine = describe_machine()
    kit.show(console, rows, f"{machine['cpu']}, {machine['cores']} cores; medians of {repeats} repeats{note and '; '}{note}")
    write_json({"machine": machine, "bench": name, "rows": [row.as_json() for row in rows]}, json)
    if plot is not None:
        try:
            kit.plot(rows, plot)
        except (OSError, ValueError) as error:
            raise KVTierError(f"--plot {plot}: {error}; give it a .svg, .png or .pdf file in an existing, writable directory") from None


@contextmanager
def profiled(target: Path | None) -> Iterator[None]:
    """Record what runs inside, all threads, as a Chrome trace; MissingExtra without viztracer, KVTierError for a useless path."""
    if target is None:
        yield
        return
    if target.suffix not in (".json", ".gz") or not target.parent.is_dir():
        raise KVTierError(f"--profile {target}: expected a .json or .json.gz file in an existing directory")
    try:
        from viztracer import VizTracer
    except ImportError:
        raise MissingExtra("--profile needs viztracer; pip install 'kvtier[profile]'") from None
    with VizTracer(output_file=str(target), verbose=0, min_duration=5, ignore_frozen=True):
        yield
