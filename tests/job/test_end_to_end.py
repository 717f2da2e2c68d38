"""The main job on the real model, small: the checks pass, every tier worked, and a broken promise is noticed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from kvtier.cli import main

SMALL = [
    "--sessions=4",
    "--turns=2",
    "--context-tokens=192",
    "--question-tokens=16",
    "--new-tokens=4",
    "--probe-tokens=48",
    "--device-share=0.4",
    "--host-share=0.4",
]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def kvtier(*arguments, timeout=1500):
    return subprocess.run([sys.executable, "-m", "kvtier", *arguments], capture_output=True, text=True, timeout=timeout, check=False)


def test_quantized_profile_end_to_end(tmp_path):
    report = tmp_path / "report.html"
    done = kvtier("run", *SMALL, "--json", "-", "--report", str(report))
    result = json.loads(done.stdout)
    failed = [check for check in result["checks"] if not check["passed"] and not check["name"].startswith("restoring is faster")]
    assert not failed, done.stderr
    assert result["tokens_identical"] is True
    for name, tier in result["tiers"].items():
        assert tier["pages_in"] > 0, name
        assert tier["pages_served"] > 0, name
        assert tier["bytes_used"] <= tier["capacity_bytes"]
    assert {tier["format"] for tier in result["tiers"].values()} == {"raw", "q8", "q4"}
    assert result["lossless"]["tiers"]["disk"]["pages_served"] > 0
    assert 0 < result["quality"]["kl"] < 0.05
    assert result["quality"]["scored_tokens"] == 4 * 47
    assert result["links"]["disk->device"]["bytes"] > 0
    assert result["ttft_ms"]["restored"]["count"] == result["ttft_ms"]["recomputed"]["count"] == 4
    assert all(row["restored_tokens"] == row["expected_tokens"] > 0 for row in result["turns"] if row["turn"])
    assert "<svg" in report.read_text()


def test_lossless_profile_end_to_end(tmp_path):
    target = tmp_path / "result.json"
    done = kvtier("run", *SMALL, "--config", "configs/lossless.yaml", "--json", str(target))
    result = json.loads(target.read_text())
    assert result["tokens_identical"] is True, done.stdout + done.stderr
    assert result["quality"]["kl"] == pytest.approx(0, abs=1e-6)
    assert result["quality"]["top1_agreement"] == 1.0
    assert result["tiers"]["disk"]["format"] == "raw+zstd"


def test_a_profile_that_damages_the_model_fails_the_run(tmp_path, monkeypatch):
    """The perplexity check can fail: with a format that loses everything, it does."""
    from kvtier.config import resolve_config
    from kvtier.engines.models import load_model
    from kvtier.formats import BlockFormat
    from kvtier.job.job import run_job
    from kvtier.job.workload import Size

    really = BlockFormat.decode

    def lose(self, payloads, layout, layers=slice(None), out=None, rows=None):
        pages = really(self, payloads, layout, layers, out, rows)
        if self.name == "q4":
            pages[list(range(len(payloads)) if rows is None else rows)] = 0
        return pages

    monkeypatch.setattr(BlockFormat, "decode", lose)
    monkeypatch.setattr(BlockFormat, "receiver", lambda *_: None)  # which decodes, too
    size = Size(
        sessions=4, turns=2, context_tokens=192, question_tokens=16, new_tokens=4, probe_tokens=48, device_share=0.4, host_share=0.4
    )
    result = run_job(load_model(), size, resolve_config(env={}, base={"disk": {"path": "x"}}), tmp_path, lambda *_: None)
    assert not result["passed"]
    assert [check["passed"] for check in result["checks"] if check["name"].startswith("perplexity")] == [False]
    assert result["tokens_identical"] is True


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "/nowhere"], "no config.json"),
        (["--sessions", "1"], "expected at least 2"),
        (["--device-share", "0.05"], "not even one session"),
        (["--set", "host.capacity=1GiB"], "host.capacity_bytes"),
        (["--report", "/nowhere/report.html"], "/nowhere/report.html"),
        (["--json", "/nowhere/result.json"], "/nowhere/result.json"),
        (["--sessions", "4000"], "too little text"),
        (["--set", "host.capacity_bytes=10"], "host.capacity_bytes"),
        (["--context-tokens", "20000", "--sessions", "2"], "positions"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, said):
    assert main(["run", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()[-1].split("kvtier: error: ")) == 2
    assert "Traceback" not in error
