"""What every benchmark shares: rows with a ceiling, repeats and medians, the plain copy that most ceilings are, the table and the plot.

A benchmark is a module of this folder with `measure(run, ...) -> list[Row]`, and a command of `kvtier.cli.bench` that calls it. It is
installed as `kvtier.bench`. A program measures its ceiling in the same run, interleaved with what it is compared to, because machines are
noisy; it reports medians and says in its head what its rows mean.
"""

from __future__ import annotations

import errno
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvtier.errors import KVTierError, needing


@dataclass(frozen=True)
class Row:
    """One figure. `ceiling`, in the same unit, is what the machine itself gave in the same run; None where there is none to compare to."""

    name: str
    value: float
    unit: str
    ceiling: float | None = None

    @property
    def ratio(self) -> float | None:
        """`value / ceiling`."""
        return None if self.ceiling is None else self.value / self.ceiling

    def as_json(self) -> dict[str, object]:
        """The row as `--json` shows it."""
        return {"name": self.name, "value": self.value, "unit": self.unit, "ceiling": self.ceiling, "ratio": self.ratio}


@dataclass
class Run:
    """What a benchmark is told: `tiny` asks for sizes whose figures say nothing but that it works; `repeats` is how often to measure."""

    repeats: int = 7
    tiny: bool = False
    progress: Progress = field(default_factory=lambda: Progress(disable=True))

    def __post_init__(self) -> None:
        self._task = self.progress.add_task("", total=None)
        self._done = 0

    def expect(self, steps: int) -> None:
        """How many more calls of `step` will come."""
        self.progress.update(self._task, total=self._done + steps)

    def step(self, description: str) -> None:
        """Say on the progress bar what is measured now."""
        self._done += 1
        self.progress.update(self._task, description=description, completed=self._done)


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call; waits for the GPU if there is one."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def side_by_side(works: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each of `works`, called in turn `repeats` times after one call each to warm up."""
    for work in works:
        work()
    samples = [[seconds(work) for work in works] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*samples, strict=True)]


def percentile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that at least `share` of all samples do not exceed."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def show(console: Console, rows: Sequence[Row], note: str) -> None:
    """One line per row: figure, unit, ceiling and ratio."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold cyan")
    table.add_column("", overflow="fold")
    for title in ("value", "unit", "ceiling", "ratio"):
        table.add_column(title, justify="left" if title == "unit" else "right", no_wrap=True, min_width=7)
    for row in rows:
        compared = ("", "") if row.ceiling is None or row.ratio is None else (f"{row.ceiling:.4g}", f"{row.ratio:.1%}")
        table.add_row(row.name, f"{row.value:.4g}", row.unit, *compared)
    console.print(table)
    console.print(note, style="dim")


def free_bytes(folder: Path) -> int:
    """What a file system has left; of one that says no size at all, more than anybody asks for."""
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else sys.maxsize


@contextmanager
def scratch_folder(directory: Path | None) -> Iterator[Path]:
    """A folder of its own in `directory` (the system's temporary one), gone afterwards. KVTierError where none can be made, or where
    the system refuses what is done inside for want of room."""
    where = directory or Path(tempfile.gettempdir())
    try:
        folder = tempfile.TemporaryDirectory(prefix="kvtier-bench-", dir=where)
    except OSError as error:
        raise KVTierError(f"--path {where}: nothing can be written there: {error.strerror}; name another directory") from None
    with folder as name:
        try:
            yield Path(name)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise KVTierError(f"--path {where} does not hold what is measured: {error.strerror}; name another directory") from None


def plot(rows: Sequence[Row], path: Path) -> None:
    """Each row and its ceiling on one line, one panel per unit, logarithmic where that shows them all. MissingExtra without
    matplotlib."""
    with needing("report", "--plot", "matplotlib"):
        from matplotlib.figure import Figure
    units = list(dict.fromkeys(row.unit for row in rows))
    counts = [sum(row.unit == unit for row in rows) for unit in units]
    figure = Figure(figsize=(8, 1 + len(units) * 0.6 + 0.3 * len(rows)), layout="constrained")
    panels = figure.subplots(len(units), squeeze=False, height_ratios=counts)[:, 0]
    for axes, unit in zip(panels, units, strict=True):
        chosen = [row for row in rows if row.unit == unit]
        for place, row in enumerate(chosen):
            if row.ceiling is not None:
                axes.hlines(place, row.value, row.ceiling, color="#c4c9cf", linewidth=3)
                axes.plot(row.ceiling, place, "s", color="#c75000")
            axes.plot(row.value, place, "o", color="#0072b2")
        axes.set_yticks(range(len(chosen)), [row.name for row in chosen])
        # A logarithmic axis would leave out what is zero or, as an overhead may be, below.
        positive = all(figure > 0 for row in chosen for figure in (row.value, row.ceiling) if figure is not None)
        scale, said = ("log", ", logarithmic") if positive else ("linear", "")
        axes.set(xscale=scale, xlabel=f"{unit}{said}; circle: kvtier, square: ceiling", ylim=(len(chosen) - 0.4, -0.6))
    figure.savefig(path)
