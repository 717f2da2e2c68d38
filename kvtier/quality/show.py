"""The rows for people: a table from the smallest format to the largest, and the frontier of damage over size as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from kvtier.errors import KVTierError
from kvtier.quality.budget import BudgetRow
from kvtier.quality.row import QualityRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREY, MUTED = "#0072b2", "#c75000", "#c4c9cf", "#5c6570"
BUDGET_TITLES = ("select", "pages", "KL", "KL p99", "ΔNLL", "Δppl", "top-1", "recalled")
TITLES = ("format", "bits", "KL", "KL p99", "ΔNLL", "top-1", "recall", "K err", "V err", "attn")


def print_rows(console: Console, rows: Sequence[QualityRow]) -> None:
    """One line per format, by bits per value; a terminal that is too narrow wraps lines, none is cut."""
    _print_table(console, [TITLES, *(_cells(row) for row in by_size(rows))])


def print_budget_rows(console: Console, rows: Sequence[BudgetRow]) -> None:
    """One line per way to spend the budget, in the order given."""
    _print_table(console, [BUDGET_TITLES, *(_budget_cells(row) for row in rows)])


def _print_table(console: Console, lines: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    for number, (name, *figures) in enumerate(lines):
        aligned = [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(figures, widths[1:], strict=True))]
        console.print(" ".join(aligned), style=None if number else "bold cyan", markup=False, soft_wrap=True)


def _budget_cells(row: BudgetRow) -> tuple[str, ...]:
    spread = "" if row.delta_nll_standard_error is None else f"±{row.delta_nll_standard_error:.4f}"
    damage = (f"{row.kl_mean:.1e}", f"{row.kl_p99:.1e}", f"{row.delta_nll:+.4f}{spread}", f"{row.perplexity_increase:+.3f}")
    recalled = "" if row.recalled_pages is None else f"{row.recalled_pages:.1f}"
    return (row.select, f"{row.pages:.0f}", *damage, f"{row.top1_agreement:.2%}", recalled)


def _cells(row: QualityRow) -> tuple[str, ...]:
    spread = "" if row.delta_nll_standard_error is None else f"±{row.delta_nll_standard_error:.4f}"
    attention = "" if row.attention_output_error is None else f"{row.attention_output_error:.4f}"
    damage = (f"{row.kl_mean:.1e}", f"{row.kl_p99:.1e}", f"{row.delta_nll:+.4f}{spread}", f"{row.top1_agreement:.2%}")
    errors = (f"{row.k_error:.0e}", f"{row.v_error:.0e}", attention)
    return (row.format, f"{row.bits_per_value:.3f}", *damage, f"{row.recall_nll:+.4f}", *errors)


def by_size(rows: Sequence[QualityRow]) -> list[QualityRow]:
    """From the smallest to the largest; of equal ones the less damaging first."""
    return sorted(rows, key=lambda row: (row.bits_per_value, row.kl_mean))


def frontier(rows: Sequence[QualityRow]) -> list[QualityRow]:
    """The rows that no other row beats in damage without being larger, by size."""
    best: list[QualityRow] = []
    for row in by_size(rows):
        if not best or row.kl_mean < best[-1].kl_mean:
            best.append(row)
    return best


def plot_frontier(rows: Sequence[QualityRow], path: Path) -> None:
    """KL, logarithmic, over bits per value. Formats that lose nothing stand at the lower edge. KVTierError if `path` cannot be written."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    lossy, exact = [row for row in rows if row.kl_mean > 0], [row for row in rows if row.kl_mean <= 0]
    best = [row for row in frontier(rows) if row.kl_mean > 0]
    axes.plot([row.bits_per_value for row in best], [row.kl_mean for row in best], color=GREY, linewidth=3, zorder=1)
    axes.set(xlabel="bits per value", ylabel="KL from the untouched cache, nats per token, logarithmic", yscale="log")
    axes.margins(0.18, 0.12)
    for row in lossy:
        axes.plot(row.bits_per_value, row.kl_mean, "o", color=BLUE if row in best else ORANGE)
    bottom = axes.get_ylim()[0]
    for row in exact:
        axes.plot(row.bits_per_value, bottom, "v", color=BLUE)
    axes.set_ylim(bottom=bottom * 0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GREY, alpha=0.4)
    axes.set_axisbelow(True)
    figure.draw_without_rendering()
    points = {row.format: (row.bits_per_value, row.kl_mean) for row in lossy}
    _label(axes, points | {f"{row.format} (exact)": (row.bits_per_value, bottom) for row in exact})
    try:
        with rc_context({"svg.fonttype": "none"}):
            figure.savefig(path)
    except (OSError, ValueError) as error:
        raise KVTierError(f"--plot {path}: {error}; give it a .svg, .png or .pdf file in an existing, writable directory") from None


def _label(axes: Axes, points: dict[str, tuple[float, float]]) -> None:
    """Name the points, each as near as earlier names leave room."""
    taken: list[tuple[float, float, float]] = []
    for name, point in sorted(points.items(), key=lambda item: item[1][1]):
        x, y = axes.transData.transform(point)
        width, height = 7.0 * len(name) + 10, 13.0
        step = 0
        while any(x < end and start < x + width and abs(y + step * height - other) < height for start, end, other in taken):
            step = 1 - step if step <= 0 else -step
        taken.append((x, x + width, y + step * height))
        axes.annotate(name, point, (7, step * height * 0.72 - 3), textcoords="offset points", fontsize=9, color=MUTED)
