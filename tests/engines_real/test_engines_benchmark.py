"""The benchmark of engines starts, asks, restarts and stops real ones, and says what each showed. No figure of it is judged here."""

from __future__ import annotations

import json

import pytest

from benchmarks import engines
from benchmarks.serving import Answer
from kvtier.cli import main
from kvtier.errors import KVTierError


@pytest.mark.timeout(900)  # three engines start, one after the other
def test_a_tiny_run_finds_every_document_again_and_reports_beside_the_floor(capsys, tmp_path):
    arguments = ["--tiny", "--systems", "floor,kvtier-q8", "--cases", "documents", "--path", str(tmp_path), "--json", "-"]
    assert main(["bench", "engines", *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = {row["name"].removeprefix("engines."): row for row in result["rows"]}
    assert result["bench"] == "engines"
    assert rows["kvtier-q8.ram.hit_tokens"]["value"] == rows["kvtier-q8.disk.hit_tokens"]["value"] == 384
    for case in ("cold", "ram", "disk"):
        assert rows[f"kvtier-q8.{case}"]["ceiling"] == rows["floor.ram"]["value"] > 0
    assert rows["kvtier-q8.disk_bytes"]["value"] > 4 * 3 * engines.BLOCK_BYTES // 4, "four documents of three pages, in 8 bits"
    assert list(tmp_path.iterdir()) == []


def test_a_document_that_is_not_found_stops_the_measurement():
    engines.check("kvtier-q8", [Answer(0.1, 0.2, 384)])
    with pytest.raises(KVTierError, match="was not found"):
        engines.check("kvtier-q8", [Answer(0.1, 0.2, 384), Answer(1.9, 2.0, 0)])
