"""`kvtier tune`: a file only where the second half is better, one that loads; one line for everything else."""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvtier.cli import main
from kvtier.config import load_config
from kvtier.tune.judge import Judge
from kvtier.tune.search import StudyFile, Trial


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`steady`: a text that is asked for all the time, between texts that never are again, which LFU knows and LRU does not. `turning`: a
    loop over twelve pages, which LRU is worst at, then each page twice in a row and never again, which LRU is best at."""
    path = tmp_path_factory.mktemp("traces")
    fresh = itertools.count(100)
    steady = [[0, 1, 2] if place % 3 == 0 else [next(fresh) for _ in range(6)] for place in range(120)]
    walk = [[page] for first in range(200, 296, 2) for page in (first, first + 1, first, first + 1)]
    for name, prompts in (("steady", steady), ("turning", [*([page] for _ in range(16) for page in range(12)), *walk])):
        lines = [{"timestamp": at * 1000, "input_length": 512 * len(ids), "hash_ids": ids} for at, ids in enumerate(prompts)]
        (path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "in.yaml").write_text("# mine\npolicy:\n  name: lru\nhost:\n  capacity_bytes: 2GiB\nmodel: {name: '0123'}\n")
    return path


def tune(folder: Path, out: Path, *arguments: str, trace: str = "steady") -> int:
    return main(["tune", str(folder / f"{trace}.jsonl"), "--config", str(folder / "in.yaml"), "--out", str(out), *arguments])


def test_a_better_configuration_is_written_with_its_evidence(capsys, tmp_path: Path, folder: Path):
    out, plot, target = tmp_path / "tuned.yaml", tmp_path / "p.svg", tmp_path / "t.json"
    arguments = ["--capacity", "9", "--policy", "lru,lfu,fifo", "--trials", "3", "--seed", "5", "--plot", str(plot), "--json", str(target)]
    assert tune(folder, out, *arguments) == 0
    assert "policy.name: lru -> lfu" in capsys.readouterr().out
    found: dict[str, Any] = json.loads(target.read_text())
    assert found["values"] == {"policy.name": "lfu"}
    assert (found["before"], found["seed"], found["trials"], found["written"]) == ({"policy.name": "lru"}, 5, 3, str(out))
    assert found["tuned"]["second"] > found["given"]["second"] + 0.1
    text = out.read_text()
    for half in ("first", "second"):
        assert f"{found['given'][half]:.4f}" in text
        assert f"{found['tuned'][half]:.4f}" in text
    assert "name: lfu # tuned; was lru" in text
    assert "--seed 5" in text
    assert main(["config", "check", str(out)]) == 0
    config = load_config(out, env={})
    assert config == load_config(folder / "in.yaml", env={}, overrides={"policy.name": "lfu"})
    assert "2GiB" in text
    assert plot.read_text().startswith("<?xml")


def test_write_policies_are_searched_where_tiers_are_replayed(tmp_path: Path, folder: Path):
    out = tmp_path / "tuned.yaml"
    tiers = ["--tiers", "device=7,host=3", "--policy", "lru,lfu", "--trials", "9", "--json", str(tmp_path / "t.json")]
    assert tune(folder, out, *tiers) == 0
    found = json.loads((tmp_path / "t.json").read_text())
    assert {"policy.name", "host.write_policy"} <= set(found["values"])
    assert found["cells"][0]["room"] == "device=7,host=3"
    assert load_config(out, env={}).host is not None
    assert yaml.safe_load(out.read_text())["host"]["write_policy"] == found["values"]["host.write_policy"]


def test_what_does_not_hold_on_the_second_half_is_refused(capsys, tmp_path: Path, folder: Path):
    out = tmp_path / "tuned.yaml"
    out.write_text("what was here\n")
    arguments = ["--capacity", "10", "--policy", "lru,sieve,fifo,lfu,arc,s3-fifo", "--trials", "6", "--json", "-"]
    assert tune(folder, out, *arguments, trace="turning") == 1
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["written"] is None
    assert found["gain_first"] > 0.01
    assert found["gain_second"] < 0
    assert "does not hold on the second" in " ".join(captured.err.split())
    assert out.read_text() == "what was here\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tuned.yaml", "tuned.yaml.study"]


def test_what_is_no_better_on_the_first_half_is_refused(capsys, tmp_path: Path, folder: Path):
    assert tune(folder, tmp_path / "t.yaml", "--capacity", "9", "--policy", "lru,fifo", "--trials", "2") == 1
    assert "nothing written: nothing that was tried is better than in.yaml on the first half" in capsys.readouterr().err
    assert not (tmp_path / "t.yaml").exists()


def test_a_second_run_goes_on_and_another_question_is_refused(capsys, tmp_path: Path, folder: Path):
    out, target = tmp_path / "tuned.yaml", tmp_path / "t.json"
    arguments = ["--capacity", "9", "--policy", "lru,fifo,lfu", "--json", str(target)]
    assert tune(folder, out, *arguments, "--trials", "2") == 1
    assert tune(folder, out, *arguments, "--trials", "3") == 0
    assert "3 trials, 1 of them now" in capsys.readouterr().out
    before = out.read_text()
    assert tune(folder, out, "--capacity", "8", "--policy", "lru,fifo,lfu") == 2
    assert "begun with other rooms; remove it to start anew" in capsys.readouterr().err
    assert tune(folder, out, *arguments, trace="turning") == 2
    assert "begun with other traces" in capsys.readouterr().err
    assert out.read_text() == before


def test_figures_that_do_not_come_out_again_are_refused(capsys, tmp_path: Path, folder: Path, monkeypatch):
    arguments = ["--capacity", "9", "--policy", "lru,fifo,lfu", "--trials", "3"]
    assert tune(folder, tmp_path / "t.yaml", *arguments) == 0
    before = StudyFile.trials
    monkeypatch.setattr(StudyFile, "trials", lambda self: [Trial(trial.raw, trial.ratio + 0.01) for trial in before(self)])
    assert tune(folder, tmp_path / "t.yaml", *arguments) == 2
    assert "does not come out again" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on_and_writes_nothing(capsys, tmp_path: Path, folder: Path, monkeypatch):
    calls = iter(range(9))
    before = Judge.first_half

    def interrupted(self: Judge, *arguments: Any) -> float:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return before(self, *arguments)

    monkeypatch.setattr(Judge, "first_half", interrupted)
    assert tune(folder, tmp_path / "t.yaml", "--capacity", "9", "--policy", "lru,fifo,lfu", "--trials", "3") == 130
    assert "interrupted: 2 trials are in" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.yaml.study"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "how many pages of the trace do the tiers hold.*--capacity.*--tiers.*--page-bytes"),
        (["--capacity", "5%", "--tiers", "device=1%,host=2%"], "--capacity and --tiers both say"),
        (["--capacity", "500%"], "at most 100%"),
        (["--capacity", "99999"], "distinct pages; expected at most as many"),
        (["--capacity", "5%", "--policy", "mru"], "unknown eviction policy 'mru'; known: a2cr"),
        (["--capacity", "5%", "--policy", "a2cr"], "a2cr has no parameters"),
        (["--capacity", "5%", "--time-limit", "soon"], "--time-limit soon: expected a time"),
        (["--capacity", "5%", "--time-limit", "0s"], "--time-limit 0s"),
        (["--page-bytes", "much"], "--page-bytes much"),
        (["--page-bytes", "0"], "expected more than 0"),
        (["--tiers", "device=1%,disk=2%"], "the configuration has no disk"),
        (["--capacity", "5%", "--config", "/nonexistent.yaml"], "no such configuration file"),
        (["--capacity", "5%", "--study", "/nonexistent/s"], "cannot write the study"),
        (["--capacity", "5%", "--out", "/nonexistent/out.yaml"], "--out /nonexistent/out.yaml: expected a file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, tmp_path: Path, folder: Path, arguments, expected):
    assert tune(folder, tmp_path / "t.yaml", *arguments) == 2
    told = capsys.readouterr().err
    assert re.search(expected, told)
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "t.yaml").exists()


def test_the_input_is_never_overwritten_and_somewhere_to_write_is_needed(capsys, folder: Path):
    assert tune(folder, folder / "in.yaml", "--capacity", "5%") == 2
    assert "is the --config; name another file" in capsys.readouterr().err
    assert main(["tune", str(folder / "steady.jsonl"), "--capacity", "5%"]) == 2
    assert "give --out FILE" in capsys.readouterr().err


def test_without_optuna_the_extra_is_named_before_the_work(capsys, tmp_path: Path, folder: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setattr("kvtier.cli.tune.read_traces", pytest.fail)
    assert tune(folder, tmp_path / "t.yaml", "--capacity", "5%") == 2
    assert "pip install 'kvtier[tune]'" in capsys.readouterr().err
