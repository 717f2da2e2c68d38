"""The no-reuse benchmark does work in every tier, finds nothing, and reports both ways. No figure of it is judged here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import no_reuse
from benchmarks.measure import Run
from benchmarks.rig import TINY_LAYOUT, Room, open_cache
from kvtier.cli import main
from kvtier.errors import KVTierError


def test_a_tiny_run_moves_every_page_down_and_reports_both_ways(capsys, tmp_path: Path):
    plot, folder = tmp_path / "plot.svg", tmp_path / "disk"
    folder.mkdir()
    assert main(["bench", "no-reuse", "--tiny", "--repeats", "2", "--path", str(folder), "--json", "-", "--plot", str(plot)]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in result["rows"]}
    assert result["bench"] == "no-reuse"
    figures = {"overhead", "overhead.cpu", "cache_cpu", "caller", "seconds", "cpu_seconds", "pages.device", "pages.host", "pages.disk"}
    assert set(rows) == {f"no-reuse.{figure}" for figure in figures}
    assert rows["no-reuse.overhead"]["unit"] == "share"
    for figure in ("seconds", "cpu_seconds"):
        row = rows[f"no-reuse.{figure}"]
        assert row["ratio"] == pytest.approx(row["value"] / row["ceiling"])
    assert rows["no-reuse.pages.device"]["value"] == (64 + 20) // TINY_LAYOUT.page_tokens, "all full pages are committed"
    assert rows["no-reuse.pages.host"]["value"] > 0
    assert rows["no-reuse.pages.disk"]["value"] > 0
    assert list(folder.iterdir()) == []
    assert plot.read_text().startswith("<?xml")


def test_a_request_that_is_found_stops_the_measurement():
    engine = no_reuse.SyntheticEngine(TINY_LAYOUT, 64, 4, 64)
    with open_cache(TINY_LAYOUT, Room(16)) as cache:
        assert engine.play(1, cache) > 0
        with pytest.raises(KVTierError, match="64 tokens of a request that is new were found"):
            engine.play(1, cache)


def test_a_device_without_room_stops_the_measurement():
    engine = no_reuse.SyntheticEngine(TINY_LAYOUT, 64, 4, 64)
    with open_cache(TINY_LAYOUT, Room(2)) as cache, pytest.raises(KVTierError, match="no room for one request"):
        engine.play(1, cache)


@pytest.mark.parametrize("arguments", [("--model", "/nonexistent"), ("--path", "/nonexistent")])
def test_bad_input_is_one_line_and_exit_code_2(capsys, arguments):
    assert main(["bench", "no-reuse", "--tiny", *arguments]) == 2
    err = capsys.readouterr().err
    assert arguments[0] in err
    assert "Traceback" not in err


def test_a_request_without_tokens_is_refused():
    with pytest.raises(KVTierError, match="--prompt-tokens 0"):
        no_reuse.measure(Run(repeats=1, tiny=True), prompt_tokens=0)
