"""A binding plan as Markdown, and as the commands that start services bound. Text only; whoever asks writes it somewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvtier.numa.ids import format_ids
from kvtier.numa.plan import BindingPlan, ProcessPlan, Slot
from kvtier.numa.syscalls import Mode
from kvtier.numa.topology import Topology
from kvtier.numa.verify import Checked, policy_text

_NUMACTL = {Mode.INTERLEAVE: "--interleave", Mode.BIND: "--membind", Mode.PREFERRED: "--preferred"}


def numactl_command(slot: Slot, command: str = "COMMAND") -> str:
    """`numactl` that starts a process of the slot bound; its forward threads are bound afterwards, by `kvtier numa apply`."""
    policy = f" {_NUMACTL[slot.memory.mode]}={format_ids(slot.memory.nodes)}" if slot.memory.nodes else ""
    return f"numactl --physcpubind={format_ids(slot.cpus)}{policy} {command}"


def cpuset_commands(slot: Slot) -> list[str]:
    """The same as a control group (version 2) that nothing inside can leave: CPUs of both roles, memory nodes of the socket."""
    name = "kvtier-others" if slot.group is None else f"kvtier-group{slot.group}"
    folder = f"/sys/fs/cgroup/{name}"
    nodes = format_ids(slot.memory.nodes or {slot.node, slot.forward_node})
    return [
        "echo +cpuset > /sys/fs/cgroup/cgroup.subtree_control",
        f"mkdir -p {folder}",
        f"echo {format_ids({*slot.cpus, *slot.forward_cpus})} > {folder}/cpuset.cpus",
        f"echo {nodes} > {folder}/cpuset.mems",
        f"echo $$ > {folder}/cgroup.procs && exec COMMAND",
    ]


def start_commands(slots: Iterable[Slot]) -> list[str]:
    """One shell line per slot, with what it is for."""
    return [f"{numactl_command(slot)}  # {slot.name}, socket {slot.socket}" for slot in slots]


def markdown(plan: BindingPlan, topology: Topology, checked: Checked | None = None) -> str:
    """The report: machine, slots, processes and threads, commands; with `checked` what was read back."""
    lines = ["# NUMA binding report", "", *_machine(topology), "", "## Slots", ""]
    lines += _table(
        ["slot", "socket", "node", "CPUs", "forward node", "forward CPUs", "memory"],
        [
            [
                slot.name,
                slot.socket,
                slot.node,
                format_ids(slot.cpus),
                slot.forward_node if slot.group is not None else "-",
                format_ids(slot.forward_cpus) if slot.group is not None else "-",
                policy_text(slot.memory),
            ]
            for slot in plan.slots
        ],
    )
    lines += ["", "## Processes", ""]
    lines += _table(
        ["slot", "pid", "pattern", "threads", "of them forward", "CPUs", "command"], [_process(process) for process in plan.processes]
    )
    forward = [(process, thread) for process in plan.processes for thread in process.threads if thread.forward]
    if forward:
        lines += ["", "## Forward threads", ""]
        lines += _table(["pid", "thread", "name", "CPUs"], [[p.pid, t.id, t.name, format_ids(t.cpus)] for p, t in forward])
    if plan.notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in plan.notes)]
    if checked is not None:
        lines += ["", "## Read back", "", f"{checked.threads} threads of {checked.processes} processes looked at."]
        lines += [f"- **differs**: {difference}" for difference in checked.differences] or ["Everything is as planned."]
        lines += [f"- process {pid}: {_memory(nodes)}" for pid, nodes in checked.memory.items()]
    lines += ["", "## Starting services bound", "", "A memory policy can only be set by the process itself, so start services with it:", ""]
    lines += ["```sh", *start_commands(plan.slots), "```", "", "or inside a control group, which nothing in it can leave:", "", "```sh"]
    for slot in plan.slots:
        lines += [f"# {slot.name}", *cpuset_commands(slot)]
    return "\n".join([*lines, "```", ""])


def _machine(topology: Topology) -> list[str]:
    rows = [
        [node.id, format_ids(node.cpus) or "none", f"{node.memory_bytes / 2**30:.1f} GiB"]
        + [topology.distance(node.id, other) for other in topology.node_ids]
        for node in topology.nodes
    ]
    return _table(["node", "CPUs", "memory", *(f"to {node}" for node in topology.node_ids)], rows)


def _process(process: ProcessPlan) -> list[object]:
    forward = sum(thread.forward for thread in process.threads)
    return [process.slot.name, process.pid, process.pattern, len(process.threads), forward, format_ids(process.cpus), process.command[:80]]


def _memory(nodes: dict[int, int]) -> str:
    return ", ".join(f"{size / 2**20:.1f} MiB on node {node}" for node, size in nodes.items()) or "no memory of its own"


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *(f"| {' | '.join(row)} |" for row in cells)]
