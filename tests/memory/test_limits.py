"""Laws checked: what can be had is the least of what the machine and every control group above the process leave, caches not counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtier.memory.limits import available_memory

MIB = 1 << 20


def with_tables(size_bytes: int) -> int:
    """What is left of `size_bytes` after page tables."""
    return size_bytes * 512 // 513


class FakeMachine:
    """A made-up /proc and /sys/fs/cgroup."""

    def __init__(self, root: Path, available: int, groups: str) -> None:
        self.root = root
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/meminfo").write_text(f"MemTotal: {1024 * MIB // 1024} kB\nMemAvailable: {available // 1024} kB\nHugePages_Total: 0\n")
        (root / "proc/self/cgroup").write_text(groups)

    def group(self, path: str, files: dict[str, object]) -> None:
        folder = self.root / "sys/fs/cgroup" / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_text(f"{content}\n")


@pytest.mark.parametrize("groups", ["", "0::/\n", "0::/../outside\n", "5:cpu:/a\n1:name=systemd:/b\n"])
def test_without_memory_limits_the_machine_decides(tmp_path, groups):
    machine = FakeMachine(tmp_path, 300 * MIB, groups)
    room = available_memory(machine.root)
    assert room.bytes == with_tables(300 * MIB)
    assert "MemAvailable" in room.why


@pytest.mark.parametrize("name", ["memory.max", "memory.high"])
def test_version_2_leaves_the_limit_less_use_that_is_no_cache(tmp_path, name):
    machine = FakeMachine(tmp_path, 900 * MIB, "0::/pod/box\n")
    stat = f"anon 1\ninactive_file {30 * MIB}\nactive_file {10 * MIB}\nslab_reclaimable {5 * MIB}"
    limits = {"memory.max": "max", "memory.high": "max"} | {name: 200 * MIB}
    machine.group("pod/box", {**limits, "memory.current": 95 * MIB, "memory.stat": stat})
    room = available_memory(machine.root)
    assert room.bytes == with_tables(150 * MIB)
    assert f"pod/box/{name} is {200 * MIB} bytes, {50 * MIB} of them in use" in room.why


def test_version_1_leaves_the_limit_less_use_that_is_no_cache(tmp_path):
    machine = FakeMachine(tmp_path, 900 * MIB, "5:cpu,cpuacct:/a\n4:memory:/a/b\n0::/\n")
    stat = f"inactive_file 7\ntotal_inactive_file {30 * MIB}\ntotal_active_file {10 * MIB}"
    files = {"memory.limit_in_bytes": 200 * MIB, "memory.usage_in_bytes": 90 * MIB, "memory.stat": stat}
    machine.group("memory/a/b", files)
    machine.group("memory", files | {"memory.limit_in_bytes": 9223372036854771712})
    assert available_memory(machine.root).bytes == with_tables(150 * MIB)


@pytest.mark.parametrize("tight", ["", "pod", "pod/box"])
def test_the_tightest_group_on_the_way_up_decides(tmp_path, tight):
    machine = FakeMachine(tmp_path, 900 * MIB, "0::/pod/box\n")
    for path in ("", "pod", "pod/box"):
        limit = 64 * MIB if path == tight else 128 * MIB
        machine.group(path, {"memory.max": limit, "memory.current": 0, "memory.stat": "anon 1"})
    assert available_memory(machine.root).bytes == with_tables(64 * MIB)


def test_a_container_that_sees_only_its_own_group_as_the_top_is_bounded_by_it(tmp_path):
    machine = FakeMachine(tmp_path, 900 * MIB, "4:memory:/docker/0123\n")
    machine.group("memory", {"memory.limit_in_bytes": 50 * MIB, "memory.usage_in_bytes": MIB, "memory.stat": "anon 1"})
    assert available_memory(machine.root).bytes == with_tables(49 * MIB)


def test_a_group_beyond_its_limit_leaves_nothing(tmp_path):
    machine = FakeMachine(tmp_path, 900 * MIB, "0::/\n")
    machine.group("", {"memory.max": 50 * MIB, "memory.current": 60 * MIB, "memory.stat": "anon 1"})
    assert available_memory(machine.root).bytes == 0


def test_this_machine_has_some_and_not_more_than_it_says():
    room = available_memory()
    total = next(int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
    assert 0 < room.bytes < total
