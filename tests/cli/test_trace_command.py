"""`kvtier trace make`, `stats`, `convert`: files and streams, figures, one line for bad input."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from kvtier.cli import main
from kvtier.replay import trace
from kvtier.replay.trace import read_trace


def test_made_traces_are_files_archives_or_the_stream(capsys, tmp_path: Path):
    plain, packed = tmp_path / "t.jsonl", tmp_path / "t.jsonl.gz"
    arguments = ["--mix", "chat=.5,agents=.3,scan=.2", "--requests", "120", "--rate", "5", "--seed", "7"]
    assert main(["trace", "make", str(plain), *arguments]) == 0
    assert "120 requests" in " ".join(capsys.readouterr().out.split())
    assert main(["trace", "make", str(packed), *arguments]) == 0
    content = packed.read_bytes()
    assert content[4:8] == bytes(4), "the time of writing is not in there, so equal traces are equal files"
    capsys.readouterr()
    assert main(["trace", "make", *arguments]) == 0
    assert capsys.readouterr().out == plain.read_text()
    one, other = read_trace(plain), read_trace(packed)
    assert one.pages.tolist() == other.pages.tolist()
    assert one.requests == 120


def test_stats_in_json_table_and_plot(capsys, tmp_path: Path):
    path, plot = tmp_path / "t.jsonl", tmp_path / "plot.pdf"
    assert main(["trace", "make", str(path), "--requests", "150"]) == 0
    capsys.readouterr()
    assert main(["trace", "stats", str(path), str(path), "--json", "-", "--plot", str(plot)]) == 0
    stats = json.loads(capsys.readouterr().out)
    assert [one["requests"] for one in stats] == [150, 150]
    keys = {
        "span_s",
        "accesses",
        "distinct_pages",
        "reuse_distance",
        "reuse_gap_s",
        "never_reused_share",
        "working_set",
        "infinite_token_hit_ratio",
    }
    assert keys <= set(stats[0])
    assert plot.read_bytes().startswith(b"%PDF")
    assert main(["trace", "stats", str(path)]) == 0
    assert f"{stats[0]['infinite_token_hit_ratio']:.4f}" in capsys.readouterr().out


def test_a_converted_trace_replays_and_notes_are_told_beside_it(capsys, tmp_path: Path):
    source, out = tmp_path / "azure.csv", tmp_path / "t.jsonl"
    source.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n")
    assert main(["trace", "convert", str(source), "--from", "azure"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["input_length"] == 4808
    assert "no hashes" in captured.err
    assert main(["trace", "convert", str(source), str(out)]) == 0
    assert "taken for azure" in capsys.readouterr().err
    assert main(["replay", str(out), "--capacity", "50%"]) == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["make", "--mix", "games"], "unknown workload 'games'; known: chat, system"),
        (["make", "--mix", "chat=much"], "'chat=much' is no workload with its share"),
        (["make", "--mix", "chat=-1"], "share -1"),
        (["make", "--rate", "0"], "rate: 0"),
        (["make", "/nonexistent/t.jsonl"], "cannot write /nonexistent/t.jsonl"),
        (["stats", "/nonexistent/t.jsonl"], "cannot read /nonexistent/t.jsonl"),
        (["convert", "/nonexistent/t.jsonl", "--from", "mooncake"], "cannot read"),
        (["convert", "/nonexistent/t.jsonl", "--from", "csv"], "unknown trace format 'csv'; known: mooncake"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, arguments, expected):
    assert main(["trace", *arguments]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_a_trace_is_written_whole_or_what_was_there_stays(capsys, tmp_path: Path, monkeypatch, name: str):
    path = tmp_path / name
    assert main(["trace", "make", str(path), "--requests", "40"]) == 0
    before = path.read_bytes()

    def half(requests, file):
        file.write(next(iter(requests)).as_json())
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(trace, "write_trace", half)
        assert main(["trace", "convert", str(path), str(path)]) == 2
        assert main(["trace", "make", str(tmp_path / "new.jsonl")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path], "nothing half-done lies about"
    path.chmod(0o640)
    assert main(["trace", "convert", str(path), str(path)]) == 0
    assert read_trace(path).requests == 40
    assert path.stat().st_mode & 0o777 == 0o640
    assert main(["trace", "make", str(path), "--requests", "40"]) == 0
    assert path.read_bytes() == before, "equal traces are equal files"
