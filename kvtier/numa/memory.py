"""Memory on chosen nodes: a policy for a range before anybody touches it, first touch in parallel by threads that run on the right node,
huge pages set apart per node.

The functions take addresses, so that they serve memory from anywhere (kvtier's arena, shared memory, an engine's pool); `NodeMemory` is
memory of one's own. Its owner is whoever built it.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from kvtier.errors import NumaError
from kvtier.numa import syscalls
from kvtier.numa.allowed import read_allowed
from kvtier.numa.binding import this_machine, usable_cpus
from kvtier.numa.ids import format_ids
from kvtier.numa.placement import PAGE_BYTES, Placement, placement
from kvtier.numa.syscalls import MemoryPolicy, Mode
from kvtier.numa.topology import ROOT, Topology, read_number

HUGE_PAGE_BYTES = 2 << 20
_MAP_HUGETLB_2MB = 0x40000 | 21 << 26
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_CHUNK_BYTES = 32 << 20
_MOST_THREADS = 16  # per node: beyond that the memory is busy, not the threads
_log = logging.getLogger(__name__)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def check_nodes(nodes: Sequence[int], topology: Topology, root: Path = ROOT) -> None:
    """NumaError unless memory may come from all these nodes: they exist, have memory, and are in this process's cpuset."""
    if not nodes:
        raise NumaError("no node is named; give at least one")
    allowed = read_allowed(topology, root)
    for node in nodes:
        if not topology.node(node).memory_bytes:
            raise NumaError(f"node {node} has no memory; those with memory are {format_ids(topology.memory_nodes)}")
        if node not in allowed.nodes:
            raise NumaError(f"node {node} is not in this process's cpuset; memory may come from {format_ids(allowed.nodes)}")


def bind_memory(address: int, length: int, policy: MemoryPolicy, move: bool = False) -> None:
    """Give a page-aligned range a policy, best before its first touch; `move` pages that exist already too.

    NumaError for nodes that cannot be used; OSError if the kernel refuses: EPERM in containers without the right to, EINVAL for a mode it
    does not know (see `weighted_or_plain`).
    """
    if policy.mode not in (Mode.DEFAULT, Mode.LOCAL):
        check_nodes(policy.nodes, this_machine())
    syscalls.mbind(address, length, policy, move)


def weighted_or_plain(nodes: Sequence[int]) -> MemoryPolicy:
    """Weighted interleave, by the bandwidth the kernel knows of, over nodes where it has that (Linux 6.9), else plain interleave."""
    wanted = MemoryPolicy(Mode.WEIGHTED_INTERLEAVE, tuple(nodes))
    page = mmap.mmap(-1, PAGE_BYTES)
    try:
        syscalls.mbind(ctypes.addressof(ctypes.c_char.from_buffer(page)), PAGE_BYTES, wanted)
    except OSError:
        return MemoryPolicy(Mode.INTERLEAVE, tuple(nodes))
    return wanted


def first_touch(address: int, length: int, nodes: Sequence[int]) -> None:
    """Take all pages of a fresh range, with threads on each of `nodes` (on the nearest CPUs, for a node without) sharing the work.

    Where a page lands is the range's policy's choice; a range without one is split evenly, in order, between the nodes. Memory that was
    written to before keeps its contents. NumaError if a node's CPUs are out of reach; OSError (ENOMEM) if the nodes are full.
    """
    topology = this_machine()
    cpus = {node: usable_cpus(node, topology) for node in nodes}
    step = HUGE_PAGE_BYTES if length >= HUGE_PAGE_BYTES * len(nodes) else PAGE_BYTES  # huge pages are not to be split between nodes
    share = -(-length // (len(nodes) * step)) * step
    failures: list[OSError] = []
    workers = []
    for position, node in enumerate(nodes):
        begin, end = min(position * share, length), min((position + 1) * share, length)
        count = min(_MOST_THREADS, len(cpus[node]), max(1, -(-(end - begin) // _CHUNK_BYTES)))
        chunks = iter(range(begin, end, _CHUNK_BYTES))
        work = _toucher(address, chunks, end, cpus[node], failures)
        workers += [threading.Thread(target=work, name=f"kvtier-touch-{node}") for _ in range(count)]
    _run(workers, failures)


def _run(workers: Sequence[threading.Thread], failures: Sequence[OSError]) -> None:
    """Start them, wait for all, and raise what the first of them noted."""
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]


def first_touch_parts(parts: Mapping[int, Sequence[tuple[int, int]]]) -> None:
    """Take the pages of many ranges (address, length) of fresh memory without a policy of its own, by node: each node's by threads of that
    node, whose policy is that node. For ranges so many that a policy each would take too many mappings. NumaError for nodes that cannot be
    used; OSError if the kernel refuses, or they are full.
    """
    topology = this_machine()
    if parts:
        check_nodes(list(parts), topology)
    cpus = {node: usable_cpus(node, topology) for node in parts}
    failures: list[OSError] = []
    workers = []
    for node, ranges in parts.items():
        shared = iter(list(ranges))
        count = min(_MOST_THREADS, len(cpus[node]), max(1, sum(length for _, length in ranges) // _CHUNK_BYTES))

        def work(node: int = node, shared: Iterator[tuple[int, int]] = shared) -> None:
            try:
                os.sched_setaffinity(0, cpus[node])
                with suppress(PermissionError):  # then where the thread runs decides
                    syscalls.set_mempolicy(MemoryPolicy(Mode.BIND, (node,)))
                for address, length in shared:
                    _populate(address, length)
            except OSError as error:
                failures.append(error)

        workers += [threading.Thread(target=work, name=f"kvtier-touch-{node}") for _ in range(count)]
    _run(workers, failures)


def set_huge_pages(node: int, count: int, size_bytes: int = HUGE_PAGE_BYTES, root: Path = ROOT) -> int:
    """Set apart `count` huge pages on one node; how many there were before. NumaError, with that number back, if they cannot be had."""
    knob = root / f"sys/devices/system/node/node{node}/hugepages/hugepages-{size_bytes >> 10}kB/nr_hugepages"
    before = read_number(knob, -1)
    if before < 0:
        raise NumaError(f"node {node} has no pool of {size_bytes}-byte huge pages")
    try:
        knob.write_text(str(count))
        there = read_number(knob, 0)
        if there < count:
            knob.write_text(str(before))
            raise NumaError(
                f"node {node} has room for {there} huge pages of {size_bytes} bytes, not {count}; its memory is full or in pieces"
            )
    except OSError as error:
        raise NumaError(f"cannot set {knob}: {error.strerror}; it takes root") from None
    return before


@contextmanager
def huge_pages_on(node: int, count: int, size_bytes: int = HUGE_PAGE_BYTES) -> Iterator[None]:
    """`count` huge pages set apart on a node inside, as many as before afterwards."""
    before = set_huge_pages(node, count, size_bytes)
    try:
        yield
    finally:
        set_huge_pages(node, before, size_bytes)


class NodeMemory:
    """`size_bytes` of zeroed anonymous memory on chosen nodes: bound, then touched by threads on those nodes, then looked at.

    `view` is writable and lives until `close`. `huge_pages` takes explicit ones of 2 MiB from the nodes' pools. Where the kernel
    refuses policies, the touching threads' own nodes decide, and `bound` is False. `touched_from`: nodes of the touching threads, if not
    the memory's own. NumaError for nodes that cannot be used, or whose pools have too few huge pages; OSError (ENOMEM) if there is not so
    much memory.
    """

    def __init__(self, size_bytes: int, policy: MemoryPolicy, huge_pages: bool = False, touched_from: Sequence[int] = ()) -> None:
        check_nodes(policy.nodes, this_machine())
        self._page_bytes = HUGE_PAGE_BYTES if huge_pages else PAGE_BYTES
        self.length = -(-size_bytes // self._page_bytes) * self._page_bytes
        self.policy = policy
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (_MAP_HUGETLB_2MB if huge_pages else 0)
        few = NumaError(
            f"nodes {format_ids(policy.nodes)} have not {self.length // HUGE_PAGE_BYTES} free huge pages; set some apart (`set_huge_pages`)"
        )
        try:
            self._mapping = mmap.mmap(-1, self.length, flags=flags)
        except OSError as error:
            if huge_pages and error.errno == errno.ENOMEM:
                raise few from None
            raise
        self.view = memoryview(self._mapping)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        try:
            self.bound = self._bind()
            first_touch(self.address, self.length, touched_from or policy.nodes)
        except BaseException as error:
            self.close()
            if huge_pages and isinstance(error, OSError) and error.errno == errno.EFAULT:  # others' pools have some, these nodes' have not
                raise few from None
            raise

    def placement(self, samples: int | None = 4096) -> Placement:
        """Where its pages are now."""
        return placement(self.address, self.length, samples, self._page_bytes)

    def close(self) -> None:
        """Give the memory back. BufferError while a view taken from `view` exists."""
        self.view.release()
        self._mapping.close()

    def _bind(self) -> bool:
        try:
            syscalls.mbind(self.address, self.length, self.policy)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOSYS):
                raise
            _log.warning("NUMA: memory policies are not allowed here (%s); relying on who touches first", error.strerror)
            return False
        return True


def _toucher(address: int, chunks: Iterator[int], end: int, cpus: frozenset[int], failures: list[OSError]) -> Callable[[], None]:
    """What one thread does: move to the node's CPUs, take chunk after chunk (from an iterator that its fellows share)."""

    def work() -> None:
        try:
            os.sched_setaffinity(0, cpus)
            for begin in chunks:
                _populate(address + begin, min(_CHUNK_BYTES, end - begin))
        except OSError as error:
            failures.append(error)

    return work


def _populate(address: int, length: int) -> None:
    if _libc.madvise(address, length, _MADV_POPULATE_WRITE) == 0:
        return
    code = ctypes.get_errno()
    if code != errno.EINVAL:
        raise OSError(code, os.strerror(code))
    for page in range(address, address + length, PAGE_BYTES):  # older kernels: write each page's first byte as it is
        ctypes.memmove(page, page, 1)
