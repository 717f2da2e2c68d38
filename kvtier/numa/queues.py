"""The queues of a `NodeExecutor`, one per thread: where a task waits, whom it wakes, and who may take it from whom.

Hierarchical work stealing (NUMA models document, exercise 5): a thread takes from its own queue, then from threads of its node, then
from nodes one hop away, then from any. The further, the longer another's queue must be: what is left waiting a little is cheaper than
memory read from afar. A hop is the nearest distance to another node.

Owned by one executor, called under its lock.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from typing import Any

from kvtier.numa.binding import Bound
from kvtier.numa.topology import Topology

OWN, SAME_NODE, ONE_HOP, FURTHER = range(4)
LEVELS = ("own", "same_node", "one_hop", "further")


@dataclass
class Task:
    """Work, and who waits for it."""

    work: Callable[[], Any]
    future: Future[Any]


class Worker:
    """One thread's queue. `idle` while it waits in `wake`."""

    def __init__(self, index: int, node: int, lock: threading.Lock) -> None:
        self.index = index
        self.node = node
        self.queue: deque[Task] = deque()
        self.wake = threading.Condition(lock)
        self.idle = False
        self.bound: Bound | None = None
        self.thread: threading.Thread | None = None


class Queues:
    """Queues for `threads_by_node` threads on each node of `topology`; `thresholds`: see `kvtier.numa.executor.PATIENT`."""

    def __init__(self, threads_by_node: Mapping[int, int], topology: Topology, thresholds: Sequence[int], lock: threading.Lock) -> None:
        self._topology = topology
        self._thresholds = tuple(thresholds)
        self._next = count()
        nodes = [node for node, threads in threads_by_node.items() for _ in range(threads)]
        self.workers = [Worker(index, node, lock) for index, node in enumerate(nodes)]
        self.by_node = {node: [worker for worker in self.workers if worker.node == node] for node in threads_by_node}
        self._victims = {node: self._by_distance(node) for node in threads_by_node}

    def waiting(self, node: int) -> int:
        """Tasks that nobody has begun, of a node's threads."""
        return sum(len(worker.queue) for worker in self.by_node[node])

    def enqueue(self, node: int, task: Task) -> None:
        """A task of a node waits; a thread that sleeps and may take it is woken."""
        own = self.by_node[node]
        start = next(self._next)
        # An idle thread's queue, else the shortest; in turn among equals.
        owner = min(own, key=lambda worker: (not worker.idle, len(worker.queue), (worker.index - start) % len(own)))
        owner.queue.append(task)
        if owner.idle:
            self._rouse(owner)
            return
        for level, victims in self._victims[node]:
            for helper in victims:
                if helper.idle and len(owner.queue) > self._thresholds[level]:
                    self._rouse(helper)
                    return

    def take(self, worker: Worker) -> tuple[int, Task] | None:
        """The next task for a thread, and whose it was (one of LEVELS); None if there is none that it may take."""
        if worker.queue:
            return OWN, worker.queue.popleft()
        for level, victims in self._victims[worker.node]:
            longest = max(victims, key=lambda victim: len(victim.queue))
            if len(longest.queue) > self._thresholds[level]:
                return level, longest.queue.popleft()
        return None

    def _rouse(self, worker: Worker) -> None:
        worker.idle = False  # the next task wakes another one
        worker.wake.notify()

    def _by_distance(self, node: int) -> list[tuple[int, list[Worker]]]:
        """Workers by level as seen from a node, the nearest nodes first."""
        others = [other for other in self._topology.nearest(node, self.by_node) if other != node]
        known = [other for other in self._topology.node_ids if other != node]
        hop = min((self._topology.distance(node, other) for other in known), default=0)
        found = [(SAME_NODE, self.by_node[node])]
        return found + [(ONE_HOP if self._topology.distance(node, other) <= hop else FURTHER, self.by_node[other]) for other in others]
