"""`kvtier replay`: JSON for programs, tables and plots for people, one line for bad input."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvtier.cli import main
from kvtier.policy import POLICIES


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    assert main(["trace", "make", str(path), "--requests", "200", "--seed", "1"]) == 0
    return path


def rows_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["replay", *arguments, "--json", "-"]) == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return rows


def test_json_has_a_row_for_each_trace_capacity_and_policy(capsys, tmp_path: Path, trace: Path):
    other = tmp_path / "other.jsonl.gz"
    assert main(["trace", "make", str(other), "--mix", "scan", "--requests", "100"]) == 0
    rows = rows_of(capsys, str(trace), str(other), "--policy", "all", "--capacity", "1%,100")
    expected = [(name, size, policy) for name in ("chats", "other") for size in ("1%", "100") for policy in (*POLICIES, "optimum")]
    assert [(row["trace"], row["capacity"], row["policy"]) for row in rows] == expected
    keys = {"trace", "policy", "capacity", "capacity_pages", "token_hit_ratio", "block_hit_ratio", "gap_closed", "accesses_per_s"}
    assert all(keys <= set(row) for row in rows)
    assert rows[-1]["capacity_pages"] == 100


def test_tables_and_plots_of_one_tier(capsys, tmp_path: Path, trace: Path):
    plot, target = tmp_path / "plot.svg", tmp_path / "rows.json"
    arguments = ["--policy", "lru,a2cr-classic", "--capacity", "5%,50%", "--plot", str(plot), "--json", str(target)]
    assert main(["replay", str(trace), *arguments]) == 0
    shown = capsys.readouterr().out
    ratios = {row["policy"]: f"{row['token_hit_ratio']:.4f}" for row in json.loads(target.read_text()) if row["capacity"] == "5%"}
    assert all(f"{name}" in shown and ratio in shown for name, ratio in ratios.items())
    assert plot.read_text().startswith("<?xml")


def test_tiers_in_json_tables_and_plots(capsys, tmp_path: Path, trace: Path):
    plot = tmp_path / "plot.png"
    arguments = [
        str(trace),
        "--policy",
        "lru,lru/a2cr-classic",
        "--tiers",
        "device=2%,host=8%",
        "--tiers",
        "device=50,disk=90",
        "--plot",
        str(plot),
    ]
    timed = ["--write-policy", "exclusive", "--link-speed", "12GB", "--look-ahead-ms", "0,250"]
    rows = rows_of(capsys, *arguments, *timed)
    assert [(row["capacity"], row["policy"]) for row in rows] == [
        (size, policy) for size in ("device=2%,host=8%", "device=50,disk=90") for policy in ("lru/lru", "lru/a2cr-classic")
    ]
    tiers = rows[0]["tiers"]
    assert [tier["name"] for tier in tiers] == ["device", "host"]
    assert tiers[0]["link"] is None
    assert tiers[1]["link"]["in_place"]["0"] == 0
    assert tiers[1]["link"]["in_place"]["250"] > 0.1
    assert {"source": "device", "target": "host"}.items() <= rows[0]["moved"][0].items()
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(["replay", *arguments, *timed]) == 0
    assert "250" in capsys.readouterr().out


def test_the_way_up_is_timed_only_if_the_speed_is_known(capsys, trace: Path):
    rows = rows_of(capsys, str(trace), "--policy", "lru", "--tiers", "device=2%,host=8%", "--write-policy", "write_through_selective")
    assert [tier["link"] for tier in rows[0]["tiers"]] == [None, None]


def test_backward_timestamps_are_told(capsys, tmp_path: Path):
    path = tmp_path / "t.jsonl"
    line = '{"timestamp": %d, "input_length": 5, "output_length": 0, "hash_ids": [1]}\n'
    path.write_text(line % 5 + line % 3)
    assert main(["replay", str(path), "--policy", "lru", "--capacity", "1", "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)[0]["token_hit_ratio"] == 0.5
    assert "1 of 2 timestamps" in captured.err


def test_traces_of_one_name_are_told_apart(capsys, tmp_path: Path, trace: Path):
    (tmp_path / "more").mkdir()
    other = tmp_path / "more" / "chats.jsonl"
    other.write_text(trace.read_text())
    rows = rows_of(capsys, str(trace), str(other), "--policy", "lru", "--capacity", "1%")
    assert len({row["trace"] for row in rows}) == 2


def test_names_that_look_like_markup_are_shown_as_they_are(capsys, tmp_path: Path, trace: Path):
    (tmp_path / "x[").mkdir()
    odd = tmp_path / "[bold]t.jsonl"
    odd.write_text(trace.read_text())
    closing = tmp_path / "x[" / "]t.jsonl"
    arguments = ["--policy", "lru", "--capacity", "5%"]
    assert main(["trace", "convert", str(odd), str(closing)]) == 0
    assert main(["replay", str(odd), str(closing), str(closing), *arguments]) == 0
    told = capsys.readouterr().out
    assert "[bold]t: token hit ratio; below, % of the gap from LRU to the optimum\n" in told
    assert f"{closing}: token hit ratio; below, % of the gap from LRU to the optimum\n" in told


def test_headings_are_whole_on_a_narrow_terminal(capsys, monkeypatch, trace: Path):
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["replay", str(trace), "--policy", "lru", "--tiers", "device=5%,host=20%"]) == 0
    assert "in brackets the pages that left and had to be computed again\n" in capsys.readouterr().out


@pytest.mark.parametrize("more", [["--json", "-"], []])
def test_a_full_disk_behind_the_output_is_one_line_and_exit_code_2(trace: Path, more):
    command = [sys.executable, "-m", "kvtier", "replay", str(trace), "--policy", "lru", "--capacity", "5%", *more]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("kvtier: error: cannot write the output: No space left")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--policy", "mru"], "unknown eviction policy 'mru'; known: a2cr, lru"),
        (["--policy", ""], "unknown eviction policy ''"),
        (["--policy", "lru/lru"], "unknown eviction policy 'lru/lru'"),
        (["--capacity", "0%"], "capacity '0%'"),
        (["--capacity", "101%"], "at most 100%"),
        (["--capacity", "99999999"], "distinct pages; expected at most as many"),
        (["--capacity", "5%,"], "capacity ''"),
        (["--capacity", ""], "capacity ''"),
        (["--tiers", "device"], "--tiers device"),
        (["--tiers", "a=1%,b=2%", "--capacity", "1%"], "--capacity is for one tier"),
        (["--tiers", "a=1%,b=2%", "--policy", "lru/mru"], "unknown eviction policy 'mru'"),
        (["--tiers", "a=1%,b=2%", "--write-policy", "never"], "unknown write policy 'never'"),
        (["--tiers", "a=1%,b=2%", "--link-speed", "fast"], "--link-speed fast"),
        (["--tiers", "a=1%,b=2%", "--link-speed", "0"], "expected more than 0"),
        (["--tiers", "a=1%,b=2%", "--look-ahead-ms", "5"], "add --link-speed"),
        (["--tiers", "a=1%,b=2%", "--link-speed", "1GB", "--look-ahead-ms", "soon"], "--look-ahead-ms soon"),
        (["--tiers", "a=1%,b=2%", "--link-speed", "1GB", "--look-ahead-ms", "-1"], "--look-ahead-ms -1"),
        (["--tiers", "a=1%,b=2%", "--link-speed", "1GB", "--look-ahead-ms", ""], "--look-ahead-ms : expected"),
        (["--write-policy", "write_back"], "add --tiers"),
        (["--selective-uses", "3"], "add --tiers"),
        (["--link-speed", "1GB"], "add --tiers"),
        (["--page-bytes", "much"], "--page-bytes much"),
        (["--block-tokens", "16"], "line 1.*--block-tokens"),
        (["--json", "/nonexistent/rows.json"], "cannot write"),
        (["--plot", "rows.txt"], "--plot rows.txt"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, trace: Path, arguments, expected):
    capsys.readouterr()
    assert main(["replay", str(trace), *arguments]) == 2
    told = capsys.readouterr().err
    assert re.search(expected, told)
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize(("content", "expected"), [("", "no requests"), ("{}\n", "line 1"), (None, "cannot read")])
def test_what_is_no_trace_is_one_line_and_exit_code_2(capsys, tmp_path: Path, content, expected):
    path = tmp_path / "t.jsonl"
    if content is not None:
        path.write_text(content)
    assert main(["replay", str(path)]) == 2
    told = capsys.readouterr().err
    assert expected in told
    assert len(told.splitlines()) == 1


def test_a_plot_without_matplotlib_names_the_extra_before_the_work(capsys, monkeypatch, tmp_path: Path, trace: Path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("kvtier.cli.replay.read_traces", pytest.fail)
    assert main(["replay", str(trace), "--plot", str(tmp_path / "plot.svg")]) == 2
    assert "kvtier[report]" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["replay"], ["trace", "stats"], ["tune", "--capacity", "5%", "--out", "tuned.yaml"]])
def test_results_are_not_written_over_the_trace(capsys, monkeypatch, tmp_path: Path, trace: Path, command):
    monkeypatch.chdir(tmp_path)
    before = trace.read_bytes()
    same = tmp_path / "." / trace.name
    assert main([*command, str(trace), "--json", str(same)]) == 2
    assert "is what is read; name another file" in capsys.readouterr().err
    assert main(["tune", str(trace), "--capacity", "5%", "--out", str(same)]) == 2
    assert "--out" in capsys.readouterr().err
    assert trace.read_bytes() == before


@pytest.mark.parametrize("name", ["marked.jsonl", "marked.jsonl.gz"])
def test_a_byte_order_mark_is_no_part_of_the_first_line(capsys, tmp_path: Path, trace: Path, name):
    path = tmp_path / name
    content = b"\xef\xbb\xbf" + trace.read_bytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    arguments = ["--policy", "lru", "--capacity", "5%"]
    plain, marked = rows_of(capsys, str(trace), *arguments), rows_of(capsys, str(path), *arguments)
    assert [row["token_hit_ratio"] for row in marked] == [row["token_hit_ratio"] for row in plain]
