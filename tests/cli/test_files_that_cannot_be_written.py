"""What a long command cannot write in the end is told before it begins."""

from __future__ import annotations

import builtins

import pytest

from benchmarks import arena
from kvtier.cli import main


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
