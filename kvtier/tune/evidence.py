"""What a search is worth, and how it is told: the verdict on the second half, a configuration's heading, table, plot and JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kvtier.errors import KVTierError
from kvtier.replay.lines import written_whole
from kvtier.tune.annotated import HEAD, one_line
from kvtier.tune.judge import Cell, mean_first, mean_second
from kvtier.tune.space import Values

LEAST_GAIN = 0.001
"""Token hit ratio by which the second half must be better: a tenth of a point. Less is luck."""


@dataclass(frozen=True)
class Evidence:
    """The configuration as it was and as it was tuned, on the same traces, and how the latter was found."""

    config: str
    given: Sequence[Cell]
    tuned: Sequence[Cell]
    values: Values
    before: Values
    """What `values` were in the configuration."""
    trials: int
    seed: int
    ended: str
    command: str
    version: str

    @property
    def gain_first(self) -> float:
        """Mean token hit ratio gained on the first halves, which the values were chosen on."""
        return mean_first(self.tuned) - mean_first(self.given)

    @property
    def gain_second(self) -> float:
        """The same on the second halves, which had no say."""
        return mean_second(self.tuned) - mean_second(self.given)

    @property
    def refusal(self) -> str | None:
        """Why these values are not to be had; None if they are better."""
        if self.gain_first < LEAST_GAIN:
            return (
                f"nothing that was tried is better than {self.config} on the first half: best {mean_first(self.tuned):.4f}, "
                f"it {mean_first(self.given):.4f}; expected at least {LEAST_GAIN} more"
            )
        if self.gain_second < LEAST_GAIN:
            return (
                f"what was best on the first half does not hold on the second: {mean_second(self.tuned):.4f}, "
                f"{self.config} {mean_second(self.given):.4f}; expected at least {LEAST_GAIN} more"
            )
        return None

    def as_json(self, out: str) -> dict[str, object]:
        """As `--json` shows it."""
        cells = [
            {"trace": now.trace, "room": now.room, "given": _figures(was), "tuned": _figures(now)}
            for was, now in zip(self.given, self.tuned, strict=True)
        ]
        means = {"given": _means(self.given), "tuned": _means(self.tuned), "gain_first": self.gain_first, "gain_second": self.gain_second}
        plain = {key: value for key, value in asdict(self).items() if key not in ("given", "tuned")}
        return plain | means | {"written": None if self.refusal else out, "refusal": self.refusal, "cells": cells}


def write_whole(path: Path, text: str) -> None:
    """Write the file, or leave what is there as it is. KVTierError if it cannot be written."""
    try:
        with written_whole(path) as file:
            file.write(text)
    except OSError as error:
        raise KVTierError(f"cannot write {path}: {error.strerror}; give --out a file in an existing, writable directory") from None


def print_evidence(console: Console, evidence: Evidence) -> None:
    """Both configurations on both halves, per trace and room, and the values that differ."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold cyan")
    table.add_column("token hit ratio", overflow="fold")
    for title in ("1st half", "tuned", "2nd half", "tuned", "gain"):
        table.add_column(title, justify="right", no_wrap=True)
    for was, now in zip(evidence.given, evidence.tuned, strict=True):
        ratios = [was.first, now.first, was.second, now.second]
        table.add_row(f"{now.trace}, {now.room}", *(f"{ratio:.4f}" for ratio in ratios), f"{now.second - was.second:+.4f}")
    if len(evidence.given) > 1:
        ratios = [*(mean_first(cells) for cells in (evidence.given, evidence.tuned)), *map(mean_second, (evidence.given, evidence.tuned))]
        table.add_row("mean", *(f"{ratio:.4f}" for ratio in ratios), f"{evidence.gain_second:+.4f}", style="bold")
    console.print(table)
    for key, value in evidence.values.items():
        if evidence.before[key] != value:
            console.print(f"{key}: {one_line(evidence.before[key])} -> {one_line(value)}")


def plot_trials(ratios: Sequence[float], given: float, path: Path) -> None:
    """The trials on the first half in order, the best so far, and what they are compared to. MissingExtra without matplotlib."""
    from kvtier.replay.show import new_figure, save_figure

    figure, (axes,) = new_figure(1, 4.2)
    numbers = range(1, len(ratios) + 1)
    axes.plot(numbers, ratios, ".", color="#0072b2", label="trial")
    axes.plot(numbers, [max(ratios[:number]) for number in numbers], color="#0072b2", label="best so far")
    axes.axhline(given, color="black", linestyle="--", label="as configured")
    axes.set(xlabel="trial", ylabel="token hit ratio, first half")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    save_figure(figure, path)


def heading(evidence: Evidence) -> list[str]:
    """How a configuration was found, as the comment at its head."""
    lines = [
        f"{HEAD} {evidence.version}: {evidence.command}",
        *textwrap.wrap(
            f"From {evidence.config}, by {evidence.trials} trials (seed {evidence.seed}; ended by: {evidence.ended}) on the first half of "
            "each trace, checked on the second. Token hit ratios:",
            110,
            initial_indent="# ",
            subsequent_indent="# ",
        ),
        "#",
        f"#   {'':40} {'first half':>19}   {'second half':>19}",
        f"#   {'trace, room':40} {'given':>9} {'tuned':>9}   {'given':>9} {'tuned':>9}",
    ]
    for was, now in zip(evidence.given, evidence.tuned, strict=True):
        label = f"{now.trace}, {now.room}"
        lines.append(f"#   {label:40} {was.first:9.4f} {now.first:9.4f}   {was.second:9.4f} {now.second:9.4f}")
    if any(cell.moved_pages for cell in evidence.tuned):
        moved = [sum(cell.moved_pages for cell in cells) for cells in (evidence.given, evidence.tuned)]
        lines += ["#", f"# Pages that travelled between tiers: {moved[0]:,} as given, {moved[1]:,} tuned."]
    return lines


def _figures(cell: Cell) -> dict[str, float]:
    return {"first": cell.first, "second": cell.second, "moved_pages": cell.moved_pages}


def _means(cells: Sequence[Cell]) -> dict[str, float]:
    return {"first": mean_first(cells), "second": mean_second(cells)}
