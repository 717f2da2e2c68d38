"""Laws checked: the host tier's memory is planned near its device and spills to the next nearest; what is explicit is met or refused; what
was achieved is said."""

from __future__ import annotations

import errno
import logging

import pytest

from kvtier.config import load_config
from kvtier.errors import ConfigError, NumaError
from kvtier.formats import get_format
from kvtier.numa.allowed import Allowed
from kvtier.numa.syscalls import MemoryPolicy, Mode
from kvtier.numa.topology import read_topology
from kvtier.testing.tiers import LAYOUT, put
from kvtier.tiers import host, host_nodes
from kvtier.tiers.host import HostTier
from kvtier.tiers.host_nodes import HostNodes, Segment, choose_nodes, plan_segments
from tests.numa.machines import MEMORY_ONLY, ONE_NODE, TWO_SOCKETS, build
from tests.numa.refuse import refuse

RAW = get_format("raw")
GIB = 1 << 30
NODE = read_topology().memory_nodes[0]


def planned(tmp_path, machine, mode, near=-1, gib=8, nodes=(), usable=None):
    topology = read_topology(build(tmp_path, machine))
    allowed = Allowed(frozenset(), frozenset(), frozenset(topology.memory_nodes if usable is None else usable))
    segments, why = plan_segments(mode, nodes, near, gib * GIB, topology, allowed)
    assert sum(segment.length for segment in segments) in (0, gib * GIB)
    assert bool(why) != bool(segments)
    return [(segment.policy.mode, segment.policy.nodes, segment.length / GIB) for segment in segments]


def test_memory_is_near_its_device(tmp_path):
    assert planned(tmp_path, TWO_SOCKETS, "auto", near=1) == [(Mode.PREFERRED, (1,), 8)]


def test_what_does_not_fit_goes_to_the_next_nearest(tmp_path):
    """Nodes 0, 1 and 2 have 32, 32 and 48 GiB free, of which nine tenths are taken; 2 is nearer to 0 than to 1."""
    first, second, third = planned(tmp_path, MEMORY_ONLY, "auto", near=1, gib=60)
    assert (first[1], second[1], third[1]) == ((1,), (0,), (2,))
    assert first[2] == pytest.approx(0.9 * 32, abs=0.01)
    assert planned(tmp_path / "b", MEMORY_ONLY, "auto", near=1, gib=60, usable={1, 2})[1][1] == (2,)


def test_what_fits_nowhere_is_left_to_the_nearest_nodes_policy(tmp_path):
    assert [segment[1] for segment in planned(tmp_path, TWO_SOCKETS, "auto", near=0, gib=100)] == [(0,), (1,), (0,)]


def test_explicit_nodes_share_evenly_and_interleave_takes_all(tmp_path):
    assert planned(tmp_path / "a", MEMORY_ONLY, "explicit", nodes=(2, 0)) == [(Mode.BIND, (2,), 4), (Mode.BIND, (0,), 4)]
    assert planned(tmp_path / "b", MEMORY_ONLY, "interleave") == [(Mode.INTERLEAVE, (0, 1, 2), 8)]


def test_nothing_is_bound_without_choice_or_device(tmp_path):
    assert planned(tmp_path / "a", ONE_NODE, "auto", near=0) == []
    assert planned(tmp_path / "b", TWO_SOCKETS, "auto") == []


def test_an_explicit_node_of_this_machine_holds_the_tier():
    tier = HostTier(LAYOUT, RAW, 4 << 20, numa="explicit", numa_nodes=(NODE,))
    report = tier.report()
    assert report["numa"] == f"{4 << 20} bytes on {NODE}"
    assert report["numa_segments"] == [{"bytes": 4 << 20, "nodes": [NODE], "share_there": 1.0}]
    tier.close()
    assert tier.report()["numa_segments"] == []


def test_off_and_auto_say_why_nothing_is_bound():
    for mode, why in (("off", "host.numa is off"), ("auto", "there is")):
        tier = HostTier(LAYOUT, RAW, 1 << 20, numa=mode)  # type: ignore[arg-type]
        assert str(tier.report()["numa"]).startswith(f"not bound: {why}")
        tier.close()


def test_explicit_that_cannot_be_met_is_an_error_and_auto_is_not(monkeypatch, caplog):
    with pytest.raises(ConfigError, match="host.numa is explicit, but there is no NUMA node 99"):
        HostTier(LAYOUT, RAW, 1 << 20, numa="explicit", numa_nodes=(99,))
    with pytest.raises(ConfigError, match=f"node {NODE} has \\d+ bytes left"):
        HostTier(LAYOUT, RAW, 1 << 50, numa="explicit", numa_nodes=(NODE,))
    refuse(monkeypatch, {"mbind": errno.EPERM})
    with pytest.raises(ConfigError, match="memory cannot be bound to nodes .*: Operation not permitted; allow mbind"):
        HostTier(LAYOUT, RAW, 1 << 20, numa="explicit", numa_nodes=(NODE,))
    segments = [Segment(0, 1 << 20, MemoryPolicy(Mode.PREFERRED, (NODE,)))]
    monkeypatch.setattr(host, "choose_nodes", lambda *_: HostNodes("auto", segments, ""))
    with caplog.at_level(logging.WARNING):
        tier = HostTier(LAYOUT, RAW, 1 << 20)
    assert "not bound: memory cannot be bound: Operation not permitted" in str(tier.report()["numa"])
    assert len(caplog.records) == 1
    tier.close()


def test_a_cpuset_without_cpus_near_the_memory_binds_it_all_the_same(monkeypatch):
    def first_touch(*_):
        raise NumaError("none of the CPUs is in this process's cpuset")

    monkeypatch.setattr(host_nodes, "first_touch", first_touch)
    tier = HostTier(LAYOUT, RAW, 1 << 20, numa="explicit", numa_nodes=(NODE,))
    assert tier.report()["numa_segments"] == [{"bytes": 1 << 20, "nodes": [NODE], "share_there": 1.0}]
    tier.close()


def test_where_pages_are_may_be_a_secret(monkeypatch):
    tier = HostTier(LAYOUT, RAW, 1 << 20, numa="explicit", numa_nodes=(NODE,))
    refuse(monkeypatch, {"move_pages": errno.EPERM})
    assert tier.report()["numa_segments"] == [{"bytes": 1 << 20, "nodes": [NODE], "share_there": None}]
    tier.close()


def test_slots_of_the_nearest_node_are_given_out_first_and_again(monkeypatch):
    """Two segments, the boundary inside a slot; both on one node here, which the free lists cannot know."""
    step = 2 << 20
    policy = MemoryPolicy(Mode.BIND, (NODE,))
    monkeypatch.setattr(host, "choose_nodes", lambda *_: HostNodes("explicit", [Segment(0, step, policy), Segment(step, step, policy)], ""))
    tier = HostTier(LAYOUT, RAW, 2 * step)
    near = step // tier.slot_bytes
    everything = put(tier, range(tier.capacity_slots))
    assert set(everything[:near]) == set(range(near))
    tier.free([near + 1, 3, near])
    tier.check_integrity()
    assert tier.free_slots == 3
    assert tier.reserve(1) == [3]
    assert sorted(tier.reserve(2) or []) == [near, near + 1]
    assert tier.reserve(1) is None
    tier.close()


def test_a_cuda_device_that_sysfs_does_not_know_leaves_memory_to_the_kernel():
    assert choose_nodes("auto", (), "cuda:0", 1 << 20).segments == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host.numa": "explicit"}, "belong together"),
        ({"host.numa_nodes": [0]}, "belong together"),
        ({"host.numa": "explicit", "host.numa_nodes": [0, 0]}, "names a node twice"),
        ({"host.numa": "on"}, "expected off, auto, interleave, explicit or layers"),
        ({"host.numa": "explicit", "host.numa_nodes": ["a"]}, "a list of node numbers"),
    ],
)
def test_wrong_configurations_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        load_config(env={}, overrides=settings)


def test_a_bare_off_in_yaml_is_off():
    config = load_config(env={}, overrides={"host.numa": False}).host
    assert config is not None
    assert config.numa == "off"
    assert host_nodes.choose_nodes("off", (), "cpu", 1).segments == []
