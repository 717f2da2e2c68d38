"""The tier benchmark runs and reports every link with its ceiling. No figure of it is judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "tiers.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_tiny_run_reports_every_link(tmp_path: Path) -> None:
    config, plot = tmp_path / "config.yaml", tmp_path / "plot.svg"
    config.write_text("host: {format: raw}\n")
    done = run("--tiny", "--pages", "4", "--repeats", "1", "--config", str(config), "--json", "-", "--plot", str(plot))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    names = [
        f"tiny {link} {what}" for link in ("device->host", "host->device", "host->disk", "disk->device") for what in ("page", "encoded")
    ]
    assert [row["name"] for row in result["rows"]] == names
    for row in result["rows"]:
        assert row.keys() >= {"name", "value", "unit", "ceiling", "ratio"}
        assert row["value"] > 0
        assert row["ratio"] == pytest.approx(row["value"] / row["ceiling"])
    assert {"cpu", "cores", "torch"} <= result["machine"].keys()
    assert "device->host" in done.stderr
    assert plot.read_text().startswith("<?xml")


@pytest.mark.parametrize("arguments", [("--pages", "0"), ("--config", "/nonexistent.yaml"), ("--json", "/nonexistent/file")])
def test_bad_input_is_one_line_and_exit_code_2(arguments: tuple[str, ...]) -> None:
    done = run("--tiny", *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
