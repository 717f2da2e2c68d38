"""Laws checked: every pair is measured and named, the walk visits every line, verdicts follow from the figures. No figure is judged."""

from __future__ import annotations

import errno
import json
import os

import pytest

from kvtier.cli import main
from kvtier.errors import NumaError
from kvtier.numa import choosing, measure
from kvtier.numa.choosing import Comparison, compare_binding, get_optimal_numa_node
from kvtier.numa.measure import compiled_walk, measure_nodes, on_cpus
from kvtier.numa.topology import read_topology
from tests.numa.refuse import refuse

TOPOLOGY = read_topology()


def test_the_walk_is_one_cycle_over_all_lines():
    walk = compiled_walk()
    if walk is None:
        pytest.skip("chase.c was not compiled here")
    lines = 1000
    buffer = memoryview(bytearray(lines * 64))
    walk.link(buffer, 7)
    visited = {walk.walk(buffer, steps) for steps in range(lines)}
    assert visited == set(range(lines))
    assert walk.walk(buffer, lines) == 0


def test_the_walk_trusts_no_buffer():
    walk = compiled_walk()
    if walk is None:
        pytest.skip("chase.c was not compiled here")
    with pytest.raises(ValueError, match="was not linked"):
        walk.walk(memoryview(bytearray(b"\xff" * 256)), 10)
    with pytest.raises(ValueError, match="at least 128 bytes"):
        walk.link(memoryview(bytearray(64)), 0)


def test_all_pairs_are_measured():
    found = measure_nodes(TOPOLOGY, 4 << 20, repeats=1)
    assert set(found.read_gb_per_s) == set(TOPOLOGY.cpu_nodes)
    for matrix in filter(None, (found.read_gb_per_s, found.first_touch_gb_per_s, found.latency_ns)):
        assert all(set(row) == set(TOPOLOGY.memory_nodes) and min(row.values()) > 0 for row in matrix.values())


def test_a_failure_on_a_measuring_thread_is_raised():
    with pytest.raises(ZeroDivisionError):
        on_cpus([TOPOLOGY.cpus[0].id], [lambda: 1 / 0])


def test_the_optimal_node_has_cpus_and_memory():
    assert get_optimal_numa_node() in set(TOPOLOGY.cpu_nodes) & set(TOPOLOGY.memory_nodes)


def test_the_node_of_a_device_goes_first(monkeypatch):
    monkeypatch.setattr(choosing, "get_device_numa_node", lambda _: 42)
    assert get_optimal_numa_node("cuda:0") == 42
    monkeypatch.setattr(choosing, "get_device_numa_node", lambda _: -1)
    assert get_optimal_numa_node("cuda:0") == get_optimal_numa_node()


def test_verdicts_follow_from_the_figures():
    assert "one node" in Comparison(0, 2.0, 1.0, 1e-5, nodes=1).verdict()
    assert "does not pay" in Comparison(0, 1.0, 1.0, 1e-5, nodes=2).verdict()
    assert "does not pay" in Comparison(0, 1.0, 0.98, 1e-5, nodes=2).verdict()
    pays = Comparison(1, 10e-6, 8e-6, 100e-6, nodes=2)
    assert pays.break_even_pages == pytest.approx(50)
    assert "saves 20%: bind once" in pays.verdict()
    assert "below 50 pages" in pays.verdict()


def test_the_same_work_is_done_both_ways():
    found = compare_binding(TOPOLOGY.memory_nodes[0], 1 << 20, repeats=1)
    assert min(found.unbound, found.bound, found.switch_seconds) > 0


def test_the_commands(capsys):
    assert main(["numa", "bench", "--tiny", "--repeats", "1", "--json", "-"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["comparison"]["verdict"]
    node = str(TOPOLOGY.memory_nodes[0])
    assert shown["read_gb_per_s"][str(TOPOLOGY.cpu_nodes[0])][node] > 0
    assert main(["numa", "stats", "--seconds", "0.01", "--pid", str(os.getpid()), "--json", "-"]) == 0
    assert sum(json.loads(capsys.readouterr().out)["process"]["bytes_by_node"].values()) > 1 << 20


@pytest.mark.parametrize("arguments", [["bench", "--size-bytes", "many"], ["bench", "--size-bytes", "1"], ["stats", "--pid", "99999999"]])
def test_bad_input_is_one_line(arguments, capsys):
    assert main(["numa", *arguments]) == 2
    assert capsys.readouterr().err.startswith("kvtier: error: --")


def test_a_kernel_that_refuses_is_said(monkeypatch, capsys):
    refuse(monkeypatch, {"mbind": errno.ENOMEM})
    assert main(["numa", "bench", "--tiny"]) == 2
    assert "the kernel refuses to measure" in capsys.readouterr().err


def test_without_the_compiled_walk_latency_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(measure, "compiled_walk", lambda: None)
    assert main(["numa", "bench", "--tiny", "--repeats", "1"]) == 0
    assert "latency: not measured" in capsys.readouterr().out


def test_no_node_for_us_is_an_error(monkeypatch):
    from dataclasses import replace

    bare = replace(TOPOLOGY, nodes=tuple(replace(node, cpus=()) for node in TOPOLOGY.nodes))
    monkeypatch.setattr(choosing, "this_machine", lambda: bare)
    with pytest.raises(NumaError, match="no node has both"):
        choosing._fastest_node.__wrapped__()
