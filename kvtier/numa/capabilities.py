"""What the kernel and the container allow, tried for real: each NUMA call made once on a page of its own, in a thread that then ends.

`get_mempolicy` succeeding proves nothing: seccomp filters and missing rights forbid setting, or moving, one by one.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kvtier.numa import syscalls
from kvtier.numa.allowed import read_allowed
from kvtier.numa.placement import PAGE_BYTES
from kvtier.numa.syscalls import MemoryPolicy, Mode
from kvtier.numa.topology import ROOT, Topology, read_number, read_text


@dataclass(frozen=True)
class Capability:
    """One thing tried: `state`, what that means or what is done instead, and the kernel's error if there was one."""

    name: str
    state: Literal["available", "degraded", "unavailable"]
    meaning: str
    errno: int = 0


def probe(topology: Topology) -> list[Capability]:
    """All capabilities on this machine. Takes some milliseconds; changes nothing for the calling thread."""
    found: list[Capability] = []

    def work() -> None:
        allowed = read_allowed(topology)
        nodes = sorted(allowed.nodes) or [topology.memory_nodes[0]]
        found.extend(
            [
                _tried(
                    "CPU binding", lambda: os.sched_setaffinity(0, os.sched_getaffinity(0)), "threads stay where the scheduler puts them"
                ),
                _tried(
                    "thread memory policy",
                    lambda: syscalls.set_mempolicy(MemoryPolicy(Mode.PREFERRED, (nodes[0],))),
                    "first touch by bound threads decides where memory is",
                ),
                *(_binding(node) for node in nodes),
                _tried("where pages are", lambda: _touched_page(_node_of), "placement cannot be verified page by page"),
                _moving(nodes),
                _mode("interleave", Mode.INTERLEAVE, nodes, "first touch by threads of each node in turn"),
                _mode("weighted interleave", Mode.WEIGHTED_INTERLEAVE, nodes, "plain interleave (Linux before 6.9)"),
                _mode("preferred nodes", Mode.PREFERRED_MANY, nodes, "one preferred node (Linux before 5.15)"),
                _huge_pages(topology),
                _balancing(),
            ]
        )

    thread = threading.Thread(target=work, name="kvtier-probe")
    thread.start()
    thread.join()
    return found


def _tried(
    name: str, attempt: Callable[[], object], otherwise: str, state: Literal["degraded", "unavailable"] = "unavailable"
) -> Capability:
    try:
        attempt()
    except OSError as error:
        return Capability(name, state, f"{error.strerror}: {otherwise}", error.errno or 0)
    return Capability(name, "available", "tried and done")


def _touched_page(use: Callable[[int], object], policy: MemoryPolicy | None = None) -> object:
    """`use` called with the address of a page of its own, bound and then touched."""
    page = mmap.mmap(-1, PAGE_BYTES)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    if policy is not None:
        syscalls.mbind(address, PAGE_BYTES, policy)
    page[0] = 1
    return use(address)


def _node_of(address: int) -> int:
    (node,) = syscalls.move_pages([address])
    if node < 0:
        raise OSError(-node, os.strerror(-node))
    return node


def _binding(node: int) -> Capability:
    name = f"memory on node {node}"
    try:
        landed = _touched_page(_node_of, MemoryPolicy(Mode.BIND, (node,)))
    except OSError as error:
        return Capability(name, "unavailable", f"{error.strerror}: first touch by bound threads decides where memory is", error.errno or 0)
    if landed != node:
        return Capability(name, "degraded", f"the kernel took the policy, but the page is on node {landed}")
    return Capability(name, "available", "a page was bound and is there")


def _moving(nodes: list[int]) -> Capability:
    if len(nodes) < 2:
        return Capability("moving pages", "degraded", "there is one node only, nowhere to move to")

    def move(address: int) -> None:
        target = nodes[0] if _node_of(address) != nodes[0] else nodes[1]
        (landed,) = syscalls.move_pages([address], [target])
        if landed != target:
            raise OSError(-landed, os.strerror(-landed)) if landed < 0 else OSError(0, f"the page stayed on node {landed}")

    return _tried("moving pages", lambda: _touched_page(move), "pages stay where they were touched first")


def _mode(name: str, mode: Mode, nodes: list[int], otherwise: str) -> Capability:
    return _tried(name, lambda: _touched_page(lambda _: None, MemoryPolicy(mode, tuple(nodes))), otherwise, "degraded")


def _huge_pages(topology: Topology) -> Capability:
    free = {node.id: pages.free for node in topology.nodes for pages in node.huge_pages if pages.free and pages.size_bytes == 2 << 20}
    if not free:
        return Capability(
            "huge pages per node", "degraded", "none set apart (nodeN/hugepages/.../nr_hugepages): transparent ones, or 4 KiB"
        )
    return Capability("huge pages per node", "available", ", ".join(f"{count} free on node {node}" for node, count in free.items()))


def _balancing() -> Capability:
    if not read_text(ROOT / "proc/sys/kernel/numa_balancing"):
        return Capability("automatic balancing off", "available", "this kernel has none")
    if read_number(ROOT / "proc/sys/kernel/numa_balancing", 0):
        meaning = (
            "the kernel moves pages by itself and stalls threads to see who uses them; `sysctl kernel.numa_balancing=0` for bound services"
        )
        return Capability("automatic balancing off", "degraded", meaning)
    return Capability("automatic balancing off", "available", "pages stay where they were put")
