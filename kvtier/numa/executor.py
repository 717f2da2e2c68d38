"""Threads that stay on their nodes, with a queue each: work goes to the node its data is on, and idle threads help by distance.

Who may take whose work is in `queues`. One lock for all queues, never held while work runs. Threads without work sleep until a submission
that they may take wakes them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from kvtier.errors import Closed, NumaError
from kvtier.forked import LeftBehind, tell_children
from kvtier.numa.allowed import read_allowed
from kvtier.numa.binding import bind_thread_to_numa_node, this_machine
from kvtier.numa.padded import PaddedCounters
from kvtier.numa.queues import LEVELS, Queues, Task, Worker
from kvtier.numa.topology import Topology

T = TypeVar("T")
Item = TypeVar("Item")
PATIENT = (0, 0, 1, 3)
"""Waiting tasks that stay with a queue's owner, by who asks: own, same node, one hop, further."""
EAGER = (0, 0, 0, 0)
"""Any idle thread takes any waiting task: for work whose waiting costs more than distance."""


class NodeExecutor:
    """`threads_by_node` threads bound to each node, started at once; `most_queued` tasks wait at most, per node.

    `thresholds`: as PATIENT. `prepare` runs in each thread after it is bound. Where binding is refused, threads run anyway (`report()`
    says so). Also a context manager: leaving it shuts down and waits. NumaError for a node without usable CPUs or that does not exist,
    thresholds that fall with distance, and numbers below one; nothing is left running then. In a forked child `submit` raises Closed.
    """

    def __init__(
        self,
        threads_by_node: Mapping[int, int],
        most_queued: int = 1024,
        thresholds: Sequence[int] = PATIENT,
        prepare: Callable[[], object] = lambda: None,
        name: str = "kvtier-node",
        topology: Topology | None = None,
    ) -> None:
        self._topology = topology or this_machine()
        for node, threads in threads_by_node.items():
            self._topology.node(node)
            if threads < 1:
                raise NumaError(f"node {node}: {threads} threads; expected at least 1")
        if not threads_by_node or most_queued < 1:
            raise NumaError(f"{len(threads_by_node)} nodes and room for {most_queued} tasks; expected at least one of each")
        if len(thresholds) != len(LEVELS) or thresholds[0] != 0 or list(thresholds) != sorted(thresholds):
            raise NumaError(f"thresholds {list(thresholds)}: expected {len(LEVELS)}, the first 0, none below the one before it")
        self.most_queued = most_queued
        lock = threading.Lock()
        self._lock: threading.Lock | LeftBehind = lock
        self._room = threading.Condition(lock)
        self._stopped = False
        self._queues = Queues(threads_by_node, self._topology, thresholds, lock)
        self._workers = self._queues.workers
        self._taken = PaddedCounters(len(self._workers), len(LEVELS))
        self._busy = 0
        self._failures: list[BaseException] = []
        started = threading.Barrier(len(self._workers) + 1)
        for worker in self._workers:
            worker.thread = threading.Thread(
                target=self._run, args=(worker, started, prepare), name=f"{name}{worker.node}-{worker.index}", daemon=True
            )
            worker.thread.start()
        self._threads = frozenset(worker.thread for worker in self._workers)
        started.wait()
        if self._failures:
            self.shutdown()
            raise self._failures[0]
        tell_children(self)

    def after_fork_in_child(self) -> None:
        """Nobody would do what is submitted from now on."""
        self._lock = LeftBehind("this executor")

    @property
    def nodes(self) -> tuple[int, ...]:
        """Nodes that have threads."""
        return tuple(self._queues.by_node)

    @property
    def threads(self) -> int:
        """How many there are."""
        return len(self._workers)

    @property
    def placed(self) -> list[int]:
        """The node of each thread."""
        return [worker.node for worker in self._workers]

    @property
    def queued(self) -> int:
        """Tasks that nobody has begun."""
        with self._lock:
            return sum(len(worker.queue) for worker in self._workers)

    @property
    def utilisation(self) -> float:
        """Share of the threads that are working, at this moment."""
        return self._busy / len(self._workers)

    def submit(self, node: int, work: Callable[..., T], *arguments: object, timeout: float | None = None) -> Future[T]:
        """Run `work(*arguments)` on a thread of `node` (of the nearest node with threads), or of who helps it.

        Waits while the node's queues are full: TimeoutError after `timeout` seconds, and nothing queued. Closed after `shutdown`. From
        a thread of this executor, which nobody may keep waiting, work beyond that is done at once instead.
        """
        home = node if node in self._queues.by_node else self._topology.nearest(node, self._queues.by_node)[0]
        task = Task(lambda: work(*arguments), Future())
        inside = threading.current_thread() in self._threads
        with self._lock:
            if not inside and not self._room.wait_for(lambda: self._stopped or self._queues.waiting(home) < self.most_queued, timeout):
                raise TimeoutError(f"node {home} still had {self.most_queued} tasks waiting after {timeout} s")
            if self._stopped:
                raise Closed("the executor was shut down; make a new one")
            if self._queues.waiting(home) < self.most_queued:
                self._queues.enqueue(home, task)
                return task.future
        _carry_out(task)
        return task.future

    def shutdown(self, cancel: bool = False) -> None:
        """End the threads once what is queued is done, or with `cancel` at once: what nobody began is cancelled. Safe to call twice.

        In a forked child nothing."""
        if isinstance(self._lock, LeftBehind):
            return
        with self._lock:
            self._stopped = True
            waiting = [task for worker in self._workers for task in worker.queue] if cancel else []
            for worker in self._workers:
                if cancel:
                    worker.queue.clear()
                worker.wake.notify()
            self._room.notify_all()
        for task in waiting:
            task.future.cancel()
        for worker in self._workers:
            if worker.thread is not None and worker.thread is not threading.current_thread():
                worker.thread.join()

    def report(self) -> dict[str, Any]:
        """`threads` and CPUs by node, `not_bound`: why threads are not where they should be; `taken`: tasks by who took them."""
        nodes = {
            node: {"threads": len(workers), "cpus": sorted({cpu for worker in workers if worker.bound for cpu in worker.bound.cpus})}
            for node, workers in self._queues.by_node.items()
        }
        why = sorted({worker.bound.why for worker in self._workers if worker.bound and worker.bound.why})
        return {"nodes": nodes, "not_bound": "; ".join(why), "taken": dict(zip(LEVELS, self._taken.totals(), strict=True))}

    def __enter__(self) -> NodeExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _run(self, worker: Worker, started: threading.Barrier, prepare: Callable[[], object]) -> None:
        try:
            _here.node = worker.node
            worker.bound = bind_thread_to_numa_node(worker.node)
            prepare()
        except BaseException as error:  # noqa: BLE001 - raised by the constructor, in the caller's thread
            self._failures.append(error)
        started.wait()
        while (taken := self._wait(worker)) is not None:
            level, task = taken
            self._taken.add(worker.index, level)
            _carry_out(task)
            del task, taken  # a sleeping thread must not keep anybody's memory
            with self._lock:
                self._busy -= 1

    def _wait(self, worker: Worker) -> tuple[int, Task] | None:
        """Work for this thread, waited for; None once stopped and nothing is left."""
        with self._lock:
            while (taken := self._queues.take(worker)) is None:
                if self._stopped and not worker.queue:
                    return None
                worker.idle = True
                worker.wake.wait()
                worker.idle = False
            self._busy += 1
            self._room.notify_all()
            return taken


_here = threading.local()


def worker_node() -> int | None:
    """The node that the calling thread is kept on by its executor; None for threads of no executor."""
    node: int | None = getattr(_here, "node", None)
    return node


@dataclass
class Pending(Generic[T]):
    """Work that was started together."""

    futures: list[Future[T]]

    def results(self) -> list[T]:
        """What it gave, in order; the first failure (by place) once none runs any more."""
        try:
            return [future.result() for future in self.futures]
        finally:
            self.withdraw()

    def withdraw(self) -> None:
        """Cancel what nobody began, and wait for the rest."""
        for future in self.futures:
            future.cancel()
        for future in self.futures:
            if not future.cancelled():
                future.exception()


class NumaThreadPool:
    """Per-node work on `threads_per_node` threads of each of `nodes` (default: all with CPUs and memory that this process may use).

    `prepare` runs in each thread. Also a context manager. NumaError for unknown nodes and no nodes.
    """

    def __init__(
        self,
        threads_per_node: int = 1,
        nodes: Sequence[int] | None = None,
        most_queued: int = 1024,
        prepare: Callable[[], object] = lambda: None,
    ) -> None:
        chosen = usable_nodes(this_machine()) if nodes is None else tuple(dict.fromkeys(nodes))
        self.executor = NodeExecutor(dict.fromkeys(chosen, threads_per_node), most_queued, prepare=prepare)

    @property
    def nodes(self) -> tuple[int, ...]:
        """Nodes that have threads."""
        return self.executor.nodes

    def map(self, work: Callable[[Item], T], items: Iterable[Item], nodes: Iterable[int] | None = None) -> list[T]:
        """`work(item)` for each, on the node of the same place in `nodes` (default: the pool's nodes in turn); results in order.

        If some fail, the first of them (by place) is raised once none runs any more; those nobody began are cancelled.
        """
        return self.start(work, items, nodes).results()

    def start(self, work: Callable[[Item], T], items: Iterable[Item], nodes: Iterable[int] | None = None) -> Pending[T]:
        """As `map`, without waiting for the end: the caller may work too, meanwhile."""
        things = list(items)
        wanted = [self.nodes[place % len(self.nodes)] for place in range(len(things))] if nodes is None else list(nodes)
        if len(wanted) != len(things):
            raise NumaError(f"{len(things)} items for {len(wanted)} nodes; give one node per item")
        pending: Pending[T] = Pending([])
        try:
            for node, item in zip(wanted, things, strict=True):
                pending.futures.append(self.executor.submit(node, work, item))
        except BaseException:
            pending.withdraw()
            raise
        return pending

    def close(self) -> None:
        """End the threads. Safe to call twice."""
        self.executor.shutdown()

    def __enter__(self) -> NumaThreadPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def usable_nodes(topology: Topology) -> tuple[int, ...]:
    """Nodes with CPUs and memory that this process may use. NumaError if there is none."""
    allowed = read_allowed(topology)
    nodes = tuple(node.id for node in topology.nodes if node.id in allowed.nodes and allowed.cpus & set(node.cpus))
    if not nodes:
        raise NumaError(f"no node has both CPUs and memory for this process, which may use {allowed.describe()}")
    return nodes


def _carry_out(task: Task) -> None:
    if not task.future.set_running_or_notify_cancel():
        return
    try:
        result = task.work()
    except BaseException as error:  # noqa: BLE001 - handed to whoever waits for the future
        task.future.set_exception(error)
    else:
        task.future.set_result(result)
