"""Whether processes are where a plan wants them: affinities, memory policies and pages read back from the kernel, nothing assumed."""

from __future__ import annotations

import os
from dataclasses import dataclass

from kvtier.errors import NumaError
from kvtier.numa.ids import format_ids
from kvtier.numa.placement import MappedRange, bytes_by_node, read_numa_maps
from kvtier.numa.plan import BindingPlan, ProcessPlan
from kvtier.numa.syscalls import MemoryPolicy, Mode

_AS_WRITTEN = {Mode.BIND: "bind", Mode.PREFERRED: "prefer", Mode.INTERLEAVE: "interleave"}


@dataclass(frozen=True)
class Difference:
    """One thing that is not as planned, of a process or of one of its threads."""

    pid: int
    thread: int | None
    what: str
    expected: str
    found: str

    def __str__(self) -> str:
        who = f"process {self.pid}" if self.thread is None else f"process {self.pid} thread {self.thread}"
        return f"{who}: {self.what} is {self.found}, expected {self.expected}"


@dataclass(frozen=True)
class Checked:
    """What was looked at, and all differences; none: everything is as planned. `memory`: bytes by node and pid."""

    threads: int
    processes: int
    differences: tuple[Difference, ...]
    memory: dict[int, dict[int, int]]


def verify_plan(plan: BindingPlan) -> Checked:
    """Compare a plan, made just now from what runs, with the kernel's answers. A thread that ended meanwhile is no difference."""
    differences: list[Difference] = []
    threads = 0
    memory = {}
    for process in plan.processes:
        for thread in process.threads:
            try:
                found = os.sched_getaffinity(thread.id)
            except ProcessLookupError:
                continue
            threads += 1
            if found != set(thread.cpus):
                name = f"affinity of {thread.name}"
                differences.append(Difference(process.pid, thread.id, name, format_ids(thread.cpus), format_ids(found)))
        if process.slot.memory.mode != Mode.DEFAULT:
            try:
                maps = read_numa_maps(process.pid)
            except ProcessLookupError:
                differences.append(Difference(process.pid, None, "the process", "there", "gone"))
                continue
            except (OSError, NumaError) as error:
                text = error.strerror if isinstance(error, OSError) else str(error)
                differences.append(Difference(process.pid, None, "numa_maps", "readable", str(text)))
                continue
            memory[process.pid] = bytes_by_node(maps)
            differences += _memory(process, maps, plan.config.memory_share)
    return Checked(threads, len(plan.processes), tuple(differences), memory)


def policy_text(policy: MemoryPolicy) -> str:
    """A policy as numa_maps writes it: "interleave:0-1"."""
    return f"{_AS_WRITTEN[policy.mode]}:{format_ids(policy.nodes)}" if policy.mode in _AS_WRITTEN else "default"


def _memory(process: ProcessPlan, maps: list[MappedRange], least_share: float) -> list[Difference]:
    """The policy of most of the process's own memory, and how much of that is on the nodes planned."""
    wanted = process.slot.memory
    by_policy: dict[str, int] = {}
    for line in maps:
        if line.anonymous:
            policy = line.policy.replace("=static", "").replace("=relative", "")
            by_policy[policy] = by_policy.get(policy, 0) + sum(line.on.values()) * line.page_bytes
    found = max(by_policy, key=lambda policy: by_policy[policy], default="default")
    differences = []
    if found != policy_text(wanted):
        expected = f"{policy_text(wanted)} (only a start under numactl, see the report, sets it)"
        differences.append(Difference(process.pid, None, "memory policy", expected, found))
    there = bytes_by_node(maps)
    total = sum(there.values())
    share = sum(there.get(node, 0) for node in wanted.nodes) / total if total else 1.0
    if share < least_share:
        expected = f"at least {least_share:.0%} on nodes {format_ids(wanted.nodes)}"
        differences.append(Difference(process.pid, None, "memory", expected, f"{share:.1%} there"))
    return differences
