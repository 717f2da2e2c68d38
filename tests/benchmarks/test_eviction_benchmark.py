"""The eviction benchmark fills both tables of the docs; every part that is left out is really left out, and is back afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.ablations import PARTS, left_out
from benchmarks.eviction import PUBLISHED
from benchmarks.traffic import KINDS, make_traffic
from kvtier.cli import main
from kvtier.policy import A2CR
from kvtier.replay.lab import replay


def rows_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, float]]:
    assert main(["bench", "eviction", *arguments, "--tiny", "--json", "-"]) == 0
    return {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}


def test_traffic_has_a_row_for_lru_a2cr_and_the_best_of_the_others(capsys, tmp_path: Path):
    plot = tmp_path / "plot.svg"
    rows = rows_of(capsys, "traffic", "--capacity", "5%,20%", "--plot", str(plot))
    assert len(rows) == len(KINDS) * 2 * 3
    for kind in KINDS:
        own = {name: row for name, row in rows.items() if name.startswith(f"traffic.{kind}.20%.")}
        (best,) = [name for name in own if ".best." in name]
        assert best.rpartition(".best.")[2] in PUBLISHED
        assert all(0 <= row["value"] <= row["ceiling"] + 0.01 for row in own.values())
    assert plot.read_text().startswith("<?xml")


def test_parts_are_left_out_of_given_traces_too(capsys, tmp_path: Path):
    trace = tmp_path / "mine.jsonl"
    assert main(["trace", "make", str(trace), "--requests", "60"]) == 0
    capsys.readouterr()
    rows = rows_of(capsys, "parts", str(trace), "--capacity", "10%")
    assert set(rows) == {f"parts.{name}.10%.without-{part}" for name in ("mine", "retrieval", "agents") for part in PARTS}


@pytest.mark.slow
def test_every_part_makes_a_difference_and_is_back_afterwards():
    trace = make_traffic("mixture", 1500)
    pages = trace.distinct // 20
    plain = replay(trace, A2CR(), pages).hit_pages
    for part in PARTS:
        with left_out(part) as policy:
            found = replay(trace, policy, pages).hit_pages
        policy.check_integrity()
        assert np.array_equal(found, plain) == (part == "nothing"), part
    assert np.array_equal(replay(trace, A2CR(), pages).hit_pages, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_traffic_is_the_same_for_the_same_numbers(kind):
    assert make_traffic(kind, 50, 1).fingerprint == make_traffic(kind, 50, 1).fingerprint != make_traffic(kind, 50, 2).fingerprint


def test_a_loop_repeats_and_drift_moves_on():
    loop, drift = make_traffic("loop", 100), make_traffic("drift", 2000)
    assert loop.first_seen[: int(loop.starts[10])].all()
    again = np.add.reduceat(~loop.first_seen, loop.starts[:-1])[10:]
    assert (again >= loop.lengths[10:] - 2).all()
    firsts = drift.pages[drift.starts[:-1]]
    assert not set(firsts[:200]) & set(firsts[-200:])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["speed"], "unknown table 'speed'; known: traffic, parts"),
        (["traffic", "t.jsonl"], "makes its traces up"),
        (["parts", "/nonexistent/t.jsonl"], "cannot read"),
        (["parts", "--capacity", "0%"], "capacity '0%'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, arguments, expected):
    assert main(["bench", "eviction", *arguments, "--tiny"]) == 2
    told = capsys.readouterr().err.strip()
    assert expected in told
    assert len(told.splitlines()) == 1
