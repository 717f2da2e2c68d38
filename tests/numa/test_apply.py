"""Laws checked on real processes: a plan is applied whole per process, read back from the kernel, and undone; what vanished is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvtier.cli import main
from kvtier.errors import NumaError
from kvtier.numa.apply import apply_plan, undo
from kvtier.numa.plan import make_plan
from kvtier.numa.plan_config import PlanConfig
from kvtier.numa.processes import list_processes, read_process
from kvtier.numa.report import markdown
from kvtier.numa.topology import read_topology
from kvtier.numa.verify import verify_plan
from tests.numa.machines import Machine, NodeSpec, build

CPUS = sorted(os.sched_getaffinity(0))
pytestmark = pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs to tell bound from not bound")

_SERVICE = """
import sys, threading
from ctypes import CDLL
ready = threading.Barrier(3)
def work(name):
    CDLL(None).prctl(15, name.encode(), 0, 0, 0)
    ready.wait()
    threading.Event().wait()
for name in ("forward-0", "io"):
    threading.Thread(target=work, args=(name,), daemon=True).start()
ready.wait()
print("ready", flush=True)
sys.stdin.read()
"""


class Service:
    """Real processes with the threads a group has, named so that only these are found."""

    def __init__(self) -> None:
        self.mark = f"kvtier-test-{os.getpid()}-{time.monotonic_ns()}"
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, kind: str, wrapper: tuple[str, ...] = ()) -> int:
        command = [*wrapper, sys.executable, "-c", _SERVICE, f"{self.mark}-{kind}"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process.pid

    def config(self, **more: object) -> PlanConfig:
        return PlanConfig(group_patterns=(f"{self.mark}-worker",), forward_thread_patterns=("forward",), **more)  # type: ignore[arg-type]


@pytest.fixture
def service():
    made = Service()
    yield made
    for process in made.processes:
        process.kill()
        process.communicate()


@pytest.fixture
def two_nodes(tmp_path):
    """This machine seen as one socket of two nodes with a CPU each, so that bindings differ."""
    return read_topology(build(tmp_path / "machine", Machine({0: NodeSpec([CPUS[0]]), 1: NodeSpec([CPUS[1]])})))


def affinities(pid: int) -> dict[str, set[int]]:
    process = read_process(pid)
    assert process is not None
    return {thread.name: os.sched_getaffinity(thread.id) for thread in process.threads}


def test_apply_verify_undo(service, two_nodes, tmp_path):
    pid = service.start("worker")
    before = affinities(pid)
    plan = make_plan(service.config(), two_nodes, list_processes())
    assert len(verify_plan(plan).differences) == 3
    (outcome,) = apply_plan(plan, two_nodes, tmp_path / "undo.json")
    assert (outcome.threads, outcome.why) == (3, "")
    now = affinities(pid)
    assert now.pop("forward-0") == {CPUS[1]}
    assert set(map(frozenset, now.values())) == {frozenset({CPUS[0]})}
    checked = verify_plan(make_plan(service.config(), two_nodes, list_processes()))
    assert (checked.threads, checked.differences) == (3, ())
    assert "Everything is as planned." in markdown(plan, two_nodes, checked)
    apply_plan(plan, two_nodes, tmp_path / "undo.json")  # a second time must not forget what was before the first
    assert [o.why for o in undo(tmp_path / "undo.json")] == [""]
    assert affinities(pid) == before
    assert not (tmp_path / "undo.json").exists()


def test_one_thread_bound_elsewhere_is_a_difference(service, two_nodes, tmp_path):
    pid = service.start("worker")
    plan = make_plan(service.config(), two_nodes, list_processes())
    apply_plan(plan, two_nodes, tmp_path / "undo.json")
    (thread,) = [thread.id for thread in plan.processes[0].threads if thread.name == "io"]
    os.sched_setaffinity(thread, {CPUS[1]})
    (difference,) = verify_plan(plan).differences
    assert str(difference) == f"process {pid} thread {thread}: affinity of io is {CPUS[1]}, expected {CPUS[0]}"


def test_a_refused_thread_puts_its_process_back_and_the_others_stay_bound(service, two_nodes, tmp_path, monkeypatch):
    first, second = service.start("worker"), service.start("worker")
    before = affinities(first)
    plan = make_plan(service.config(groups_per_socket=2), two_nodes, list_processes())
    refused = plan.processes[0].threads[-1].id
    real = os.sched_setaffinity

    def set_affinity(thread: int, cpus: set[int]) -> None:
        if thread == refused:
            raise PermissionError(1, "Operation not permitted")
        real(thread, cpus)

    monkeypatch.setattr(os, "sched_setaffinity", set_affinity)
    outcomes = {outcome.pid: outcome for outcome in apply_plan(plan, two_nodes, tmp_path / "undo.json")}
    monkeypatch.undo()
    assert "Operation not permitted; it is as it was" in outcomes[first].why
    assert affinities(first) == before
    assert affinities(second)["forward-0"] == {CPUS[1]}


def test_a_process_that_ended_is_said_and_a_later_one_with_its_pid_untouched(service, two_nodes, tmp_path):
    service.start("worker")
    plan = make_plan(service.config(), two_nodes, list_processes())
    service.processes[0].kill()
    service.processes[0].wait()
    (outcome,) = apply_plan(plan, two_nodes, tmp_path / "undo.json")
    assert outcome.why == "it has ended since it was planned"
    assert verify_plan(plan).threads == 0


def test_undo_leaves_out_what_has_ended_and_refuses_other_files(service, two_nodes, tmp_path):
    service.start("worker")
    apply_plan(make_plan(service.config(), two_nodes, list_processes()), two_nodes, tmp_path / "undo.json")
    record = json.loads((tmp_path / "undo.json").read_text())
    record["processes"][0]["started"] += 1
    (tmp_path / "undo.json").write_text(json.dumps(record))
    assert [outcome.why for outcome in undo(tmp_path / "undo.json")] == ["it has ended"]
    with pytest.raises(NumaError, match="no such undo file"):
        undo(tmp_path / "undo.json")
    (tmp_path / "undo.json").write_text("[]")
    with pytest.raises(NumaError, match="is not an undo file"):
        undo(tmp_path / "undo.json")
    (tmp_path / "undo.json").write_text(json.dumps({**record, "boot": "another"}))
    with pytest.raises(NumaError, match="before this machine was started"):
        undo(tmp_path / "undo.json")


def test_nothing_is_bound_when_undo_cannot_be_written(service, two_nodes):
    pid = service.start("worker")
    before = affinities(pid)
    with pytest.raises(NumaError, match="nothing was bound"):
        apply_plan(make_plan(service.config(), two_nodes, list_processes()), two_nodes, Path("/nowhere/undo.json"))
    assert affinities(pid) == before


def test_threads_started_while_binding_are_bound_too(service, two_nodes, tmp_path, monkeypatch):
    """The planned list of threads is not the last word: what runs counts."""
    pid = service.start("worker")
    plan = make_plan(service.config(), two_nodes, list_processes())
    stale = plan.processes[0].__class__(**{**vars(plan.processes[0]), "threads": plan.processes[0].threads[:1]})
    (outcome,) = apply_plan(plan.__class__((stale,), plan.slots, plan.notes, plan.config), two_nodes, tmp_path / "undo.json")
    assert outcome.threads == 3
    assert affinities(pid)["forward-0"] == {CPUS[1]}


def test_the_commands(service, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pid = service.start("worker")
    (tmp_path / "plan.yaml").write_text(f"group_patterns: [{service.mark}-worker]\nforward_thread_patterns: [forward]\n")
    before = affinities(pid)
    assert main(["numa", "plan", "--config", "plan.yaml", "--json", "-"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [process["pid"] for process in shown["processes"]] == [pid]
    assert main(["numa", "apply", "--config", "plan.yaml"]) == 0
    assert "Dry run" in capsys.readouterr().out
    assert affinities(pid) == before
    os.sched_setaffinity(pid, {CPUS[0]})
    assert main(["numa", "verify", "--config", "plan.yaml"]) == 1
    assert "differs: process" in capsys.readouterr().out
    assert main(["numa", "apply", "--config", "plan.yaml", "--apply"]) == 0
    assert main(["numa", "verify", "--config", "plan.yaml"]) == 0
    assert main(["numa", "report", "--config", "plan.yaml"]) == 0
    assert "# NUMA binding report" in (tmp_path / "numa_binding_report.md").read_text()
    assert main(["numa", "undo"]) == 0
    assert affinities(pid) != before  # what was before `apply`, not before this test's own change
    assert os.sched_getaffinity(pid) == {CPUS[0]}
    assert main(["numa", "plan", "--config", "plan.yaml", "--start"]) == 0
    assert "numactl --physcpubind=" in capsys.readouterr().out


def test_bad_input_is_one_line(tmp_path, capsys):
    (tmp_path / "plan.yaml").write_text("group_patterns: [nobody-is-called-this-here]\n")
    assert main(["numa", "apply", "--config", str(tmp_path / "plan.yaml"), "--apply"]) == 2
    assert capsys.readouterr().err.startswith("kvtier: error: no process matches")
    assert main(["numa", "undo", "--undo-file", str(tmp_path / "none")]) == 2


def test_memory_is_verified_where_a_plan_asks_for_it(service, tmp_path):
    """One process started as the report says, one not: only the second differs."""
    topology = read_topology()
    bound = (
        "import os, sys; from kvtier.numa import syscalls as s\n"
        "s.set_mempolicy(s.MemoryPolicy(s.Mode.INTERLEAVE, tuple(map(int, sys.argv[1].split(',')))))\n"
        "os.execv(sys.argv[2], sys.argv[2:])"
    )
    nodes = next(iter(topology.sockets.values()))
    good = service.start("worker", (sys.executable, "-c", bound, ",".join(map(str, nodes))))
    config = service.config(memory="interleave")
    plan = make_plan(config, topology, list_processes())
    apply_plan(plan, topology, tmp_path / "undo.json")
    assert verify_plan(plan).differences == ()
    assert verify_plan(plan).memory[good]
    bad = service.start("worker")
    plan = make_plan(service.config(memory="interleave", groups_per_socket=2), topology, list_processes())
    differing = {(difference.pid, difference.what) for difference in verify_plan(plan).differences}
    assert (bad, "memory policy") in differing
    assert (good, "memory policy") not in differing
