"""What threads were bound to before a plan was applied, in a JSON file: written before anything is changed, read to take it back."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kvtier.errors import NumaError
from kvtier.numa.topology import ROOT, read_text

_MOST_CPUS = 1 << 16


@dataclass(frozen=True)
class Before:
    """One process, told from later ones with its pid by when it `started`, and the CPUs of each of its threads."""

    pid: int
    started: int
    affinities: dict[int, tuple[int, ...]]


def remember(undo_file: Path, processes: Iterable[Before]) -> None:
    """Add processes to the file, which is made if missing. What it says already about a thread is older, so that stays.

    NumaError if it cannot be written.
    """
    known = {(one.pid, one.started): one for one in (_read(undo_file, of_this_boot=False) if undo_file.exists() else [])}
    for process in processes:
        earlier = known.get((process.pid, process.started), process)
        known[process.pid, process.started] = Before(process.pid, process.started, process.affinities | earlier.affinities)
    records = [{"pid": one.pid, "started": one.started, "affinities": one.affinities} for one in known.values()]
    try:
        temporary = undo_file.with_name(f"{undo_file.name}.new")
        temporary.write_text(json.dumps({"boot": _boot(), "processes": records}, indent=1))
        temporary.replace(undo_file)
    except OSError as error:
        raise NumaError(f"cannot write the undo file {undo_file}: {error.strerror}; nothing was bound") from None


def recall(undo_file: Path) -> list[Before]:
    """What the file says. NumaError if it is none, or from before the machine was started again."""
    return _read(undo_file, of_this_boot=True)


def _read(undo_file: Path, of_this_boot: bool) -> list[Before]:
    try:
        data = json.loads(undo_file.read_text())
        processes = [
            Before(int(one["pid"]), int(one["started"]), {int(thread): _cpus(cpus) for thread, cpus in one["affinities"].items()})
            for one in data["processes"]
            if one["affinities"]  # else it ended while it was looked at
        ]
        if any(one.pid not in one.affinities for one in processes):
            raise ValueError("a process without its first thread")
        boot = data["boot"]
    except FileNotFoundError:
        raise NumaError(f"{undo_file}: no such undo file; `kvtier numa apply --apply` writes one") from None
    except OSError as error:
        raise NumaError(f"{undo_file}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise NumaError(f"{undo_file} is not an undo file of kvtier numa; name another with --undo-file") from None
    if boot != _boot():
        if of_this_boot:
            raise NumaError(f"{undo_file} is from before this machine was started, so there is nothing to undo; remove it")
        return []
    return processes


def _cpus(cpus: list[int]) -> tuple[int, ...]:
    if not cpus or not all(isinstance(cpu, int) and 0 <= cpu < _MOST_CPUS for cpu in cpus):
        raise ValueError("these are no CPUs")
    return tuple(cpus)


def _boot() -> str:
    return read_text(ROOT / "proc/sys/kernel/random/boot_id")
