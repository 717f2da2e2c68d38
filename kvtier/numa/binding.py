"""Binding this process and its threads to nodes, under the names that xLLM's NUMA utilities use (utilities document of the sources).

What the kernel refuses is done without, in one log line, unless `strict` asks for an error; CPUs and memory succeed or fail apart,
because containers often allow the one and not the other. A node that does not exist is always an error. Safe from any thread: nothing is
kept here but a description of the machine, which does not change.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from kvtier.errors import NumaError
from kvtier.numa import syscalls
from kvtier.numa.allowed import read_allowed
from kvtier.numa.devices import choose_device, find_devices, spread_unknown
from kvtier.numa.ids import format_ids
from kvtier.numa.syscalls import MemoryPolicy, Mode
from kvtier.numa.topology import ROOT, UNKNOWN_NODE, Topology, read_topology

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bound:
    """What a binding achieved: `cpus` now in use (empty: not bound), whether new `memory` comes from the node, and `why` not more."""

    node: int
    cpus: tuple[int, ...]
    memory: bool
    why: str = ""


@lru_cache(maxsize=1)
def this_machine() -> Topology:
    """The topology of this machine, read once; its figures of free memory are from then."""
    return read_topology()


def is_numa_available() -> bool:
    """Whether the kernel knows nodes and lets this process ask for memory policies. True on one-node machines too."""
    try:
        syscalls.get_mempolicy()
        return this_machine().numa
    except (OSError, NumaError):
        return False


def get_num_numa_nodes() -> int:
    """How many nodes there are: 1 where the kernel knows none."""
    return len(this_machine().nodes)


def get_numa_node_cpus(numa_node: int) -> tuple[int, ...]:
    """Online CPUs of a node; empty for one that has only memory. NumaError if there is no such node."""
    return this_machine().node(numa_node).cpus


def get_current_numa_node() -> int:
    """The node the calling thread runs on at this moment, or -1 if the kernel does not say."""
    try:
        _, node = syscalls.getcpu()
    except OSError:
        return UNKNOWN_NODE
    return node if node in this_machine().node_ids else UNKNOWN_NODE


def get_device_numa_node(device: int | str) -> int:
    """The node of a device: a CUDA (else accelerator) index, "cuda:0", "npu:0", a PCI address, or the name of a drive or network card.

    A device whose node is unknown gets one round robin by its index, and a device that is not there -1, each with a log line.
    """
    topology = this_machine()
    try:
        found = choose_device(find_devices(topology), device)
    except NumaError as error:
        _log.info("NUMA: %s; no node for it", error)
        return UNKNOWN_NODE
    if found.node == UNKNOWN_NODE:
        (found,) = spread_unknown([found], topology)
        _log.warning("NUMA: the node of %s is unknown; taking node %d (round robin by index)", found.name, found.node)
    return found.node


def bind_thread_to_numa_node(numa_node: int, strict: bool = False) -> Bound:
    """The calling thread onto the CPUs of a node (of the nearest with some, for a node without), its new memory preferably from it.

    `strict`: new memory from this node or not at all, and NumaError for whatever the kernel refuses.
    """
    return _bind(numa_node, [0], strict)


def bind_process_to_numa_node(numa_node: int, strict: bool = False) -> Bound:
    """All threads of this process onto the CPUs of a node. The memory policy is the calling thread's and that of threads it starts
    later; threads that run already keep theirs, which no system call can change. `strict` as for threads."""
    return _bind(numa_node, own_threads(), strict)


def log_numa_topology(level: int = logging.INFO) -> None:
    """One log line per node, with distances."""
    topology = this_machine()
    for node in topology.nodes:
        distances = " ".join(f"{other}:{topology.distance(node.id, other)}" for other in topology.node_ids)
        cpus, memory = format_ids(node.cpus) or "none", node.memory_bytes / 2**30
        _log.log(level, "NUMA node %d: CPUs %s, %.1f GiB of memory, distances %s", node.id, cpus, memory, distances)


@contextmanager
def thread_on_numa_node(numa_node: int, strict: bool = False) -> Iterator[Bound]:
    """The calling thread bound to a node inside; affinity and memory policy as before afterwards, whatever happens."""
    with _restored([0]):
        yield bind_thread_to_numa_node(numa_node, strict)


@contextmanager
def process_on_numa_node(numa_node: int, strict: bool = False) -> Iterator[Bound]:
    """This process bound to a node inside; afterwards every thread that ran before has the affinity it had, this one its policy too.

    Threads started inside get the process's affinity of before."""
    with _restored(own_threads()):
        yield bind_process_to_numa_node(numa_node, strict)


@contextmanager
def memory_policy(policy: MemoryPolicy) -> Iterator[None]:
    """Another memory policy for the calling thread inside, the one of before afterwards. OSError if the kernel refuses it."""
    before = syscalls.get_mempolicy()
    syscalls.set_mempolicy(policy)
    try:
        yield
    finally:
        syscalls.set_mempolicy(before)


def own_threads() -> list[int]:
    """Ids of the threads of this process."""
    return [int(entry.name) for entry in Path("/proc/self/task").iterdir()]


def usable_cpus(numa_node: int, topology: Topology, root: Path = ROOT) -> frozenset[int]:
    """CPUs of a node (of the nearest with some, for a node without) that this process's cpuset contains. NumaError if none."""
    wanted = topology.cpus_nearest(topology.node(numa_node).id)
    allowed = read_allowed(topology, root)
    usable = allowed.cpus & set(wanted)
    if not usable:
        raise NumaError(
            f"none of the CPUs {format_ids(wanted)} of node {numa_node} is in this process's cpuset, which has {format_ids(allowed.cpus)}; "
            "choose another node or widen the cpuset"
        )
    return usable


def _bind(numa_node: int, threads: list[int], strict: bool) -> Bound:
    topology = this_machine()
    cpus = topology.cpus_nearest(topology.node(numa_node).id)
    before = _Before(threads)
    reasons = []
    try:
        before.set_all(cpus)  # the kernel leaves out what the cpuset does not have
        now = tuple(sorted(os.sched_getaffinity(0)))
    except OSError as error:
        before.restore()
        if error.errno == errno.EINVAL:
            usable_cpus(numa_node, topology)  # says which CPUs are missing
        now = ()
        reasons.append(f"CPUs: {error.strerror}")
    memory = bool(topology.node(numa_node).memory_bytes)
    if memory:
        try:
            syscalls.set_mempolicy(MemoryPolicy(Mode.BIND if strict else Mode.PREFERRED, (numa_node,)))
        except OSError as error:
            memory = False
            reasons.append(f"memory policy: {error.strerror}")
    else:
        reasons.append(f"memory policy: node {numa_node} has no memory")
    why = "; ".join(reasons)
    if why and strict:
        before.restore()
        raise NumaError(f"cannot bind to node {numa_node}: {why}; nothing was changed")
    if why:
        _log.warning("NUMA: binding to node %d is not complete: %s; going on without", numa_node, why)
    return Bound(numa_node, now, memory, why)


@contextmanager
def _restored(threads: list[int]) -> Iterator[None]:
    before = _Before(threads)
    try:
        yield
    finally:
        before.restore()


class _Before:
    """Affinities of threads (0: the calling one) and the calling thread's memory policy, to be put back."""

    def __init__(self, threads: list[int]) -> None:
        self._affinity: dict[int, set[int]] = {}
        for thread in threads:
            with suppress(ProcessLookupError):
                self._affinity[thread] = os.sched_getaffinity(thread)
        self._own = os.sched_getaffinity(0)
        self._whole_process = 0 not in threads
        try:
            self._policy: MemoryPolicy | None = syscalls.get_mempolicy()
        except OSError:
            self._policy = None  # then nobody can have changed it either

    def set_all(self, cpus: Iterable[int]) -> None:
        """The same CPUs for all threads that still run."""
        wanted = set(cpus)
        for thread in self._affinity:
            with suppress(ProcessLookupError):
                os.sched_setaffinity(thread, wanted)

    def restore(self) -> None:
        """As it was; threads of the process that are new since then as the calling thread was."""
        started = set(own_threads()) - set(self._affinity) if self._whole_process else set()
        for thread, cpus in [*self._affinity.items(), *((thread, self._own) for thread in started)]:
            with suppress(ProcessLookupError):
                os.sched_setaffinity(thread, cpus)
        if self._policy is not None:
            syscalls.set_mempolicy(self._policy)
