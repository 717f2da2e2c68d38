"""The tiers benchmark runs and reports every home and number of sequences with its ceiling. No figure of it is judged here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import tiers
from benchmarks.measure import Run
from benchmarks.rig import TINY_LAYOUT, Room, made_kv, open_cache, restore, token_ids
from kvtier.cli import main
from kvtier.errors import KVTierError


def test_a_tiny_run_reports_offload_and_restore(capsys, tmp_path: Path):
    plot, folder = tmp_path / "plot.svg", tmp_path / "disk"
    folder.mkdir()
    assert main(["bench", "tiers", "--tiny", "--repeats", "1", "--path", str(folder), "--json", "-", "--plot", str(plot)]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in result["rows"]}
    cells = [f"{home}.{sequences}seqs" for home in ("host", "disk") for sequences in (1, 4)]
    speeds = {f"tiers.{what}.{cell}{kind}" for what in ("offload", "restore") for cell in cells for kind in ("", ".tokens")}
    assert set(rows) == speeds | {f"tiers.restore.{cell}.{percentile}" for cell in cells for percentile in ("p50", "p95")}
    for name, row in rows.items():
        assert row["value"] > 0, name
        assert row["ratio"] == pytest.approx(row["value"] / row["ceiling"])
    assert {"cpu", "cores", "torch"} <= result["machine"].keys()
    assert list(folder.iterdir()) == []
    assert plot.read_text().startswith("<?xml")


def test_sequences_shorter_than_a_page_are_one_clear_error():
    with pytest.raises(KVTierError, match="--sequence-tokens 8: expected at least one page, 16 tokens"):
        tiers.measure(Run(repeats=1), sequence_tokens=8)


def test_a_restore_that_does_not_bring_everything_stops_the_measurement():
    ids = token_ids(0, 64)
    with open_cache(TINY_LAYOUT, Room(4, host=8)) as cache:
        cache.put(ids[:32], made_kv(TINY_LAYOUT, 32))
        with pytest.raises(KVTierError, match="only 32 of 64 tokens came back"):
            restore(cache, ids)
