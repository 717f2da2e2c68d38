"""The search: optuna proposes, the judge replays, and every answer is in the study file before the next question.

The study file is SQLite, written in transactions, so it survives whatever ends the process; the same command goes on where it ended, and
proposes what it would have proposed then (each proposal has a seed of its own, and depends on finished trials only). It belongs to one
question: these traces, configuration, rooms, choices and seed. A lock on the file keeps a second process out.

The thread that calls owns everything here.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kvtier.errors import KVTierError, needing
from kvtier.tune.space import Choice, Number, Raw, Space

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.storages import RDBStorage

NAME = "kvtier tune"
MOST_REPEATS = 200
"""Proposals in a row that were tried before, after which there is nothing new to expect."""
RANDOM_TRIALS = 10
"""Finished trials before the optimiser goes by them."""

Progress = Callable[[int, float, float | None], None]
"""(trials done, share of the one under way, best ratio so far)."""


class OutOfTime(Exception):
    """Raised within a trial when the time is over; the trial is not counted."""


@dataclass(frozen=True)
class Trial:
    """A point that was replayed, and the mean token hit ratio it found on the first halves."""

    raw: Raw
    ratio: float


@dataclass(frozen=True)
class Outcome:
    """All trials of a study, in order, how many of them this search replayed, and why it ended."""

    trials: list[Trial]
    replayed: int
    ended: str

    @property
    def best(self) -> Trial:
        """The first of those that found most. KVTierError if time was over before there was one."""
        if not self.trials:
            raise KVTierError("time was over before the first trial; give --time-limit more")
        return max(self.trials, key=lambda trial: trial.ratio)


class StudyFile:
    """A study in the file `path`, made if missing. KVTierError if it is of another `question`, in use, or no study."""

    def __init__(self, path: Path, question: Mapping[str, str], seed: int) -> None:
        self.path, self.seed = path, seed
        optuna = require_optuna()
        self._storage: RDBStorage | None = None
        try:
            self._file = path.open("ab")
        except OSError as error:
            raise KVTierError(f"cannot write the study {path}: {error.strerror}; give --study a file in a writable directory") from None
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise KVTierError(f"the study {path} is in use by another kvtier tune; wait for it, or name another --study") from None
            self._storage, self._study = _opened(optuna, path)
            self._claim(question)
            for trial in self._study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
                self._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # its process was ended
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> StudyFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()

    def _close(self) -> None:
        if self._storage is not None:
            self._storage.engine.dispose()
        self._file.close()

    def _claim(self, question: Mapping[str, str]) -> None:
        known = self._study.user_attrs.get("question")
        if known is None:
            self._study.set_user_attr("question", dict(question))
            return
        changed = [name for name in {**known, **question} if known.get(name) != question.get(name)]
        if changed:
            what = f"the study {self.path} was begun with other {' and '.join(changed)}"
            raise KVTierError(f"{what}; remove it to start anew, or name another with --study")

    def trials(self) -> list[Trial]:
        """What was replayed so far, in order, each point once."""
        found: dict[str, Trial] = {}
        for done in self._study.get_trials(deepcopy=False):
            if done.value is not None:
                raw: Raw = done.user_attrs["raw"]
                found.setdefault(_key(raw), Trial(raw, done.value))
        return list(found.values())

    def search(
        self,
        space: Space,
        first_points: list[Raw],
        judge: Callable[[Raw, Callable[[float], None]], float],
        trials: int,
        time_limit_s: float | None,
        progress: Progress,
        clock: Callable[[], float] = time.monotonic,
    ) -> Outcome:
        """Go on until `trials` points were replayed in all, the time is over or nothing new comes up.

        `judge` gets a point and reports the share of its work that is done, at which the time may turn out to be over. An exception from
        it, KeyboardInterrupt too, leaves all finished trials in the file.
        """
        end = None if time_limit_s is None else clock() + time_limit_s
        found = {_key(trial.raw): trial for trial in self.trials()}
        before, repeats = len(found), 0

        def best() -> float | None:
            return max((trial.ratio for trial in found.values()), default=None)

        def step(share: float) -> None:
            if end is not None and clock() >= end:
                raise OutOfTime
            progress(len(found), share, best())

        def replay(raw: Raw) -> float:
            step(0.0)
            found[_key(raw)] = Trial(raw, judge(raw, step))
            return found[_key(raw)].ratio

        with suppress(OutOfTime):
            for raw in first_points:
                if len(found) >= trials:
                    break
                if _key(raw) not in found:
                    self._add(space, raw, replay(raw))
            while len(found) < trials and repeats < MOST_REPEATS:
                repeats += 1
                number, raw = self._propose(space)
                if _key(raw) not in found:
                    replay(raw)
                    repeats = 0
                self._study.tell(number, found[_key(raw)].ratio)
            ended = f"{trials} trials" if len(found) >= trials else "nothing new to try"
            return Outcome(self.trials(), len(found) - before, ended)
        return Outcome(self.trials(), len(found) - before, "time limit")

    def _add(self, space: Space, raw: Raw, ratio: float) -> None:
        optuna = require_optuna()
        distributions = {name: _distribution(optuna, kind) for name, kind in space.parameters(raw).items()}
        done = optuna.trial.create_trial(params=dict(raw), distributions=distributions, value=ratio, user_attrs={"raw": raw})
        self._study.add_trial(done)

    def _propose(self, space: Space) -> tuple[int, Raw]:
        optuna = require_optuna()
        done = len(self._study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)))
        self._study.sampler = optuna.samplers.TPESampler(seed=self.seed * 1_000_003 + done, n_startup_trials=RANDOM_TRIALS)
        trial = self._study.ask()
        raw: Raw = {}
        # Choices open up others; each round adds what the last one made possible.
        while missing := [name for name in space.parameters(raw) if name not in raw]:
            for name in missing:
                kind = space.parameters(raw)[name]
                if isinstance(kind, Choice):
                    raw[name] = trial.suggest_categorical(name, kind.values)
                elif kind.whole:
                    raw[name] = trial.suggest_int(name, int(kind.low), int(kind.high))
                else:
                    raw[name] = trial.suggest_float(name, kind.low, kind.high, log=kind.logarithmic)
        trial.set_user_attr("raw", raw)
        return trial.number, raw


def require_optuna() -> Any:
    """The optimiser. MissingExtra if it is not installed."""
    with needing("tune", "kvtier tune", "optuna"):
        import optuna
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _opened(optuna: Any, path: Path) -> tuple[RDBStorage, Study]:
    from sqlalchemy.exc import DatabaseError

    try:
        storage: RDBStorage = optuna.storages.RDBStorage(f"sqlite:///{path.absolute()}")
        study: Study = optuna.create_study(storage=storage, study_name=NAME, direction="maximize", load_if_exists=True)
    except (DatabaseError, RuntimeError) as error:
        reason = " ".join(str(error).split()).partition(" [SQL")[0]
        raise KVTierError(f"{path} is no study of kvtier tune ({reason}); remove it, or name another with --study") from None
    return storage, study


def _distribution(optuna: Any, kind: Choice | Number) -> BaseDistribution:
    made: BaseDistribution
    if isinstance(kind, Choice):
        made = optuna.distributions.CategoricalDistribution(kind.values)
    elif kind.whole:
        made = optuna.distributions.IntDistribution(int(kind.low), int(kind.high))
    else:
        made = optuna.distributions.FloatDistribution(kind.low, kind.high, log=kind.logarithmic)
    return made


def _key(raw: Raw) -> str:
    return json.dumps(raw, sort_keys=True)
