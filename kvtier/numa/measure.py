"""How fast each node's CPUs reach each node's memory, measured: bandwidth of reading, latency of a walk, first touch.

Each figure comes from threads bound to one node and memory bound to another, and is the median of several rounds, so that one disturbance
does not count. Nothing stays bound afterwards: the threads end.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, cast

from kvtier.numa.allowed import read_allowed
from kvtier.numa.binding import usable_cpus
from kvtier.numa.memory import NodeMemory
from kvtier.numa.syscalls import MemoryPolicy, Mode
from kvtier.numa.topology import Topology

_WALK_STEPS = 1 << 18
_libc = ctypes.CDLL(None)  # its calls release the interpreter's lock
_libc.memchr.restype = ctypes.c_void_p
_libc.memchr.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
Matrix = dict[int, dict[int, float]]
"""Figures by node of the CPUs and node of the memory."""


class Walk(Protocol):
    """The compiled walk of chase.c."""

    def link(self, buffer: memoryview, seed: int, /) -> None:
        """One random cycle over all cache lines of a buffer."""

    def walk(self, buffer: memoryview, steps: int, /) -> int:
        """Follow it."""


@dataclass(frozen=True)
class Measured:
    """GB/s of reading and of first touch, nanoseconds per dependent read (None without the compiled walk)."""

    read_gb_per_s: Matrix
    first_touch_gb_per_s: Matrix
    latency_ns: Matrix | None


def measure_nodes(topology: Topology, size_bytes: int, repeats: int = 5, progress: Callable[[str], None] = lambda _: None) -> Measured:
    """All pairs of a node with usable CPUs and a node memory may come from. `size_bytes` well beyond the caches, and free on each node.

    OSError if the kernel refuses to bind, or has not so much memory there.
    """
    allowed = read_allowed(topology)
    sources = [node for node in topology.cpu_nodes if allowed.cpus & set(topology.node(node).cpus)]
    targets = sorted(allowed.nodes)
    walk = compiled_walk()
    read: Matrix = {source: {} for source in sources}
    touch: Matrix = {source: {} for source in sources}
    latency: Matrix = {source: {} for source in sources}
    for target in targets:
        memory = NodeMemory(size_bytes, MemoryPolicy(Mode.BIND, (target,)))
        try:
            for source in sources:
                progress(f"node {source} reading node {target}")
                cpus = sorted(usable_cpus(source, topology))
                read[source][target] = size_bytes / _median(repeats, lambda: on_cpus(cpus, _readers(memory, len(cpus)))) / 1e9  # noqa: B023
            if walk is not None:
                walk.link(memory.view, target)
                for source in sources:
                    progress(f"node {source} walking through node {target}")
                    cpus = sorted(usable_cpus(source, topology))[:1]
                    step = [lambda: walk.walk(memory.view, _WALK_STEPS)]  # noqa: B023
                    latency[source][target] = _median(repeats, lambda: on_cpus(cpus, step)) / _WALK_STEPS * 1e9  # noqa: B023
        finally:
            memory.close()
        for source in sources:
            progress(f"node {source} touching node {target} first")
            touch[source][target] = size_bytes / statistics.median(_touch(source, target, size_bytes) for _ in range(repeats)) / 1e9
    return Measured(read, touch, latency if walk is not None else None)


def compiled_walk() -> Walk | None:
    """The walk of chase.c; None where it was not built."""
    try:
        return cast(Walk, importlib.import_module("kvtier.numa._chase"))
    except ImportError:
        return None


def on_cpus(cpus: Sequence[int], work: Sequence[Callable[[], object]]) -> float:
    """Seconds from a common start until all of `work` is done, each on a thread of its own that may run on any of `cpus`."""
    barrier = threading.Barrier(len(work) + 1)
    failures: list[BaseException] = []

    def run(task: Callable[[], object]) -> None:
        try:
            os.sched_setaffinity(0, cpus)
            barrier.wait()
            task()
        except BaseException as error:  # noqa: BLE001 -- handed on below, whatever it is
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(task,), name="kvtier-measure") for task in work]
    try:
        for thread in threads:
            thread.start()
        with suppress(threading.BrokenBarrierError):  # who broke it is raised below
            barrier.wait()
    except BaseException:  # a program that is told to end now: those that wait would for ever, and it for them
        barrier.abort()
        raise
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    for failure in failures:
        if not isinstance(failure, threading.BrokenBarrierError):
            raise failure
    return seconds


def _readers(memory: NodeMemory, count: int) -> list[Callable[[], object]]:
    """Work that reads all of a memory of zeros, in `count` parts: looking for a byte that is not there."""
    share = memory.length // count

    def part(position: int) -> Callable[[], object]:
        return lambda: _libc.memchr(memory.address + position * share, 1, share)

    return [part(position) for position in range(count)]


def _touch(source: int, target: int, size_bytes: int) -> float:
    """Seconds until fresh memory of `target` has been touched by CPUs of `source`."""
    started = time.perf_counter()
    memory = NodeMemory(size_bytes, MemoryPolicy(Mode.BIND, (target,)), touched_from=(source,))
    seconds = time.perf_counter() - started
    memory.close()
    return seconds


def _median(repeats: int, seconds: Callable[[], float]) -> float:
    seconds()  # once for nothing: threads, caches and clock rates come up
    return statistics.median(seconds() for _ in range(repeats))
