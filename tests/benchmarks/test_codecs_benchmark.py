"""The codec benchmark runs and reports every row with its ceiling. No figure of it is judged here."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import codecs
from benchmarks.measure import Run
from kvtier.cli import main
from kvtier.cli.app import app
from kvtier.cli.bench import app as bench
from kvtier.errors import KVTierError
from kvtier.memory.limits import Room


@pytest.mark.slow
def test_tiny_run_reports_every_row(tmp_path):
    target = tmp_path / "rows.json"
    done = CliRunner().invoke(bench, ["codecs", "--tiny", "--repeats", "1", "--formats", "q8,q4,q8/q4", "--json", str(target)])
    assert done.exit_code == 0, done.output
    rows = {row["name"]: row for row in json.loads(target.read_text())["rows"]}
    for name in ("q8", "q4", "q8/q4"):
        for what in ("encode", "decode"):
            for suffix in ("", ".2threads", ".2threads.copy", ".2threads.compute", ".1page", ".1page.cold", ".torch"):
                assert rows[f"{name}.{what}{suffix}"]["ratio"] > 0
        assert {f"{name}.encode+checksum{suffix}" for suffix in ("", ".share", ".1page", ".1page.cold")} <= rows.keys()
        assert f"{name}.checksum" in rows
    assert "native codecs" in done.output


@pytest.mark.parametrize("options", [("--layout", "gpt"), ("--formats", "q8,q5"), ("--size-bytes", "much")])
def test_bad_input_is_an_error_that_names_it(options):
    done = CliRunner().invoke(app, ["bench", "codecs", "--tiny", *options])
    assert done.exit_code != 0
    assert options[1].split(",")[-1] in str(done.exception)


@pytest.mark.slow
def test_formats_are_named_as_in_the_configuration(tmp_path):
    target = tmp_path / "rows.json"
    names = "raw+zstd, q4;0-1:q8,q4;29:q8,q8/q4+lz4"
    assert main(["bench", "codecs", "--tiny", "--repeats", "1", "--formats", names, "--json", str(target)]) == 0
    rows = {row["name"]: row for row in json.loads(target.read_text())["rows"]}
    for name in map(str.strip, names.split(",")):
        assert rows[f"{name}.encode"]["ratio"] > 0
        assert rows[f"{name}.decode.2threads"]["ratio"] > 0
        assert rows[f"{name}.encode+checksum"]["ratio"] > 0
        assert (f"{name}.encode.torch" in rows) == ("+" not in name)
        assert (f"{name}.decode.1page" in rows) == ("29" not in name)


def test_a_byte_stage_is_undone_within_the_time():
    pages = codecs.make_pages(codecs.SMALL, 3)
    bench = codecs._bench("raw+zstd", codecs.SMALL, pages, torch.zeros_like(pages))
    bench.encode()
    assert max(map(len, bench.payloads)) < codecs.SMALL.page_bytes
    bench.decode()
    assert torch.equal(bench.target, pages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--size-bytes", "1TiB"), r"--size-bytes 1099511627776: \d+ bytes of memory are needed .* \d+ can be had .*; give at most \d+"),
        (("--size-bytes", "0"), "--size-bytes 0: two threads take a page each, 737280 bytes of smollm2; give at least that"),
        (("--size-bytes", "1"), "--size-bytes 1: two threads take a page each"),
        (("--formats", ""), "--formats: page format '': it is empty; known: raw"),
        (("--formats", "q8/q5"), "--formats: unknown page format 'q8/q5': 'q5' is no codec; did you mean"),
        (("--formats", "q8,"), "--formats: page format '': it is empty"),
        (("--formats", "q8,raw+zsdt"), "--formats: page format 'raw.zsdt': no byte stage is called 'zsdt'; known: lz4, zstd"),
        (("--formats", "q4;30:q8"), "--formats: format q4;30:q8: names layer 30, but the page layout has layers 0 to 29"),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_exit_code_2(capsys, options, message):
    assert main(["bench", "codecs", *options]) == 2
    err = capsys.readouterr().err
    assert re.search(message, " ".join(err.split()))
    assert "Traceback" not in err


def test_memory_is_asked_for_before_any_is_taken(monkeypatch):
    monkeypatch.setattr(codecs, "available_memory", lambda: Room(256 << 20, "as in a small container"))
    monkeypatch.setattr(codecs, "make_pages", lambda *_: pytest.fail("memory was taken"))
    with pytest.raises(KVTierError, match="268435456 can be had"):
        codecs.measure(Run(1))


def test_payloads_lie_as_the_slots_of_host_memory_do():
    room = codecs._room(3, 100)
    assert [(place.ctypes.data % codecs.LINE_BYTES, place.size) for place in room] == [(0, 100)] * 3
    assert {after.ctypes.data - place.ctypes.data for place, after in pairwise(room)} == {2 * codecs.LINE_BYTES}
