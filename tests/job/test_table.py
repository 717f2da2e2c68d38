"""The terminal view of a run: every figure is there, at every width that people use."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from kvtier.job.table import data, print_result
from tests.job.results import Result, make_result, with_tiers, without_returning_turns


def show(result: Result, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_result(console, result)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_every_figure_is_printed() -> None:
    text = show(make_result())
    for tier in ("2,011", "331", "5,296", "1,796", "1,789 room needed, 7 score under threshold", "48.0 of 64.0 MiB", "3 checksum"):
        assert tier in text
    for link in ("61", "1,223", "71.0 MiB", "859.9 MiB", "0.611", "283 pages: 229 in time, 13 late, 41 wasted (17 more over budget)"):
        assert link in text
    for times in ("1,975 ms", "2,389 ms", "152 ms", "198 ms", "101 ms", "103 ms", "203 ms", "207 ms", "162 ms", "208 ms", "13.5x"):
        assert times in text
    for measure in ("0.00197", "97.8%", "+0.24%", "1,279 tokens", "every generated token was identical"):
        assert measure in text
    for rest in ("Tiny-7M", "2 sessions x 2 turns", "4,567 tokens", "256.0 MiB", "25%", "FAILED: 1 of 2 checks", "183 s", "Abacus 9"):
        assert rest in text


@pytest.mark.parametrize("width", [80, 100, 120])
def test_tables_do_not_wrap(width: int) -> None:
    lines = show(make_result(), width).splitlines()
    assert max(map(len, lines)) <= width
    for first in ("device ", "host ", "disk ", "device->host", "disk->device"):
        row = next(line for line in lines if line.strip().startswith(first))
        assert len(row.split()) >= 6
    assert next(line for line in lines if line.strip().startswith("configured formats")).rstrip().endswith("1,279 tokens")


def test_one_and_two_tiers_are_shown() -> None:
    assert "host->disk" not in show(with_tiers("device", "host"))
    assert "No page crossed a link" in show(with_tiers("device"))


def test_a_run_without_returning_turns_has_no_times_and_no_made_up_figures() -> None:
    text = show(without_returning_turns())
    assert "No session returned" in text
    assert "nan" not in text


def test_differing_tokens_are_loud() -> None:
    assert "GENERATED TOKENS DIFFERED" in show(make_result() | {"tokens_identical": False})


def test_names_are_not_taken_for_markup() -> None:
    result = make_result()
    result["model"]["name"] = "[bold]model[/]"
    result["checks"][0]["detail"] = "[red]all[/red]"
    text = show(result)
    assert "[bold]model[/]" in text
    assert "[red]all[/red]" in text


def test_bytes_are_said_in_the_largest_unit_that_fits() -> None:
    assert [data(size) for size in (0, 1023, 2048, 120913920, 3 * 2**30, 2**41)] == [
        "0 B",
        "1,023 B",
        "2.0 KiB",
        "115.3 MiB",
        "3.0 GiB",
        "2.0 TiB",
    ]
