"""What benchmark commands share: their options, values as they are written, and how one is run, shown, written and drawn."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from kvtier.cli.output import check_json_target, check_writable, human_console, write_json
from kvtier.cli.profile import profiled
from kvtier.cli.stopping import stopped_in_order
from kvtier.errors import KVTierError

Number = TypeVar("Number", int, float)
PlotOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the rows (.svg, .png, .pdf).")]
TinyOption = Annotated[bool, typer.Option(help="Very small sizes: shows that it works, the figures say nothing.")]
RepeatsOption = Annotated[int, typer.Option(min=1, help="How often each thing is measured; the median counts.")]
LayoutOption = Annotated[str, typer.Option(help="Whose pages: smollm2 (3 heads of 64) or llama (8 of 128), bf16.")]
PathOption = Annotated[Path | None, typer.Option(metavar="DIR", help="Where the disk tier is. Default: the system's temporary directory.")]


def measured(
    name: str, repeats: int, tiny: bool, json: str | None, plot: Path | None, profile: Path | None, note: str = "", **options: Any
) -> None:
    """Run `kvtier.bench.NAME.measure(run, **options)`; print, write and draw its rows."""
    from rich.progress import Progress

    from kvtier.machine import describe_machine

    check_json_target(json)
    kit, program = importlib.import_module("kvtier.bench.measure"), importlib.import_module(f"kvtier.bench.{name}")
    if plot is not None:
        if plot.suffix not in (".svg", ".png", ".pdf") or not plot.parent.is_dir():
            raise KVTierError(f"--plot {plot}: expected a .svg, .png or .pdf file in an existing directory")
        kit.find_matplotlib()
        check_writable("--plot", plot)
    console = human_console(json)
    with stopped_in_order(), Progress(console=console, transient=True) as progress, profiled(profile):
        rows = program.measure(kit.Run(repeats, tiny, progress), **options)
    machine = describe_machine()
    kit.show(console, rows, f"{machine['cpu']}, {machine['cores']} cores; medians of {repeats} repeats{note and '; '}{note}")
    write_json({"machine": machine, "bench": name.replace("_", "-"), "rows": [row.as_json() for row in rows]}, json)
    if plot is not None:
        try:
            getattr(program, "plot", kit.plot)(rows, plot)
        except OSError as error:
            raise KVTierError(f"--plot {plot}: {error.strerror}; the rows are above") from None


def parse_size(text: str) -> int:
    """Bytes of a `--size-bytes`; KVTierError if that is no size."""
    from kvtier.config.units import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise KVTierError(f"--size-bytes {text}: {error}") from None


def checked_path(path: Path | None) -> Path | None:
    """A `--path`, if one was given; KVTierError unless it is a directory."""
    if path is not None and not path.is_dir():
        raise KVTierError(f"--path {path} is not a directory; name an existing one")
    return path


def parse_numbers(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    """The values of an option that takes several with commas between; KVTierError if one is no such number."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise KVTierError(f"{option} {text}: expected numbers with commas between, like 1,4") from None
