"""Resets that a worker has not carried out yet, as empty files `reset-<generation>` beside its store.

vLLM tells a worker of a reset with the engine's next step. Where the process ends before that, the next one must not find what was reset,
so the scheduler leaves the file and the worker takes it away once its tiers are empty. State: the files.
"""

from __future__ import annotations

import logging
from pathlib import Path

from kvtier.config import Config

log = logging.getLogger(__name__)

_PREFIX = "reset-"


def announce(config: Config, generation: int) -> None:
    """The worker with this configuration has to forget everything, now or when it is next opened."""
    if config.disk is None or not (directory := Path(config.disk.path)).is_dir():  # the directory may be another machine's
        return
    try:
        (directory / f"{_PREFIX}{generation}").touch()
    except OSError as error:
        log.error(
            "kvtier: a reset cannot be noted in %s (%s); if the engine ends before its next step, delete that store", directory, error
        )


def pending(config: Config) -> list[int]:
    """The generations whose reset is still to be carried out."""
    if config.disk is None:
        return []
    found = (path.name.removeprefix(_PREFIX) for path in Path(config.disk.path).glob(f"{_PREFIX}*"))
    return sorted(int(generation) for generation in found if generation.isdecimal())


def carried_out(config: Config, generation: int) -> None:
    """Everything that was kept before `generation` is gone."""
    for done in pending(config):
        if done <= generation and config.disk is not None:
            note = Path(config.disk.path) / f"{_PREFIX}{done}"
            try:
                note.unlink(missing_ok=True)
            except OSError as error:
                log.error("kvtier: %s cannot be taken away (%s); the store will be emptied again at the next start", note, error)
