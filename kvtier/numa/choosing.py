"""Which node to work on, and whether binding pays: measured on this machine, with the same work before and after.

Binding pays for services that are bound once and for large batches; it does not for small work that is bound call by call, because each
switch takes system calls and cold caches (best practices document of the sources). `compare_binding` says from which size on.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

from kvtier.errors import NumaError
from kvtier.numa.allowed import read_allowed
from kvtier.numa.binding import get_device_numa_node, memory_policy, this_machine, thread_on_numa_node, usable_cpus
from kvtier.numa.measure import on_cpus
from kvtier.numa.memory import NodeMemory
from kvtier.numa.syscalls import MemoryPolicy, Mode
from kvtier.numa.topology import Topology

_PAGE_BYTES = 128 << 10
"""A KV page of a small model; the unit of the work that is compared."""
_QUICK_BYTES = 32 << 20
_CLOSE = 0.05  # bandwidths this near to the best are as good: then free memory decides


@dataclass(frozen=True)
class Comparison:
    """The same work, copying pages, done unbound and bound to `node`; seconds per page. `switch_seconds`: binding and going back once."""

    node: int
    unbound: float
    bound: float
    switch_seconds: float
    nodes: int

    @property
    def gain(self) -> float:
        """How much less time the bound work takes: 0.1 is 10 %."""
        return 1 - self.bound / self.unbound

    @property
    def break_even_pages(self) -> float | None:
        """Pages per call from which on even binding for each call pays; None if it never does."""
        saved = self.unbound - self.bound
        return self.switch_seconds / saved if saved > 0 else None

    def verdict(self) -> str:
        """In words, with what to do."""
        if self.nodes < 2:
            return f"one node: there is nothing to gain; binding call by call would cost {self.switch_seconds * 1e6:.0f} us each time"
        if self.gain < _CLOSE or self.break_even_pages is None:
            return f"binding does not pay for this work here ({self.gain:+.1%} of its time, which is noise); leave it to the scheduler"
        switching, kib = self.switch_seconds * 1e6, _PAGE_BYTES >> 10
        return (
            f"binding to node {self.node} saves {self.gain:.0%}: bind once, at start. Call by call it costs {switching:.0f} us and "
            f"does not pay below {self.break_even_pages:.0f} pages of {kib} KiB per call, nor when switching between nodes"
        )


def get_optimal_numa_node(device: int | str | None = None) -> int:
    """The node to work on: that of `device`, if one is named and known; else the one that copies fastest within itself, measured once per
    process (a fraction of a second), with more free memory deciding between equals. NumaError if no node has both CPUs and memory for us.
    """
    if device is not None:
        node = get_device_numa_node(device)
        if node >= 0:
            return node
    with _measuring:
        return _fastest_node()


_measuring = threading.Lock()  # two threads measuring at once would disturb each other


@lru_cache(maxsize=1)
def _fastest_node() -> int:
    topology = this_machine()
    allowed = read_allowed(topology)
    candidates = [node for node in topology.nodes if node.id in allowed.nodes and allowed.cpus & set(node.cpus)]
    if not candidates:
        raise NumaError(f"no node has both CPUs and memory for this process, which may use {allowed.describe()}")
    if len(candidates) == 1:
        return candidates[0].id
    speed = {node.id: 1 / copy_seconds(node.id, _QUICK_BYTES, topology) for node in candidates}
    best = max(speed.values())
    equals = [node for node in candidates if speed[node.id] >= best * (1 - _CLOSE)]
    return max(equals, key=lambda node: node.free_bytes).id


def copy_seconds(node: int, size_bytes: int, topology: Topology, repeats: int = 5) -> float:
    """Median seconds of copying `size_bytes` within a node, one thread of it working."""
    policy = MemoryPolicy(Mode.BIND, (node,))
    source, target = NodeMemory(size_bytes, policy), NodeMemory(size_bytes, policy)
    try:
        cpus = sorted(usable_cpus(node, topology))
        work = [lambda: ctypes.memmove(target.address, source.address, size_bytes)]
        return statistics.median(on_cpus(cpus, work) for _ in range(repeats))
    finally:
        source.close()
        target.close()


def compare_binding(node: int, size_bytes: int, repeats: int = 7) -> Comparison:
    """Copy `size_bytes` in pages, unbound and bound to `node` in turn. Unbound is as a service that binds nothing: memory touched first by
    one thread, worked on by another, each where the scheduler put it."""
    topology = this_machine()
    pages = max(1, size_bytes // _PAGE_BYTES)
    unbound, bound = [], []
    for _ in range(repeats):
        unbound.append(_in_thread(lambda: _work(pages, None)))
        bound.append(_in_thread(lambda: _work(pages, node)))
    return Comparison(
        node, statistics.median(unbound) / pages, statistics.median(bound) / pages, _switch_seconds(node), len(topology.memory_nodes)
    )


def _work(pages: int, node: int | None) -> float:
    """Seconds of copying pages from one buffer to another, in memory as it comes, or all on one node."""
    if node is not None:
        with thread_on_numa_node(node):
            return _copied(pages)
    with memory_policy(MemoryPolicy()):
        return _copied(pages)


def _copied(pages: int) -> float:
    source, target = (ctypes.create_string_buffer(pages * _PAGE_BYTES) for _ in range(2))
    ctypes.memset(source, 1, pages * _PAGE_BYTES)
    ctypes.memset(target, 1, pages * _PAGE_BYTES)
    reached, wanted = ctypes.addressof(source), ctypes.addressof(target)

    def copy() -> None:
        for offset in range(0, pages * _PAGE_BYTES, _PAGE_BYTES):
            ctypes.memmove(wanted + offset, reached + offset, _PAGE_BYTES)

    # By another thread than the one that touched: where it runs is what binding decides.
    return on_cpus(sorted(os.sched_getaffinity(0)), [copy])


def _switch_seconds(node: int) -> float:
    rounds = 50
    started = time.perf_counter()
    for _ in range(rounds):
        with thread_on_numa_node(node):
            pass
    return (time.perf_counter() - started) / rounds


def _in_thread(work: Callable[[], float]) -> float:
    """The result of work done by a new thread, so that the scheduler chooses anew."""
    with ThreadPoolExecutor(1, thread_name_prefix="kvtier-compare") as pool:
        return pool.submit(work).result()
