"""What commands over traces share: arguments, reading the files, a bar for the long work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvtier.cli.progress import shown_progress

if TYPE_CHECKING:
    from rich.console import Console

    from kvtier.replay.runs import Progress
    from kvtier.replay.trace import Trace

BlockTokensOption = Annotated[int, typer.Option(min=1, help="Tokens of a block in the trace.")]
TracesArgument = Annotated[list[Path], typer.Argument(metavar="TRACE...", help="Mooncake JSONL, plain or .gz.")]
PlotOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the result (.svg, .png, .pdf).")]


def read_traces(console: Console, paths: list[Path], block_tokens: int) -> list[Trace]:
    """All traces, with a word about timestamps that ran backwards. TraceError for the first that is none."""
    from dataclasses import replace

    from kvtier.replay.trace import read_trace

    loaded: list[Trace] = []
    with progress_bar(console) as progress:
        for place, path in enumerate(paths):
            progress(place, len(paths), f"reading {path.name}")
            trace = read_trace(path, block_tokens)
            loaded.append(replace(trace, name=str(path)) if trace.name in {other.name for other in loaded} else trace)
    for trace in loaded:
        if trace.backwards:
            console.print(
                f"{trace.name}: {trace.backwards} of {trace.requests} timestamps lie before the latest one; taken as that", style="yellow"
            )
    return loaded


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """A bar that goes away when the work is done."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with shown_progress(console, *columns) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)
