"""The tiers benchmark runs and reports every home and number of sequences with its ceiling. No figure of it is judged here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import tiers
from benchmarks.measure import Run
from benchmarks.rig import TINY_LAYOUT, PlainCopy, Room, made_kv, open_cache, restore, token_ids
from kvtier.cli import main
from kvtier.errors import KVTierError
from kvtier.memory import limits


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


def test_what_takes_more_memory_than_there_is_is_left_out_and_said_or_refused(capsys, monkeypatch):
    page, copies = TINY_LAYOUT.page_bytes, 2 * PlainCopy.memory_bytes(0)
    monkeypatch.setattr(tiers, "available_memory", lambda: limits.Room(copies + 100 * page, "of a machine"))
    assert tiers._with_memory(Run(repeats=1), (1, 2, 64), TINY_LAYOUT, 160) == [1, 2]
    assert "left out: 64 sequences at once" in capsys.readouterr().out
    with pytest.raises(KVTierError, match=r"bytes of memory are needed for one of 1600 tokens.*\(of a machine\); give shorter ones"):
        tiers._with_memory(Run(repeats=1), (1, 2), TINY_LAYOUT, 1600)


def test_a_restore_that_does_not_bring_everything_stops_the_measurement():
    ids = token_ids(0, 64)
    with open_cache(TINY_LAYOUT, Room(4, host=8)) as cache:
        cache.put(ids[:32], made_kv(TINY_LAYOUT, 32))
        with pytest.raises(KVTierError, match="only 32 of 64 tokens came back"):
            restore(cache, ids)
