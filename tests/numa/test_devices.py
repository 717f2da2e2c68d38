"""Laws checked: a device's node is found by the stated rule, in its order; -1 is unknown, never node 0; names mean what CUDA means."""

from __future__ import annotations

import pytest

from kvtier.errors import NumaError
from kvtier.numa.devices import choose_device, find_devices, normal_address, spread_unknown
from kvtier.numa.topology import read_topology
from tests.numa.machines import A3, ONE_NODE, TWO_SOCKETS, Machine, NodeSpec, PciSpec, build, write


def devices_of(root, *pci, nodes=None):
    build(root, Machine(nodes or TWO_SOCKETS.nodes, pci=pci))
    topology = read_topology(root)
    return topology, find_devices(topology, root)


def test_every_kind_is_found(tmp_path):
    root = build(tmp_path, TWO_SOCKETS)
    found = {device.name: (device.kind, device.node, device.how) for device in find_devices(read_topology(root), root)}
    assert found == {
        "0000:17:00.0": ("cuda", 0, "numa_node"),
        "0000:ca:00.0": ("cuda", 1, "numa_node"),
        "nvme0": ("nvme", 1, "numa_node"),
        "eth0": ("nic", 0, "numa_node"),
    }


def test_accelerators_of_the_machine_of_the_source(tmp_path):
    root = build(tmp_path, A3)
    found = find_devices(read_topology(root), root)
    assert [(device.kind, device.name, device.node) for device in found] == [("accel", f"accel{n}", n) for n in range(8)]
    assert choose_device(found, 5, root).node == 5
    assert choose_device(found, "npu:6", root).node == 6
    assert choose_device(found, "0003:01:00.0", root).node == 3


def test_the_bridge_answers_for_a_device_that_does_not_know(tmp_path):
    _, (device,) = devices_of(tmp_path, PciSpec("pci0000:80/0000:80:01.0/0000:ca:00.0", bridge_node=1))
    assert (device.node, device.how) == (1, "bridge")


def test_local_cpus_answer_unless_they_are_all(tmp_path):
    _, (device,) = devices_of(tmp_path / "a", PciSpec("pci0000:80/0000:ca:00.0", local_cpus="8-15"))
    assert (device.node, device.how) == (1, "local_cpulist")
    _, (device,) = devices_of(tmp_path / "b", PciSpec("pci0000:80/0000:ca:00.0", local_cpus="0-15"))
    assert (device.node, device.how) == (-1, "unknown")


def test_local_cpus_that_are_all_say_nothing_even_if_one_node_has_them(tmp_path):
    _, (device,) = devices_of(tmp_path, PciSpec("pci0000:80/0000:ca:00.0", local_cpus="0-1"), nodes={0: NodeSpec([0, 1]), 1: NodeSpec([])})
    assert (device.node, device.how) == (-1, "unknown")


def test_the_nearest_by_pci_path_answers_if_there_is_one_answer(tmp_path):
    near, far = PciSpec("pci0000:80/0000:cb:00.0", node=1), PciSpec("pci0000:00/0000:02:00.0", node=0)
    _, found = devices_of(tmp_path / "a", PciSpec("pci0000:80/0000:ca:00.0"), near, far)
    assert [(d.name, d.node, d.how) for d in found if d.name == "0000:ca:00.0"] == [("0000:ca:00.0", 1, "nearest")]
    disagreeing = PciSpec("pci0000:80/0000:cc:00.0", node=0)
    _, found = devices_of(tmp_path / "b", PciSpec("pci0000:80/0000:ca:00.0"), near, disagreeing)
    assert [d.node for d in found if d.name == "0000:ca:00.0"] == [-1]


def test_the_only_node_answers_on_one_node_machines(tmp_path):
    _, (device,) = devices_of(tmp_path, PciSpec("pci0000:00/0000:00:05.0"), nodes=ONE_NODE.nodes)
    assert (device.node, device.how) == (0, "only node")


def test_unknown_devices_are_dealt_round_robin(tmp_path):
    topology, found = devices_of(tmp_path, *(PciSpec(f"pci0000:0{n}/0000:0{n}:01.0") for n in range(3)))
    assert [device.node for device in found] == [-1, -1, -1]
    assert [(device.node, device.how) for device in spread_unknown(found, topology)] == [
        (0, "round robin"),
        (1, "round robin"),
        (0, "round robin"),
    ]


def test_a_node_that_is_not_there_is_unknown(tmp_path):
    _, (device,) = devices_of(tmp_path, PciSpec("pci0000:00/0000:00:05.0", node=7))
    assert device.node == -1


@pytest.mark.parametrize("address", ["00000000:CA:00.0", "0000:ca:00.0", "CA:00.0"])
def test_addresses_are_spelt_as_sysfs_does(address):
    assert normal_address(address) == "0000:ca:00.0"


def test_cuda_counts_visible_devices_only(tmp_path, monkeypatch):
    root = build(tmp_path, TWO_SOCKETS)
    found = find_devices(read_topology(root), root)
    assert choose_device(found, "cuda:1", root).node == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert choose_device(found, 0, root).node == 1
    with pytest.raises(NumaError, match="no device 1 here"):
        choose_device(found, 1, root)
    write(root / "proc/driver/nvidia/gpus/0000:ca:00.0/information", "GPU UUID: \t GPU-12ab")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-12,0")
    assert [choose_device(found, index, root).node for index in (0, 1)] == [1, 0]


@pytest.mark.parametrize("wanted", ["eth9", "cuda:7", -1, "0000:ff:00.0", ""])
def test_an_unknown_device_is_named_with_those_there_are(tmp_path, wanted):
    root = build(tmp_path, TWO_SOCKETS)
    with pytest.raises(NumaError, match="known ones: 0000:17:00.0"):
        choose_device(find_devices(read_topology(root), root), wanted, root)


def test_a_drive_is_known_by_its_namespaces_too(tmp_path):
    root = build(tmp_path, TWO_SOCKETS)
    assert choose_device(find_devices(read_topology(root), root), "nvme0n1p2", root).node == 1
