"""Laws checked: the model gives the worked examples of the sources; counters are read and compared as the kernel writes them."""

from __future__ import annotations

import math

import pytest

from kvtier.numa import model
from kvtier.numa.counters import local_remote_ratio, node_balance, rates, read_counters
from tests.numa.machines import TWO_SOCKETS, build, write

GB = 1e9


def test_mean_latency_of_the_exercise_is_18_ns():
    assert model.mean_access_latency([0.6, 0.3, 0.1], [10, 25, 45]) == pytest.approx(18)


def test_bandwidth_of_the_exercise_is_75_gb_per_s_and_75_percent():
    effective = model.effective_bandwidth(0.75, 90, 30)
    assert effective == pytest.approx(75)
    assert model.bandwidth_efficiency(4 * effective, 100, 4) == pytest.approx(0.75)


def test_all_reduce_of_the_exercise_is_3_5_times_faster():
    ring = model.ring_all_reduce_seconds(4 * GB, 8, 50 * GB)
    overlapped = model.overlapped_all_reduce_seconds(4 * GB, 4, 200 * GB, 50 * GB)
    assert [ring, overlapped, ring / overlapped] == pytest.approx([0.28, 0.08, 3.5])


def test_the_closed_formula_takes_the_steps_one_by_one():
    assert model.hierarchical_all_reduce_seconds(4 * GB, 4, 200 * GB, 50 * GB) == pytest.approx(0.11)


def test_roofline_and_efficiency():
    assert model.roofline(1000, 2, 75) == 150
    assert model.roofline(100, 2, 75) == 100
    assert model.parallel_efficiency(6.8, 8) == pytest.approx(0.85)


def test_transfers_overlap_in_chunks():
    assert model.pipelined_seconds(1.0, model.transfer_seconds(10, 4, 0.5), 2.0) == 3.0


@pytest.mark.parametrize(
    "call",
    [
        lambda: model.mean_access_latency([0.5, 0.4], [1, 2]),
        lambda: model.mean_access_latency([1], [1, 2]),
        lambda: model.mean_access_latency([1.5, -0.5], [1, 2]),
        lambda: model.effective_bandwidth(1.1, 1, 1),
    ],
)
def test_what_cannot_be_is_refused(call):
    with pytest.raises(ValueError, match="expected|give"):
        call()


def test_balance_is_one_minus_relative_deviation():
    assert node_balance([5, 5, 5]) == 1
    assert node_balance([0, 0]) == 1
    assert node_balance([2, 4]) == pytest.approx(1 - 1 / 3)
    assert node_balance([0, 0, 0, 8]) == pytest.approx(1 - math.sqrt(3))


def test_ratio_without_remote_accesses_is_infinite():
    assert local_remote_ratio(10, 0) == math.inf
    assert local_remote_ratio(10, 4) == 2.5


def test_two_readings_make_rates(tmp_path):
    root = build(tmp_path, TWO_SOCKETS)
    write(root / "proc/vmstat", "nr_free_pages 5\npgmigrate_success 100")
    before = read_counters(root)
    assert before.by_node[0]["local_node"] == 900
    write(root / "proc/vmstat", "nr_free_pages 5\npgmigrate_success 400")
    write(root / "sys/devices/system/node/node0/numastat", "numa_hit 1\nnuma_miss 7\nlocal_node 960\nother_node 120")
    change = rates(before, read_counters(root))
    assert (change.local_pages, change.remote_pages, change.misses) == (60, 20, 7)
    assert change.local_share == 0.75
    assert change.migrations_per_s == pytest.approx(300 / change.seconds)
    assert change.balance == pytest.approx(node_balance([80, 0]))


def test_this_machine_counts():
    assert rates(read_counters(), read_counters()).migrations_per_s >= 0
