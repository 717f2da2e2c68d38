"""The benchmark of engines starts, asks, restarts and stops real ones, and says what each showed. No figure of it is judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import engines
from benchmarks.contestants import LAYOUT
from benchmarks.serving import Answer
from benchmarks.workloads import Request
from kvtier.cli import main
from kvtier.errors import KVTierError
from tests.benchmarks.test_leash import MARK, marked, soon


@pytest.mark.timeout(900)  # three engines start, one after the other
def test_a_tiny_run_finds_everything_again_and_reports_beside_a_plain_engine(capsys, tmp_path):
    arguments = ["--tiny", "--systems", "plain,kvtier-q8", "--workload", "documents,agent", "--path", str(tmp_path), "--json", "-"]
    assert main(["bench", "engines", *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = {row["name"].removeprefix("engines."): row for row in result["rows"]}
    assert result["bench"] == "engines"
    for case in ("own", "ram", "restart", "disk"):
        assert rows[f"kvtier-q8.documents.{case}.hit_tokens"]["value"] == 384
        assert rows[f"kvtier-q8.agent.{case}.hit_tokens"]["value"] >= 128
        assert rows[f"kvtier-q8.documents.{case}"]["ceiling"] == rows["plain.documents.own"]["value"] > 0
    assert rows["plain.documents.ram.hit_tokens"]["value"] == 0
    assert rows["kvtier-q8.disk_bytes"]["value"] > 4 * 3 * LAYOUT.page_bytes // 4, "four documents of three pages, in 8 bits"
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_that_kvtier_does_not_find_stops_the_measurement_and_others_are_marked():
    back, late = Request("ram", [7] * 400, 390), Answer(1.9, 2.0, 0, 8)
    for name in ("kvtier-q8", "lmcache-fs"):
        for request, answer in ((back, Answer(0.1, 0.2, 384, 8)), (Request("cold", [7] * 400, 0), late)):
            assert engines.checked(name, "documents", request, answer) == answer
    with pytest.raises(KVTierError, match="kvtier-q8, documents, ram: 0 tokens of a prompt were found, of 390"):
        engines.checked("kvtier-q8", "documents", back, late)
    assert engines.checked("lmcache-fs", "documents", back, late).missed


@pytest.mark.timeout(600)  # two engines and a server start
def test_a_run_that_is_killed_while_it_starts_its_systems_leaves_nothing(tmp_path):
    options = ["--tiny", "--systems", "plain,lmcache-fs", "--workload", "documents", "--path", str(tmp_path)]
    with subprocess.Popen([sys.executable, "-m", "kvtier", "bench", "engines", *options], env=os.environ | {MARK: str(tmp_path)}) as run:
        while not list(tmp_path.glob("*/lmcache-fs.log")):
            assert run.poll() is None
            time.sleep(0.1)
        assert any("lmcache" in Path(f"/proc/{number}/cmdline").read_text() for number in marked(tmp_path)), "its server runs"
        run.kill()
    assert soon(lambda: not marked(tmp_path))
    assert soon(lambda: not list(tmp_path.iterdir()))
    assert not list(Path("/dev/shm").glob(f"*kvtier-bench-{run.pid}*"))
