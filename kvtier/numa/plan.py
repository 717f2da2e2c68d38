"""Which process, and which of its threads, belongs on which CPUs, and where its memory should come from. Pure: decides, changes nothing.

The policy is that of the binding document of the sources. A socket takes several groups of processes; a group runs on a node of its socket,
its forward threads on the next one, its memory is interleaved over the socket; everything else that is named runs on one socket's
first node. Where a socket has one node only, forward threads stay with their group; where it has more than two, groups take pairs in turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kvtier.errors import NumaError
from kvtier.numa.allowed import Allowed
from kvtier.numa.ids import format_ids
from kvtier.numa.plan_config import PlanConfig
from kvtier.numa.processes import Process
from kvtier.numa.syscalls import MemoryPolicy, Mode
from kvtier.numa.topology import Topology

_MODES = {"interleave": Mode.INTERLEAVE, "bind": Mode.BIND, "preferred": Mode.PREFERRED}


@dataclass(frozen=True)
class Slot:
    """A place for a group (`group` None: for the others): socket, nodes and CPUs for its processes and for their forward threads."""

    group: int | None
    socket: int
    node: int
    forward_node: int
    cpus: tuple[int, ...]
    forward_cpus: tuple[int, ...]
    memory: MemoryPolicy

    @property
    def name(self) -> str:
        """For people: "group 3", "others"."""
        return "others" if self.group is None else f"group {self.group}"


@dataclass(frozen=True)
class ThreadPlan:
    """One thread and its CPUs."""

    id: int
    name: str
    forward: bool
    cpus: tuple[int, ...]


@dataclass(frozen=True)
class ProcessPlan:
    """One process in a slot, with CPUs for its threads and for its forward threads. `started` tells it from a later one with its pid."""

    pid: int
    started: int
    command: str
    pattern: str
    slot: Slot
    cpus: tuple[int, ...]
    forward_cpus: tuple[int, ...]
    threads: tuple[ThreadPlan, ...]


@dataclass(frozen=True)
class BindingPlan:
    """All processes and where they belong; `notes` are worth knowing, not errors."""

    processes: tuple[ProcessPlan, ...]
    slots: tuple[Slot, ...]
    notes: tuple[str, ...]
    config: PlanConfig


def make_slots(config: PlanConfig, topology: Topology, groups: int | None = None) -> list[Slot]:
    """Places for `groups` groups (None: as many as the configuration foresees) and, last, for the others.

    NumaError if the machine is not the one expected, or too small.
    """
    sockets = list(topology.sockets.values())
    if config.machine is not None and (config.machine.sockets, config.machine.nodes) != (len(sockets), len(topology.cpu_nodes)):
        raise NumaError(
            f"the plan is for {config.machine.sockets} sockets with {config.machine.nodes} nodes, this machine has {len(sockets)} with "
            f"{len(topology.cpu_nodes)}; configs/numa/generic.yaml adapts to any"
        )
    others = len(sockets) - 1 if config.others_socket_index == "last" else config.others_socket_index
    if others >= len(sockets):
        raise NumaError(f"others_socket_index is {others}, but this machine has sockets 0 to {len(sockets) - 1}")
    if config.groups_per_socket == "auto":
        count = len(sockets) if groups is None else groups
        on_socket = [position * len(sockets) // max(count, len(sockets)) for position in range(count)]
    else:
        room = config.groups_per_socket * len(sockets)
        count = room if groups is None else groups
        if count > room:
            raise NumaError(
                f"{count} groups are running, but {len(sockets)} sockets with {config.groups_per_socket} groups each take {room}"
            )
        on_socket = [position // config.groups_per_socket for position in range(count)]
    slots = [_slot(config, topology, group, position, on_socket[:group].count(position)) for group, position in enumerate(on_socket)]
    return [*slots, _slot(config, topology, None, others, 0)]


def make_plan(
    config: PlanConfig, topology: Topology, processes: Iterable[Process], allowed: Callable[[int], Allowed] | None = None
) -> BindingPlan:
    """The plan for running processes. `allowed` tells what a pid's cpuset permits; CPUs outside are left out, with a note.

    NumaError for a pattern that matches nothing, a process that two patterns match, too many groups, and a process whose cpuset has none
    of the CPUs planned.
    """
    grouped, others = _matched(config, list(processes))
    groups = _groups(config, grouped)
    slots = make_slots(config, topology, max(groups.values(), default=-1) + 1)
    notes: list[str] = []
    planned = []
    for process, pattern in [*grouped, *others]:
        slot = slots[groups.get(process.pid, -1)]
        cpus, forward = slot.cpus, slot.forward_cpus
        if allowed is not None:
            cpus, forward = (_within(process, wanted, allowed(process.pid), notes) for wanted in (cpus, forward))
        threads = []
        for thread in process.threads:
            is_forward = slot.group is not None and is_forward_thread(config, thread.name)
            threads.append(ThreadPlan(thread.id, thread.name, is_forward, forward if is_forward else cpus))
        planned.append(ProcessPlan(process.pid, process.started, process.command, pattern, slot, cpus, forward, tuple(threads)))
    if config.forward_thread_patterns and not any(thread.forward for process in planned for thread in process.threads):
        notes.append(f"no thread is named like {', '.join(config.forward_thread_patterns)}; all threads are on their group's first node")
    return BindingPlan(tuple(planned), tuple(slots), tuple(dict.fromkeys(notes)), config)


def is_forward_thread(config: PlanConfig, name: str) -> bool:
    """Whether a thread of a group is one of those that compute."""
    return any(re.search(pattern, name) for pattern in config.forward_thread_patterns)


def _slot(config: PlanConfig, topology: Topology, group: int | None, position: int, before: int) -> Slot:
    """The place of a group on the socket at `position`, on which `before` groups are already."""
    socket, nodes = list(topology.sockets.items())[position]
    node = nodes[2 * before % len(nodes)]
    forward = nodes[(2 * before + 1) % len(nodes)]
    policy = MemoryPolicy()
    if group is not None and config.memory != "none":
        wanted = nodes if config.memory == "interleave" else (node,)
        with_memory = tuple(each for each in wanted if topology.node(each).memory_bytes)
        if not with_memory:
            raise NumaError(f"memory: {config.memory} cannot be met on socket {socket}: none of its nodes {format_ids(wanted)} has memory")
        policy = MemoryPolicy(_MODES[config.memory], with_memory)
    return Slot(group, socket, node, forward, topology.node(node).cpus, topology.node(forward).cpus, policy)


def _matched(config: PlanConfig, processes: list[Process]) -> tuple[list[tuple[Process, str]], list[tuple[Process, str]]]:
    grouped: list[tuple[Process, str]] = []
    others: list[tuple[Process, str]] = []
    seen = set()
    for process in processes:
        matching = [pattern for pattern in (*config.group_patterns, *config.other_patterns) if re.search(pattern, process.command)]
        if len(matching) > 1:
            raise NumaError(
                f"process {process.pid} ({_short(process.command)}) matches {' and '.join(map(repr, matching))}; make the patterns narrower"
            )
        if matching:
            seen.add(matching[0])
            (grouped if matching[0] in config.group_patterns else others).append((process, matching[0]))
    for pattern in (*config.group_patterns, *config.other_patterns):
        if pattern not in seen:
            raise NumaError(f"no process matches {pattern!r}; correct or remove the pattern, or start the service first (see plan --start)")
    return grouped, others


def _groups(config: PlanConfig, grouped: Sequence[tuple[Process, str]]) -> dict[int, int]:
    """Group number by pid: the rank of the value a pattern names, or the position among the processes of the pattern, oldest first."""
    named: dict[int, str] = {}
    groups: dict[int, int] = {}
    for pattern in config.group_patterns:
        members = [process for process, its in grouped if its == pattern]
        for position, process in enumerate(members):
            match = re.search(pattern, process.command)
            value = match.groupdict().get("group") if match else None
            if value is None:
                groups[process.pid] = position
            else:
                named[process.pid] = value
    values = sorted(set(named.values()), key=lambda value: (len(value), value))
    groups.update({pid: values.index(value) for pid, value in named.items()})
    return groups


def _within(process: Process, wanted: tuple[int, ...], allowed: Allowed, notes: list[str]) -> tuple[int, ...]:
    usable = tuple(cpu for cpu in wanted if cpu in allowed.cpus)
    if not usable:
        raise NumaError(
            f"process {process.pid} ({_short(process.command)}) belongs on CPUs {format_ids(wanted)}, but its cpuset has only "
            f"{format_ids(allowed.cpus)}; widen the cpuset or plan it elsewhere"
        )
    if len(usable) < len(wanted):
        notes.append(f"process {process.pid}: its cpuset leaves CPUs {format_ids(usable)} of {format_ids(wanted)}")
    return usable


def _short(command: str) -> str:
    return command if len(command) <= 60 else f"{command[:57]}..."
