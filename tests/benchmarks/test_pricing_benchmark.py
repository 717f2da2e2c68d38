"""The pricing benchmark runs and reports every engine with its ceiling. No figure of it is judged here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvtier.cli import main


def test_a_tiny_run_reports_every_engine_and_leaves_nothing(capsys, tmp_path: Path):
    plot, folder = tmp_path / "plot.svg", tmp_path / "disk"
    folder.mkdir()
    assert main(["bench", "pricing", "--tiny", "--repeats", "1", "--path", str(folder), "--json", "-", "--plot", str(plot)]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert set(rows) == {f"pricing.x{ratio}{what}" for ratio in ("0.25", "4") for what in ("", ".restored")}
    for name, row in rows.items():
        if name.endswith(".restored"):
            assert 0 <= row["value"] <= 1
        else:
            assert row["ratio"] == pytest.approx(row["value"] / row["ceiling"])
    assert list(folder.iterdir()) == []
    assert plot.read_text().startswith("<?xml")
