"""How much memory this process can still have, by everything that has a say: the machine, and the control groups above the process.

Asked before memory is touched, because who takes more than a control group allows is not refused but killed. Stateless: reads /proc and
/sys at every call. `root` stands for / and is something else only in tests.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
_PAGES_PER_TABLE = 512  # a 4 KiB page table maps 512 pages, and counts as memory itself


@dataclass(frozen=True)
class Room:
    """How many more bytes can be had, and why not more."""

    bytes: int
    why: str


@dataclass(frozen=True)
class _Files:
    """What one version of control groups calls its memory files, and which lines of memory.stat count memory it gives up when asked."""

    limits: tuple[str, ...]
    usage: str
    given_up: tuple[str, ...]


_VERSION_1 = _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
# Above memory.high nobody is killed, but slowed down until memory is given up, and an arena gives up nothing.
_VERSION_2 = _Files(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file", "slab_reclaimable"))


def available_memory(root: Path = ROOT) -> Room:
    """The most bytes this process could fill now without driving the machine or one of its control groups out of memory.

    Counts what others use, does not count caches that the kernel gives up when asked, and leaves room for page tables. Huge pages of
    the explicit pool are beside this: they were set apart before.
    """
    rooms = [_machine(root), *(room for folder, files in _groups(root) for room in _group(folder, files))]
    least = min(rooms, key=lambda room: room.bytes)
    return Room(least.bytes * _PAGES_PER_TABLE // (_PAGES_PER_TABLE + 1), least.why)


def locked_memory_limit() -> str:
    """The limit on locked memory, in words."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return f"RLIMIT_MEMLOCK is {'unlimited' if soft == resource.RLIM_INFINITY else f'{soft} bytes'}"


def _machine(root: Path) -> Room:
    facts = _table(root / "proc/meminfo")
    available, total = (facts[name] * 1024 for name in ("MemAvailable:", "MemTotal:"))
    return Room(available, f"of the {total} bytes of this machine, {available} are free (MemAvailable)")


def _group(folder: Path, files: _Files) -> Iterator[Room]:
    """What each limit of one control group leaves; nothing where the group has no such limit."""
    for name in files.limits:
        try:
            text = (folder / name).read_text().strip()
            usage = int((folder / files.usage).read_text())
            facts = _table(folder / "memory.stat")
        except OSError:  # not there: the top group of version 2, or a path as it is outside this container
            continue
        if text != "max":
            used = max(0, usage - sum(facts.get(key, 0) for key in files.given_up))
            yield Room(max(0, int(text) - used), f"{folder / name} is {text} bytes, {used} of them in use")


def _groups(root: Path) -> Iterator[tuple[Path, _Files]]:
    """The folders of this process's control groups and of all above, up to the top of what is mounted."""
    mounts = root / "sys/fs/cgroup"
    own_groups = root / "proc/self/cgroup"
    for line in own_groups.read_text().splitlines() if own_groups.exists() else []:
        _, controllers, name = line.split(":", 2)
        own = Path(name.removeprefix("/"))
        if not controllers:
            yield from ((mounts / part, _VERSION_2) for part in (own, *own.parents))
        elif "memory" in controllers.split(","):
            yield from ((mounts / "memory" / part, _VERSION_1) for part in (own, *own.parents))


def _table(path: Path) -> dict[str, int]:
    """A file of lines "name number ..."."""
    return {name: int(number) for name, number, *_ in map(str.split, path.read_text().splitlines())}
