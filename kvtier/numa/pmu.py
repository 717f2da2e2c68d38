"""What the CPUs counted: memory reads by node and traffic of the links between sockets, through perf_event_open, where the kernel allows.

Two kinds. Core events (generic names of perf): `node-loads`, reads answered by memory, and `node-load-misses`, those of another node's.
Uncore events that the kernel describes below /sys/bus/event_source/devices: reads and writes of the memory controllers (UNC_M_CAS_COUNT)
and flits of the links (UPI). Core events count this process's threads that start later and the calling one; uncore events whole sockets,
for root or where kernel.perf_event_paranoid is 0 or lower. Counters belong to whoever opened them, until `close`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import re
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvtier.numa.topology import ROOT, read_ids, read_text

_NUMBERS = {"x86_64": 298, "aarch64": 241}
_ATTRIBUTE_BYTES = 64  # PERF_ATTR_SIZE_VER0, which every kernel takes
_DISABLED, _INHERIT, _EXCLUDE_KERNEL, _EXCLUDE_HYPERVISOR = 1 << 0, 1 << 1, 1 << 5, 1 << 6
_ENABLE, _RESET = 0x2400, 0x2403
_SOFTWARE, _HW_CACHE = 1, 3
_NODE, _READ, _ACCESS, _MISS = 6, 0, 0, 1
_UNCORE = {
    "memory reads": (r"uncore_imc(_[0-9]+)?", ("cas_count_read", "data_reads")),
    "memory writes": (r"uncore_imc(_[0-9]+)?", ("cas_count_write", "data_writes")),
    "link flits": (r"uncore_upi_[0-9]+", ("upi_data_bandwidth_tx",)),
}
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


@dataclass(frozen=True)
class Event:
    """One event: `name`, the kernel's numbers for it, and the CPUs to count on (-1: wherever this process runs). `scale`: bytes or whatever
    `unit` says per count."""

    name: str
    type: int
    config: int
    cpus: tuple[int, ...] = (-1,)
    scale: float = 1.0
    unit: str = ""


NODE_LOADS = Event("node-loads", _HW_CACHE, _NODE | _READ << 8 | _ACCESS << 16)
NODE_LOAD_MISSES = Event("node-load-misses", _HW_CACHE, _NODE | _READ << 8 | _MISS << 16)
PAGE_FAULTS = Event("page-faults", _SOFTWARE, 2)
"""Counted by the kernel itself: says whether counting is allowed at all."""


def uncore_events(root: Path = ROOT) -> list[Event]:
    """The events of memory controllers and links that this machine's kernel describes; none in most virtual machines."""
    found = []
    for unit in sorted((root / "sys/bus/event_source/devices").glob("uncore_*")):
        for name, (pattern, events) in _UNCORE.items():
            known = next((event for event in events if (unit / "events" / event).exists()), None)
            if known is None or not re.fullmatch(pattern, unit.name):
                continue
            config = _config(read_text(unit / "events" / known), unit / "format")
            if config is None:
                continue
            scale = re.fullmatch(r"[0-9.e+-]+", read_text(unit / "events" / f"{known}.scale"))
            cpus = read_ids(unit / "cpumask") or (0,)
            measure = read_text(unit / "events" / f"{known}.unit")
            kind = int(read_text(unit / "type") or -1)
            found.append(Event(f"{name} ({unit.name})", kind, config, cpus, float(scale[0]) if scale else 1.0, measure))
    return found


class Counters:
    """Counters of some events, running until `close`. Those the kernel refuses are in `refused`, with why. Also a context manager."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.refused: dict[str, str] = {}
        self._files: dict[Event, list[int]] = {}
        for event in events:
            try:
                self._files[event] = self._open(event)
            except OSError as error:
                self.refused[event.name] = _why(error)

    def read(self) -> dict[str, float]:
        """Counts since they were opened, in each event's unit, over its CPUs."""
        return {
            event.name: sum(struct.unpack("q", os.read(file, 8))[0] for file in files) * event.scale for event, files in self._files.items()
        }

    def close(self) -> None:
        """Stop counting. Safe to call twice."""
        for files in self._files.values():
            for file in files:
                os.close(file)
        self._files = {}

    def __enter__(self) -> Counters:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, event: Event) -> list[int]:
        files: list[int] = []
        try:
            for cpu in event.cpus:
                file = _perf_event_open(event, cpu)
                files.append(file)
                fcntl.ioctl(file, _RESET)
                fcntl.ioctl(file, _ENABLE)
        except OSError:
            for file in files:
                os.close(file)
            raise
        return files


def remote_share(counts: dict[str, float]) -> float | None:
    """Share of memory reads that another node answered; None where that was not counted."""
    loads, misses = counts.get(NODE_LOADS.name), counts.get(NODE_LOAD_MISSES.name)
    return misses / loads if loads and misses is not None else None


def _perf_event_open(event: Event, cpu: int) -> int:
    number = _NUMBERS.get(platform.machine()) if sys.platform == "linux" else None
    if number is None:
        raise OSError(errno.ENOSYS, f"perf_event_open is not known for {platform.system()} on {platform.machine()}")
    own = cpu == -1
    # Uncore units know no modes; the kernel refuses exclusions there.
    flags = _DISABLED | (_INHERIT | _EXCLUDE_KERNEL | _EXCLUDE_HYPERVISOR if own else 0)
    attribute = struct.pack("IIQQQQQ", event.type, _ATTRIBUTE_BYTES, event.config, 0, 0, 0, flags).ljust(_ATTRIBUTE_BYTES, b"\0")
    pid, group = (0 if own else -1), -1
    close_on_exec = 8
    file: int = _libc.syscall(*map(ctypes.c_long, (number,)), attribute, *map(ctypes.c_long, (pid, cpu, group, close_on_exec)))
    if file < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return file


def _why(error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EPERM):
        level = read_text(ROOT / "proc/sys/kernel/perf_event_paranoid") or "unknown"
        return f"not allowed (kernel.perf_event_paranoid is {level}; containers often forbid it altogether)"
    if error.errno in (errno.ENOENT, errno.EOPNOTSUPP, errno.ENODEV):
        return "this CPU, or virtual machine, does not count it"
    return error.strerror or str(error)


def _config(description: str, formats: Path) -> int | None:
    """The number of an event like "event=0x04,umask=0x03", whose fields are placed as format/event ("config:0-7") says; None if it is
    described otherwise."""
    config = 0
    for field in description.split(","):
        name, _, value = field.partition("=")
        place = re.fullmatch(r"config:([0-9]+)(?:-[0-9]+)?", read_text(formats / name.strip()))
        if place is None or not re.fullmatch(r"0x[0-9a-fA-F]+|[0-9]+|", value):
            return None
        config |= int(value or "1", 0) << int(place[1])
    return config
