"""The codec benchmark runs and reports every row with its ceiling. No figure of it is judged here."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from kvtier.cli.app import app
from kvtier.cli.bench import app as bench


@pytest.mark.slow
def test_tiny_run_reports_every_row(tmp_path):
    target = tmp_path / "rows.json"
    done = CliRunner().invoke(bench, ["codecs", "--tiny", "--repeats", "1", "--formats", "q8,q4", "--json", str(target)])
    assert done.exit_code == 0, done.output
    rows = {row["name"]: row for row in json.loads(target.read_text())["rows"]}
    for name in ("q8", "q4"):
        for what in ("encode", "decode"):
            for suffix in ("", ".2threads", ".2threads.copy", ".1page", ".torch"):
                assert rows[f"{name}.{what}{suffix}"]["ratio"] > 0
        assert {f"{name}.encode+checksum", f"{name}.encode+checksum.share", f"{name}.checksum"} <= rows.keys()
    assert "native codecs" in done.output


@pytest.mark.parametrize("options", [("--layout", "gpt"), ("--formats", "q8,q5"), ("--size-bytes", "much")])
def test_bad_input_is_an_error_that_names_it(options):
    done = CliRunner().invoke(app, ["bench", "codecs", "--tiny", *options])
    assert done.exit_code != 0
    assert options[1].split(",")[-1] in str(done.exception)
