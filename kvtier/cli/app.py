"""The commands of `kvtier`. A command is a module that decorates a function with `@app.command()`; the last lines list those modules.

They are imported for every call, `--help` included, so they import their rooms (and torch) inside the functions.
"""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    help="A tiered KV cache for LLM serving.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from kvtier import __version__

        typer.echo(f"kvtier {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    del version


# One name per module with commands; they need `app`, so they come last.
from kvtier.cli import bench, config, doctor, numa, numa_bench, numa_layout, numa_plan, quality, replay, run, trace, tune  # noqa: E402, F401

app.add_typer(bench.app, name="bench")
app.add_typer(config.app, name="config")
app.add_typer(numa.app, name="numa")
app.add_typer(trace.app, name="trace")
