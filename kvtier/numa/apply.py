"""Carrying out a binding plan, and taking it back. Per process all or nothing: if one thread refuses, the others get back what they had.

CPU affinities are set from outside; the memory policy of a running process cannot be (only its own threads can), so a plan's memory part is
for the commands that start services bound. `move_memory` moves pages that exist already onto the nodes planned; undoing leaves them there.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kvtier.numa import syscalls
from kvtier.numa.plan import BindingPlan, ProcessPlan, is_forward_thread
from kvtier.numa.processes import Process, read_process
from kvtier.numa.topology import Topology
from kvtier.numa.undo import Before, recall, remember

_ROUNDS = 5  # threads that are started while others are being bound inherit the old affinity: look again
_ENDED = "it has ended"


@dataclass(frozen=True)
class Outcome:
    """What became of one process: threads bound, or `why` not (then it is as it was); pages that could not be moved."""

    pid: int
    threads: int
    why: str = ""
    pages_left: int = 0


def apply_plan(plan: BindingPlan, topology: Topology, undo_file: Path, move_memory: bool = False) -> list[Outcome]:
    """Bind all processes of a plan, each whole or not at all. NumaError, and nothing changed, if the undo file cannot be written."""
    running = [process for process in plan.processes if _same(process.pid, process.started) is not None]
    remember(undo_file, [Before(process.pid, process.started, _affinities(process.pid)) for process in running])
    return [_apply(plan, process, topology, move_memory) for process in plan.processes]


def undo(undo_file: Path) -> list[Outcome]:
    """Give all threads in an undo file the CPUs they had; those started since, what their process's first thread had.

    The file is removed once nothing is left to undo. NumaError if it is none.
    """
    outcomes = []
    for before in recall(undo_file):
        process = _same(before.pid, before.started)
        if process is None:
            outcomes.append(Outcome(before.pid, 0, _ENDED))
            continue
        first = before.affinities[before.pid]
        try:
            for thread in process.threads:
                with suppress(ProcessLookupError):
                    os.sched_setaffinity(thread.id, before.affinities.get(thread.id, first))
        except OSError as error:
            outcomes.append(Outcome(before.pid, 0, str(error.strerror)))
        else:
            outcomes.append(Outcome(before.pid, len(process.threads)))
    if all(outcome.why in ("", _ENDED) for outcome in outcomes):
        undo_file.unlink()
    return outcomes


def _apply(plan: BindingPlan, planned: ProcessPlan, topology: Topology, move_memory: bool) -> Outcome:
    before = _affinities(planned.pid)
    bound: set[int] = set()
    try:
        for _ in range(_ROUNDS):
            process = _same(planned.pid, planned.started)
            if process is None:
                return Outcome(planned.pid, 0, f"{_ENDED} since it was planned")
            todo = [thread for thread in process.threads if thread.id not in bound]
            if not todo:
                break
            for thread in todo:
                forward = planned.slot.group is not None and is_forward_thread(plan.config, thread.name)
                with suppress(ProcessLookupError):
                    os.sched_setaffinity(thread.id, planned.forward_cpus if forward else planned.cpus)
                bound.add(thread.id)
    except OSError as error:
        for thread_id in bound:
            with suppress(ProcessLookupError):
                os.sched_setaffinity(thread_id, before.get(thread_id, before[planned.pid]))
        return Outcome(planned.pid, 0, f"{error.strerror}; it is as it was (binding others' processes takes root or CAP_SYS_NICE)")
    wanted = planned.slot.memory.nodes
    others = [node for node in topology.memory_nodes if node not in wanted]
    if not (move_memory and wanted and others):
        return Outcome(planned.pid, len(bound))
    try:
        return Outcome(planned.pid, len(bound), pages_left=syscalls.migrate_pages(others, wanted, planned.pid))
    except OSError as error:
        return Outcome(planned.pid, len(bound), f"its CPUs are bound, but its memory was not moved: {error.strerror}")


def _same(pid: int, started: int) -> Process | None:
    """The process with this pid, if it is still the one that started then."""
    process = read_process(pid)
    return process if process is not None and process.started == started else None


def _affinities(pid: int) -> dict[int, tuple[int, ...]]:
    process = read_process(pid)
    found = {}
    for thread in process.threads if process is not None else ():
        with suppress(ProcessLookupError):
            found[thread.id] = tuple(sorted(os.sched_getaffinity(thread.id)))
    return found
