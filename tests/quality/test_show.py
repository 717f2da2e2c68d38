"""Laws checked: people see the rows by size, the frontier is what nothing beats, and every format has its name in the plot."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from kvtier.quality.row import QualityRow
from kvtier.quality.show import frontier, plot_frontier, print_rows

FIGURES = {"delta_nll_standard_error": 0.25, "top1_agreement": 0.5, "k_error": 0.125, "v_error": 0.375, "attention_output_error": 0.0625}


def row(name, bits, kl, **changes):
    return QualityRow(name, bits, kl, **(FIGURES | {"kl_p99": 5 * kl, "delta_nll": kl, "recall_nll": kl} | changes))


ROWS = [row("exact", 16.0, 0.0), row("good", 8.25, 1e-5), row("bad", 8.25, 1e-3), row("small", 4.5, 3e-3), row("silly", 12.0, 0.1)]


def test_the_table_is_sorted_by_size():
    text = io.StringIO()
    print_rows(Console(file=text, width=200), ROWS)
    lines = text.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["format", "small", "good", "bad", "silly", "exact"]
    assert lines[1].split() == ["small", "4.500", "3.0e-03", "1.5e-02", "+0.0030±0.2500", "50.00%", "+0.0030", "1e-01", "4e-01", "0.0625"]


@pytest.mark.parametrize("width", [20, 80])
def test_lines_are_never_cut(width):
    text = io.StringIO()
    print_rows(Console(file=text, width=width), ROWS)
    lines = text.getvalue().splitlines()
    assert len(lines) == len(ROWS) + 1
    assert all(line.endswith("0.0625") for line in lines[1:])


def test_what_was_not_measured_is_left_blank():
    text = io.StringIO()
    print_rows(Console(file=text, width=200), [row("blank", 4.0, 0.5, delta_nll_standard_error=None, attention_output_error=None)])
    assert "None" not in text.getvalue()
    assert "±" not in text.getvalue()


def test_the_frontier_is_what_no_other_format_beats():
    assert [row.format for row in frontier(ROWS)] == ["small", "good", "exact"]


def test_every_format_is_named_in_the_plot(tmp_path):
    target = tmp_path / "frontier.svg"
    plot_frontier(ROWS, target)
    text = target.read_text()
    assert all(f">{name}" in text for name in ("exact (exact)", "good", "bad", "small", "silly"))


def test_rows_that_lose_nothing_can_be_plotted_alone(tmp_path):
    plot_frontier(ROWS[:1], tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 1000
