"""The study: goes on where it ended, whatever ended it; ends when it should; belongs to one question and one process."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvtier.errors import KVTierError
from kvtier.tune.search import StudyFile
from kvtier.tune.space import Raw
from tests.tune.rig import CONFIG, QUESTION, SPACE, made_of, quietly, search

TRIALS = 16
FIRST = len(SPACE.first_points(CONFIG))
"""Trials before the optimiser has a say."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[Raw]:
    return [trial.raw for trial in search(tmp_path_factory.mktemp("study") / "s", TRIALS).trials]


def test_a_second_run_goes_on_and_tries_what_the_first_would_have(tmp_path: Path, uninterrupted):
    assert FIRST < 8 < TRIALS
    for trials in (3, 8, TRIALS):
        outcome = search(tmp_path / "s", trials)
        assert [trial.raw for trial in outcome.trials] == uninterrupted[:trials]
        assert outcome.ended == f"{trials} trials"
    assert outcome.replayed == TRIALS - 8
    assert search(tmp_path / "s", TRIALS).replayed == 0


@pytest.mark.parametrize("calls", [2, FIRST + 3])
def test_a_study_survives_kill_9_in_the_middle_of_a_trial(tmp_path: Path, uninterrupted, calls):
    program = f"""
import itertools, os, pathlib, signal
from tests.tune.rig import made_of, search
count = itertools.count()
def judge(raw, step):
    if next(count) == {calls}:
        os.kill(os.getpid(), signal.SIGKILL)
    return made_of(raw, step)
search(pathlib.Path({str(tmp_path / "s")!r}), {TRIALS}, judge)
"""
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == -signal.SIGKILL
    outcome = search(tmp_path / "s", TRIALS)
    assert [trial.raw for trial in outcome.trials] == uninterrupted
    assert outcome.replayed == TRIALS - calls


def test_an_interrupted_search_keeps_what_it_finished(tmp_path: Path, uninterrupted):
    count = itertools.count()

    def judge(raw: Raw, step: Callable[[float], None]) -> float:
        if next(count) == FIRST + 1:
            raise KeyboardInterrupt
        return made_of(raw, step)

    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "s", TRIALS, judge)
    assert [trial.raw for trial in search(tmp_path / "s", TRIALS).trials] == uninterrupted


def test_the_time_limit_ends_a_trial_under_way_and_the_next_run_does_it_again(tmp_path: Path, uninterrupted):
    now = 0.0

    def judge(raw: Raw, step: Callable[[float], None]) -> float:
        nonlocal now
        now += 4.0
        step(0.4)
        now += 6.0
        return made_of(raw, step)

    points = SPACE.first_points(CONFIG)
    with StudyFile(tmp_path / "s", QUESTION, 0) as study:
        outcome = study.search(SPACE, points, judge, TRIALS, 23.0, quietly, clock=lambda: now)
    assert outcome.ended == "time limit"
    assert len(outcome.trials) == 2
    assert now == 24.0
    with StudyFile(tmp_path / "s", QUESTION, 0) as study:
        outcome = study.search(SPACE, points, judge, TRIALS, None, quietly, clock=lambda: now)
    assert [trial.raw for trial in outcome.trials] == uninterrupted


def test_without_one_trial_there_is_no_best(tmp_path: Path):
    now = itertools.count()
    with StudyFile(tmp_path / "s", QUESTION, 0) as study:
        outcome = study.search(SPACE, SPACE.first_points(CONFIG), made_of, TRIALS, 1.0, quietly, clock=lambda: next(now))
    with pytest.raises(KVTierError, match="give --time-limit more"):
        outcome.best  # noqa: B018


def test_no_point_is_replayed_twice_and_the_best_is_the_best(tmp_path: Path):
    seen: list[str] = []

    def judge(raw: Raw, step: Callable[[float], None]) -> float:
        seen.append(repr(sorted(raw.items())))
        return made_of(raw, step)

    outcome = search(tmp_path / "s", 30, judge)
    assert len(set(seen)) == len(seen) == outcome.replayed
    assert outcome.best.ratio == max(trial.ratio for trial in outcome.trials)


def test_a_space_that_is_used_up_ends_the_search(tmp_path: Path):
    from kvtier.tune.space import Space

    space = Space(("lru", "fifo"), (), 0.6)
    with StudyFile(tmp_path / "s", QUESTION, 0) as study:
        outcome = study.search(space, space.first_points(CONFIG), made_of, 10, None, quietly)
    assert outcome.ended == "nothing new to try"
    assert [trial.raw["policy.name"] for trial in outcome.trials] == ["lru", "fifo"]


def test_a_study_of_another_question_is_refused_by_name(tmp_path: Path):
    search(tmp_path / "s", 2)
    with pytest.raises(KVTierError, match="begun with other traces; remove it"):
        StudyFile(tmp_path / "s", QUESTION | {"traces": "b"}, 0)


def test_a_study_in_use_is_refused(tmp_path: Path):
    with StudyFile(tmp_path / "s", QUESTION, 0), pytest.raises(KVTierError, match="in use by another kvtier tune"):
        StudyFile(tmp_path / "s", QUESTION, 0)


@pytest.mark.parametrize(("name", "expected"), [("s", "is no study of kvtier tune"), ("none/s", "cannot write the study")])
def test_what_is_no_study_is_refused_and_left_as_it_is(tmp_path: Path, name, expected):
    (tmp_path / "s").write_text("my notes\n" * 100)
    with pytest.raises(KVTierError, match=expected):
        StudyFile(tmp_path / name, QUESTION, 0)
    assert (tmp_path / "s").read_text() == "my notes\n" * 100
