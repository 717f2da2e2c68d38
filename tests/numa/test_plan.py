"""Laws checked: the plan is the policy of the sources on their machine and adapts to others; bad input is one clear error; CPUs stay within
cpusets."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kvtier.errors import NumaError
from kvtier.numa.allowed import Allowed
from kvtier.numa.ids import format_ids
from kvtier.numa.plan import make_plan, make_slots
from kvtier.numa.plan_config import PlanConfig, load_plan_config
from kvtier.numa.processes import Process, Thread, list_processes
from kvtier.numa.report import cpuset_commands, markdown, numactl_command, start_commands
from kvtier.numa.syscalls import MemoryPolicy, Mode
from kvtier.numa.topology import read_topology
from tests.numa.machines import A3, GAPS, MEMORY_ONLY, ONE_NODE, TWO_SOCKETS, Machine, NodeSpec, build, write

CONFIGS = Path(__file__).parents[2] / "configs" / "numa"


def machine(tmp_path, which):
    return read_topology(build(tmp_path, which))


def service(groups: int) -> list[Process]:
    """Processes of `groups` groups, as they would be started one after the other, and two background ones."""
    found: list[Process] = []
    for kind in ("scheduler", "worker", "rpc_proxy", "tcp"):
        for group in range(groups):
            pid = 1000 + len(found)
            names = [kind, "forward-0", "io"] if kind == "worker" else [kind]
            found.append(
                Process(pid, pid, f"/opt/engine/{kind} --rank {group}", tuple(Thread(pid + 9000 * n, t) for n, t in enumerate(names)))
            )
    return found + [
        Process(5000 + n, 5000 + n, f"/opt/engine/{name}", (Thread(5000 + n, name),)) for n, name in enumerate(["Motor", "Servicer"])
    ]


def test_the_machine_and_policy_of_the_source(tmp_path):
    topology = machine(tmp_path, A3)
    plan = make_plan(load_plan_config(CONFIGS / "a3.yaml"), topology, service(16))
    assert len(plan.processes) == 4 * 16 + 2
    for process in plan.processes:
        slot = process.slot
        if slot.group is None:
            assert (slot.socket, format_ids(process.cpus)) == (2, "160-199")
            continue
        socket = int(process.command.split()[-1]) // 4
        assert (slot.group, slot.socket) == (int(process.command.split()[-1]), socket)
        for thread in process.threads:
            first = 80 * socket + (40 if thread.name == "forward-0" else 0)
            assert format_ids(thread.cpus) == f"{first}-{first + 39}"
        assert slot.memory == MemoryPolicy(Mode.INTERLEAVE, (2 * socket, 2 * socket + 1))
    assert plan.notes == ()


def test_the_json_of_the_source_is_a_configuration(tmp_path):
    given = {
        "groups_per_socket": 4,
        "others_socket_index": 2,
        "group_patterns": ["scheduler", "worker", "rpc_proxy", "tcp"],
        "other_patterns": ["Motor", "Servicer"],
        "forward_thread_patterns": ["forward", "prefill", "decode"],
        "report": "workflow_visualization/numa_binding_report.md",
    }
    write(tmp_path / "numa_bind.json", json.dumps(given))
    assert load_plan_config(tmp_path / "numa_bind.json").groups_per_socket == 4


@pytest.mark.parametrize("which", [ONE_NODE, TWO_SOCKETS, GAPS, MEMORY_ONLY, A3])
def test_the_generic_profile_adapts(tmp_path, which):
    topology = machine(tmp_path, which)
    plan = make_plan(load_plan_config(CONFIGS / "generic.yaml"), topology, service(4))
    sockets = list(topology.sockets)
    by_socket = {
        socket: {p.slot.group for p in plan.processes if p.slot.socket == socket and p.slot.group is not None} for socket in sockets
    }
    assert max(map(len, by_socket.values())) - min(map(len, by_socket.values())) <= 1
    for process in plan.processes:
        for thread in process.threads:
            assert set(thread.cpus) <= {cpu.id for cpu in topology.cpus if cpu.socket == process.slot.socket}


def test_groups_share_a_socket_of_many_nodes_in_pairs(tmp_path):
    topology = machine(tmp_path, Machine({node: NodeSpec([node]) for node in range(4)}))
    slots = make_slots(PlanConfig(group_patterns=("w",), groups_per_socket=3), topology)
    assert [(slot.node, slot.forward_node) for slot in slots[:-1]] == [(0, 1), (2, 3), (0, 1)]


def test_a_named_part_of_a_pattern_names_the_group(tmp_path):
    config = PlanConfig(group_patterns=(r"scheduler.*--rank (?P<group>\d+)", r"worker.*--rank (?P<group>\d+)"), groups_per_socket=8)
    late_first = [Process(1, 9, "scheduler --rank 10", ()), Process(2, 1, "worker --rank 10", ()), Process(3, 2, "worker --rank 2", ())]
    plan = make_plan(config, machine(tmp_path, TWO_SOCKETS), late_first)
    assert {process.pid: process.slot.group for process in plan.processes} == {1: 1, 2: 1, 3: 0}


def test_cpusets_narrow_a_plan_and_an_empty_rest_is_an_error(tmp_path):
    topology = machine(tmp_path, TWO_SOCKETS)
    config = PlanConfig(group_patterns=("worker",))
    process = Process(7, 7, "worker", (Thread(7, "worker"),))
    plan = make_plan(config, topology, [process], lambda _: Allowed(frozenset({1, 2, 9}), frozenset(), frozenset({0})))
    assert plan.processes[0].threads[0].cpus == (1, 2)
    assert plan.notes == ("process 7: its cpuset leaves CPUs 1-2 of 0-7",)
    with pytest.raises(NumaError, match=r"process 7 \(worker\) belongs on CPUs 0-7, but its cpuset has only 9"):
        make_plan(config, topology, [process], lambda _: Allowed(frozenset({9}), frozenset(), frozenset({0})))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_patterns": ("worker", "nobody")}, "no process matches 'nobody'"),
        ({"group_patterns": ("worker", "work")}, "matches 'worker' and 'work'; make the patterns narrower"),
        ({"group_patterns": ("worker",), "other_patterns": ("engine/w",)}, "matches 'worker' and 'engine/w'"),
        ({"group_patterns": ("worker",), "groups_per_socket": 1}, "3 groups are running, but 2 sockets with 1 groups each take 2"),
        ({"group_patterns": ("worker",), "others_socket_index": 2}, "others_socket_index is 2, but this machine has sockets 0 to 1"),
        ({"group_patterns": ("worker",), "machine": {"sockets": 4, "nodes": 8}}, "the plan is for 4 sockets with 8 nodes"),
    ],
)
def test_what_cannot_be_planned_is_one_clear_error(tmp_path, change, message):
    with pytest.raises(NumaError, match=message):
        make_plan(PlanConfig(**change), machine(tmp_path, TWO_SOCKETS), service(3))


def test_a_socket_without_memory_cannot_hold_a_groups_memory(tmp_path):
    topology = machine(tmp_path, Machine({0: NodeSpec([0], 0, gib=0), 1: NodeSpec([1], 1)}))
    with pytest.raises(NumaError, match="memory: bind cannot be met on socket 0"):
        make_slots(PlanConfig(group_patterns=("w",), memory="bind"), topology)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("group_pattern: [a]", "unknown key 'group_pattern'; the nearest known key is group_patterns"),
        ("foo: [a]", "unknown key 'foo'; the known keys are machine, groups_per_socket, "),
        ("group_patterns: ['(']", "group_patterns.0: '\\(' is not a regular expression"),
        ("group_patterns: ['']", "an empty pattern would match everything"),
        ("group_patterns: []", "group_patterns"),
        ("group_patterns: [a]\ngroups_per_socket: 0", "groups_per_socket"),
        ("[1, 2]", "expected keys such as group_patterns"),
        ("{", "neither YAML nor JSON"),
        ("other_patterns: [a]", "group_patterns: Field required"),
    ],
)
def test_a_wrong_configuration_is_one_clear_error(tmp_path, text, message):
    write(tmp_path / "plan.yaml", text)
    with pytest.raises(NumaError, match=message):
        load_plan_config(tmp_path / "plan.yaml")


def test_a_missing_configuration_is_one_clear_error(tmp_path):
    with pytest.raises(NumaError, match="no such file"):
        load_plan_config(tmp_path / "none.yaml")


def test_threads_nobody_is_named_like_are_noted(tmp_path):
    config = PlanConfig(group_patterns=("scheduler",), forward_thread_patterns=("prefill",))
    assert "no thread is named like prefill" in make_plan(config, machine(tmp_path, TWO_SOCKETS), service(1)).notes[0]


def test_processes_are_read_from_proc_and_kernel_threads_are_not(tmp_path):
    for pid, command in ((12, "engine\0worker\0--rank\x000\0"), (13, "")):
        write(tmp_path / f"proc/{pid}/stat", f"{pid} (a (b) c) S 1 " + " ".join(["0"] * 17) + f" {7000 + pid} 0")
        (tmp_path / f"proc/{pid}/cmdline").write_text(command)
        write(tmp_path / f"proc/{pid}/task/{pid}/comm", "worker")
        write(tmp_path / f"proc/{pid}/task/{pid + 100}/comm", "decode")
    write(tmp_path / "proc/14/comm", "vanishing")
    assert list_processes(tmp_path) == [Process(12, 7012, "engine worker --rank 0", (Thread(12, "worker"), Thread(112, "decode")))]


def test_who_asks_is_not_planned_although_its_arguments_name_patterns():
    found = {process.pid for process in list_processes()}
    assert not {os.getpid(), os.getppid()} & found


def test_commands_start_what_a_plan_would_bind(tmp_path):
    topology = machine(tmp_path, A3)
    slots = make_slots(load_plan_config(CONFIGS / "a3.yaml"), topology)
    assert len(start_commands(slots)) == 17
    assert numactl_command(slots[5], "worker") == "numactl --physcpubind=80-119 --interleave=2-3 worker"
    assert numactl_command(slots[-1]) == "numactl --physcpubind=160-199 COMMAND"
    assert "echo 80-159 > /sys/fs/cgroup/kvtier-group5/cpuset.cpus" in cpuset_commands(slots[5])
    assert "echo 2-3 > /sys/fs/cgroup/kvtier-group5/cpuset.mems" in cpuset_commands(slots[5])


def test_the_report_says_it_all(tmp_path):
    topology = machine(tmp_path, A3)
    text = markdown(make_plan(load_plan_config(CONFIGS / "a3.yaml"), topology, service(2)), topology)
    for part in (
        "| group 1 | 0 | 0 | 0-39 | 1 | 40-79 | interleave:0-1 |",
        "forward-0",
        "numactl --physcpubind=0-39 --interleave=0-1",
        "/opt/engine/Motor",
    ):
        assert part in text
