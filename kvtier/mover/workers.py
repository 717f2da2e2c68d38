"""The threads that carry transfers: each uses one torch thread, and where host memory is bound to NUMA nodes, they run there.

Codecs of several workers on the engine's cores lose far more to torch's spinning thread teams than they gain. `set_num_threads` is per
thread, but also becomes the default that a thread takes at its first use of torch; so all workers start and use torch at once, and the
caller's number is put back. State belongs to the executors.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from kvtier.errors import Closed, NumaError
from kvtier.numa.executor import EAGER, NodeExecutor

T = TypeVar("T")
_MOST_QUEUED = 1 << 20  # the mover hands out one transfer per idle worker; nobody on its loop may wait here
log = logging.getLogger(__name__)


class Workers:
    """`count` threads, on these nodes in turn. Nodes whose CPUs are out of reach are done without, with one line in the log.

    `spare`: so many threads more for transfers between tiers in memory while all workers wait for a disk, and as many for house-keeping,
    which may be stuck at a disk, too.
    """

    def __init__(self, count: int, nodes: Sequence[int] = (), spare: int = 0) -> None:
        self.count = count
        started = count + 2 * spare
        threads = torch.get_num_threads()
        self._on_nodes: NodeExecutor | None = None
        self._anywhere: ThreadPoolExecutor | None = None
        if nodes:
            placed = Counter(nodes[index % len(nodes)] for index in range(started))
            try:
                self._on_nodes = NodeExecutor(placed, _MOST_QUEUED, EAGER, _use_one_thread, "kvtier-worker")
            except NumaError as error:
                log.warning("mover: workers run anywhere: %s", error)
        if self._on_nodes is None:
            self._anywhere = _started(started)
        torch.set_num_threads(threads)

    @property
    def nodes(self) -> list[int]:
        """The node of each worker; none where they run anywhere."""
        return [] if self._on_nodes is None else self._on_nodes.placed

    def submit(self, node: int | None, work: Callable[..., T], *arguments: object) -> Future[T]:
        """Run `work(*arguments)` on a worker, of `node` rather than another's. Closed once shut down."""
        if self._on_nodes is not None:
            return self._on_nodes.submit(self._on_nodes.nodes[0] if node is None or node < 0 else node, work, *arguments)
        if self._anywhere is None:
            raise Closed("the workers have ended")
        try:
            return self._anywhere.submit(work, *arguments)
        except RuntimeError:
            raise Closed("the workers have ended") from None

    def shutdown(self) -> None:
        """Let what was submitted end, then end the threads."""
        if self._on_nodes is not None:
            self._on_nodes.shutdown()
        if self._anywhere is not None:
            self._anywhere.shutdown(wait=True)

    def report(self) -> dict[str, object]:
        """How many, and where: threads and CPUs by NUMA node, and by whom each transfer was taken; `numa` None where they run anywhere."""
        return {"workers": self.count, "numa": None if self._on_nodes is None else self._on_nodes.report()}


def _started(workers: int) -> ThreadPoolExecutor:
    started = threading.Barrier(workers + 1)
    executor = ThreadPoolExecutor(workers, thread_name_prefix="kvtier-worker", initializer=_use_one_thread)
    try:
        for _ in range(workers):
            executor.submit(started.wait)
        started.wait()
    except BaseException:  # a program that is told to end now: those that wait would for ever, and it for them
        started.abort()
        executor.shutdown(wait=False)
        raise
    return executor


def _use_one_thread() -> None:
    torch.get_num_threads()  # a first use: without it the default would replace the 1 later
    torch.set_num_threads(1)
