"""Processes and their threads as /proc lists them. `root` stands for /."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from kvtier.numa.topology import ROOT


@dataclass(frozen=True)
class Thread:
    """A thread: its id, and the name it gave itself (15 characters at most)."""

    id: int
    name: str


@dataclass(frozen=True)
class Process:
    """A process. `started` (clock ticks since boot) tells it from a later one with the same `pid`."""

    pid: int
    started: int
    command: str
    threads: tuple[Thread, ...]


def list_processes(root: Path = ROOT) -> list[Process]:
    """All processes with a command line, oldest first, without this one and those that started it (their arguments name patterns too)."""
    table = root / "proc"
    own = _ancestors(os.getpid(), table)
    found = []
    for folder in table.iterdir():
        if folder.name.isdecimal() and int(folder.name) not in own:
            process = read_process(int(folder.name), root)
            if process is not None and process.command:
                found.append(process)
    return sorted(found, key=lambda process: (process.started, process.pid))


def read_process(pid: int, root: Path = ROOT) -> Process | None:
    """One process; None once it is gone."""
    folder = root / "proc" / str(pid)
    try:
        command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        started = int(_facts(folder)[19])
        threads = [Thread(int(entry.name), _name(entry)) for entry in (folder / "task").iterdir()]
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return None
    return Process(pid, started, command, tuple(sorted(threads, key=lambda thread: thread.id)))


def _name(folder: Path) -> str:
    try:
        return (folder / "comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _facts(folder: Path) -> list[str]:
    """The fields of /proc/PID/stat after the name, which may hold spaces and brackets itself: state first, then the parent."""
    return (folder / "stat").read_text().rpartition(")")[2].split()


def _ancestors(pid: int, table: Path) -> set[int]:
    found = {pid}
    while pid > 1:
        try:
            pid = int(_facts(table / str(pid))[1])
        except (FileNotFoundError, ProcessLookupError, IndexError):
            break
        found.add(pid)
    return found
