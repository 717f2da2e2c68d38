"""The links benchmark runs and reports every link, size and figure with its ceiling. No figure of it is judged here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import links
from benchmarks.measure import Run
from kvtier.cli import main
from kvtier.errors import KVTierError

LINKS = ("device->host", "host->device", "device->disk", "disk->device", "host->disk")


@pytest.mark.slow
def test_a_tiny_run_reports_every_link_and_leaves_nothing(capsys, tmp_path: Path):
    plot, folder = tmp_path / "plot.svg", tmp_path / "disk"
    folder.mkdir()
    assert main(["bench", "links", "--tiny", "--repeats", "1", "--path", str(folder), "--json", "-", "--plot", str(plot)]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    expected = {f"links.{link}.{size}.{what}" for link in LINKS for size in ("1page", "1MiB") for what in ("encoded", "page", "p50", "p99")}
    restores = {f"restore.disk->device{form}{what}" for form in ("", ".q8", ".raw") for what in ("", ".bare", ".ms")}
    assert set(rows) == expected | restores
    for name, row in rows.items():
        assert row["value"] > 0, name
        assert row["ceiling"] is None or row["ratio"] == pytest.approx(row["value"] / row["ceiling"])
    for link in LINKS:
        for size in ("1page", "1MiB"):
            whole, encoded = rows[f"links.{link}.{size}.page"], rows[f"links.{link}.{size}.encoded"]
            bits = 16 * encoded["value"] / whole["value"]
            assert 7.9 < bits < 8.7 if link in ("device->host", "host->device") else 4.0 < bits < 5.5, "copies are q8 and q4, counted once"
            assert rows[f"links.{link}.{size}.p50"]["value"] <= rows[f"links.{link}.{size}.p99"]["value"]
    bytes_of = {
        form: rows[f"restore.disk->device{form}"]["value"] * rows[f"restore.disk->device{form}.ms"]["value"] for form in ("", ".q8", ".raw")
    }
    assert 1.6 < bytes_of[".q8"] / bytes_of[""] < 2.1 < 3.2 < bytes_of[".raw"] / bytes_of[""] < 4.1, "each is in its own bytes"
    assert list(folder.iterdir()) == []
    assert plot.read_text().startswith("<?xml")


def test_without_fio_the_bare_pool_is_the_ceiling(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    rows = {row.name: row for row in links.measure(Run(repeats=1, tiny=True), path=tmp_path)}
    assert rows["restore.disk->device"].ceiling == rows["restore.disk->device.bare"].value
    assert rows["restore.disk->device.bare"].ceiling is None


def test_an_unknown_layout_or_directory_is_one_clear_error(capsys, tmp_path: Path):
    with pytest.raises(KVTierError, match="--layout gpt: unknown; choose one of smollm2, llama"):
        links.measure(Run(repeats=1, tiny=True), "gpt")
    assert main(["bench", "links", "--tiny", "--path", str(tmp_path / "missing")]) == 2
    assert "--path" in capsys.readouterr().err
