"""What benchmark commands share: their options, and how one is run, shown, written and drawn."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer

from kvtier.cli.output import check_apart, check_json_target, check_plot_target, human_console, write_json
from kvtier.cli.profile import profiled
from kvtier.cli.progress import shown_progress
from kvtier.cli.stopping import stopped_in_order
from kvtier.errors import KVTierError

PlotOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the rows (.svg, .png, .pdf).")]
TinyOption = Annotated[bool, typer.Option(help="Very small sizes: shows that it works, the figures say nothing.")]
RepeatsOption = Annotated[int, typer.Option(min=1, help="How often each thing is measured; the median counts.")]
LayoutOption = Annotated[str, typer.Option(help="Whose pages: smollm2 (3 heads of 64) or llama (8 of 128), bf16.")]
PathOption = Annotated[Path | None, typer.Option(metavar="DIR", help="Where the disk tier is. Default: the system's temporary directory.")]


def measured(
    name: str, repeats: int, tiny: bool, json: str | None, plot: Path | None, profile: Path | None, note: str = "", **options: Any
) -> None:
    """Run `kvtier.bench.NAME.measure(run, **options)`; print, write and draw its rows."""
    from kvtier.machine import describe_machine

    given = [each for value in options.values() for each in (value if isinstance(value, list | tuple) else [value])]
    check_apart({"--json": json, "--plot": plot, "--profile": profile}, [each for each in given if isinstance(each, Path)])
    check_json_target(json)
    kit, program = importlib.import_module("kvtier.bench.measure"), importlib.import_module(f"kvtier.bench.{name}")
    check_plot_target(plot)
    console = human_console(json)
    with stopped_in_order(), shown_progress(console) as progress, profiled(profile) as recorded:
        rows = program.measure(kit.Run(repeats, tiny, progress), **options)
    machine = describe_machine()
    kit.show(console, rows, f"{machine['cpu']}, {machine['cores']} cores; medians of {repeats} repeats{note and '; '}{note}")
    write_json({"machine": machine, "bench": name.replace("_", "-"), "rows": [row.as_json() for row in rows]}, json)
    if plot is not None:
        try:
            getattr(program, "plot", kit.plot)(rows, plot)
        except OSError as error:
            raise KVTierError(f"--plot {plot}: {error.strerror}; the rows are above") from None
    recorded.check()
