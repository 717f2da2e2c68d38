"""What a long command cannot write in the end is told before it begins."""

from __future__ import annotations

import builtins
import errno
import json
from pathlib import Path

import pytest

from benchmarks import arena
from benchmarks.measure import Row
from kvtier.cli import main
from kvtier.cli.output import write_json
from kvtier.errors import KVTierError


@pytest.fixture
def _nothing_is_measured(monkeypatch):
    monkeypatch.setattr(arena, "measure", lambda *_, **__: pytest.fail("it was measured"))
    monkeypatch.setattr("kvtier.bench.arena.measure", arena.measure)


@pytest.mark.usefixtures("_nothing_is_measured")
@pytest.mark.parametrize(("option", "name"), [("--json", "x.json"), ("--plot", "x.svg"), ("--profile", "x.json")])
def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(capsys, option, name):
    assert main(["bench", "arena", "--tiny", option, f"/proc/{name}"]) == 2
    err = capsys.readouterr().err
    assert f"/proc/{name}" in err
    assert "writable directory" in err
    assert "Traceback" not in err


def test_a_picture_of_formats_is_tried_before_a_model_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr("kvtier.engines.models.load_model", lambda *_: pytest.fail("a model was loaded"))
    assert main(["quality", "--tiny", "--plot", "/proc/x.svg"]) == 2
    assert "--plot /proc/x.svg" in capsys.readouterr().err


@pytest.mark.usefixtures("_nothing_is_measured")
def test_a_picture_that_nothing_here_can_draw_is_told_before_anything_is_measured(capsys, monkeypatch, tmp_path):
    real = builtins.__import__

    def without_matplotlib(name, *given, **options):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *given, **options)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    assert main(["bench", "arena", "--tiny", "--plot", str(tmp_path / "x.svg")]) == 2
    assert "pip install 'kvtier[report]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_nothing_is_measured")
@pytest.mark.parametrize("name", ["missing/x.svg", "x.txt", "x", "."])
def test_a_picture_of_another_kind_or_nowhere_is_told_before_anything_is_measured(capsys, tmp_path, name):
    assert main(["bench", "arena", "--tiny", "--plot", str(tmp_path / name)]) == 2
    assert f"--plot {tmp_path / name}: expected a .svg, .png or .pdf file" in capsys.readouterr().err


def test_what_is_read_is_not_written_over(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("kvtier.bench.table.measure", lambda *_, **__: pytest.fail("it was measured"))
    monkeypatch.setattr("kvtier.bench.eviction.measure", lambda *_, **__: pytest.fail("it was measured"))
    monkeypatch.setattr("kvtier.engines.models.load_model", lambda *_: pytest.fail("a model was loaded"))
    read = tmp_path / "read.json"
    read.write_text("something of others, long enough to be a document")
    linked = tmp_path / "linked.json"
    linked.symlink_to(read)
    for command in (
        ["bench", "table", "--tiny", "--trace", str(read), "--json", str(read)],
        ["bench", "table", "--tiny", "--trace", str(linked), "--profile", str(read)],
        ["bench", "eviction", "parts", str(read), "--json", str(linked)],
        ["quality", "--tiny", "--texts", str(read), "--json", str(read)],
        ["run", "--config", str(read), "--json", str(read)],
        ["trace", "stats", str(read), "--json", str(read)],
        ["replay", str(read), "--policy", "lru", "--json", str(linked)],
    ):
        read.write_text("policy: {name: lru}  # something of others, long enough to be a document")
        assert main(command) == 2, command
        assert "is what is read; name another file" in capsys.readouterr().err
        assert read.read_text().endswith("document")


def test_a_picture_is_not_drawn_over_the_trace_that_is_read(capsys, tmp_path):
    read = tmp_path / "read.svg"
    read.write_text("something of others")
    for command in (["trace", "stats"], ["replay", "--policy", "lru"], ["tune", "--out", str(tmp_path / "o.yaml"), "--capacity", "5%"]):
        assert main([*command, str(read), "--plot", str(read)]) == 2, command
        assert "--plot" in capsys.readouterr().err
        assert read.read_text() == "something of others"


@pytest.mark.usefixtures("_nothing_is_measured")
def test_no_output_is_written_over_another_one(capsys, tmp_path):
    for options in (["--json", "x.svg", "--plot", "x.svg"], ["--json", "x.json", "--profile", "./x.json"]):
        given = [option if option.startswith("--") else str(tmp_path) + "/" + option for option in options]
        assert main(["bench", "arena", "--tiny", *given]) == 2
        assert "is what --json writes; name another file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_results_that_cannot_be_written_leave_no_half_of_them(monkeypatch, tmp_path):
    def full(path, text, **options):
        with path.open("w") as file:
            file.write(text[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(KVTierError, match="cannot write .*x.json: No space left"):
        write_json({"a": 2}, str(tmp_path / "x.json"))
    assert list(tmp_path.iterdir()) == []


def test_a_profile_that_cannot_be_written_in_the_end_costs_no_results(capsys, monkeypatch, tmp_path):
    viztracer = pytest.importorskip("viztracer")

    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("kvtier.bench.arena.measure", lambda run, **_: [Row("arena.some", 1.0, "GB/s")])
    monkeypatch.setattr(viztracer.VizTracer, "save", full)
    assert main(["bench", "arena", "--tiny", "--profile", str(tmp_path / "p.json"), "--json", str(tmp_path / "r.json")]) == 2
    told = capsys.readouterr()
    assert f"--profile {tmp_path / 'p.json'}: No space left on device; the results are above" in told.err
    assert "arena.some" in told.out
    assert json.loads((tmp_path / "r.json").read_text())["rows"][0]["name"] == "arena.some"
