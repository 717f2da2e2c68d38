"""The benchmark of engines refuses what it cannot do before it starts any, and compares like with like. Real ones: `tests/engines_real`."""

from __future__ import annotations

import importlib.util

import pytest

from benchmarks import engines
from benchmarks.engines import Seen
from benchmarks.measure import Run
from benchmarks.serving import Answer, drop_from_page_cache
from kvtier.cli import main
from kvtier.errors import KVTierError

ALONE = importlib.util.find_spec("vllm") is None


@pytest.mark.skipif(not ALONE, reason="vLLM is here")
def test_without_vllm_it_is_one_line_that_names_the_environment(capsys):
    assert main(["bench", "engines", "--tiny"]) == 2
    err = capsys.readouterr().err
    assert "vLLM is not installed" in err
    assert "make test-engines" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"systems": ["kvtier-q9"]}, "--systems kvtier-q9: expected some of plain"),
        ({"cases": ["chat"]}, "--cases chat: expected some of documents"),
        ({"documents": 3}, "--documents 3"),
        ({"rounds": 1}, "--rounds 1"),
        ({"document_tokens": 100}, "--document-tokens 100"),
    ],
)
def test_options_that_make_no_sense_are_refused(monkeypatch, options, says):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    with pytest.raises(KVTierError, match=says):
        engines.measure(Run(1), **options)


def seen(ram: float, disk: float, disk_bytes: int) -> Seen:
    def answers(seconds: float) -> list[Answer]:
        return [Answer(seconds * factor, 2 * seconds, 256) for factor in (0.5, 1, 9)]

    return Seen(answers(1.0), answers(ram), answers(disk), 3.0, disk_bytes, [(1.02, 1.1), (1.04, 1.3), (1.03, 1.2)])


def test_kvtier_is_compared_with_the_better_peer_of_each_case_and_with_the_floor():
    found = {"vllm-fs": seen(0.2, 0.3, 100), "lmcache-fs": seen(0.1, 0.4, 80), "kvtier-q8": seen(0.05, 0.6, 40)}
    rows = {row.name.removeprefix("engines."): row for row in engines.rows({"floor": Seen(ram=[Answer(0.04, 0.1, 256)])} | found)}
    assert rows["kvtier-q8.ram"].value == 0.05
    assert rows["kvtier-q8.ram"].ceiling == 0.04
    assert rows["kvtier-q8.ram.to_peer"].value == pytest.approx(0.05 / 0.1)
    assert rows["kvtier-q8.disk.to_peer"].value == pytest.approx(0.6 / 0.3)
    assert rows["kvtier-q8.disk_bytes"].ratio == pytest.approx(40 / 80)
    assert rows["kvtier-q8.no_reuse"].value == pytest.approx(0.03)
    assert rows["kvtier-q8.no_reuse.cpu"].value == pytest.approx(0.2)
    assert "vllm-fs.ram.to_peer" not in rows


def test_dropping_files_from_the_page_cache_keeps_their_contents(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(b"x" * 10000)
    drop_from_page_cache(tmp_path)
    assert (tmp_path / "a" / "file").read_bytes() == b"x" * 10000
