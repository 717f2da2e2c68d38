"""The mover: carries transfers between tiers on its own event loop and workers.

Threads. `submit`, `urge` and `cancel` may be called from any thread; the queues belong to `_lock` (never held while bytes move);
picking and finishing happen on the loop thread, and the begin of reads that then go on by themselves; bytes move on worker threads
(`kvtier.mover.stage`). `on_finished` is called on the
loop thread before the transfer's future is set, so whoever waits for the future finds the outcome already in the page table.

On a GPU, workers launch copies on side streams and sleep until they are done; the engine's thread launches nothing and waits for nothing.

A disk that is stuck may keep every worker. Where there is one below host memory there is one thread more, the spare, which carries what
stays in memory while all workers are at files, so that pages in memory never wait for a disk; at other times it rests.

Bounded: staging memory (one buffer a thread), queued bytes per link (`submit` answers False when a link is full and the transfer can wait),
transfers per thread (one).
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from kvtier.errors import Closed, DeviceError
from kvtier.forked import LeftBehind
from kvtier.mover.stage import Ahead, begin, carry
from kvtier.mover.staging import StagingPool
from kvtier.mover.transfer import Outcome, Priority, Transfer
from kvtier.mover.workers import Workers
from kvtier.tiers.base import Refused, Slots, Tier

log = logging.getLogger(__name__)
Link = tuple[int, int]
T = TypeVar("T")


class Mover:
    """Per-link priority queues, `workers` workers on these NUMA `nodes` in turn (anywhere without), one event loop in a thread of its own.

    `on_finished(transfer, outcome)` must not raise and must not block.
    """

    def __init__(
        self,
        tiers: Sequence[Slots],
        workers: int,
        staging_bytes: int,
        queue_bytes: int,
        on_finished: Callable[[Transfer, Outcome], None],
        nodes: Sequence[int] = (),
    ) -> None:
        self.tiers = tiers
        files = [isinstance(tier, Tier) and not tier.in_memory for tier in tiers]
        self._spare = int(any(files) and files.count(False) > 1)
        self.workers = Workers(workers, nodes, self._spare)
        try:
            self.staging = StagingPool(workers, staging_bytes, tiers, self.workers.nodes, self._spare)
        except BaseException:
            self.workers.shutdown()
            raise
        self._queue_bytes = queue_bytes
        self._on_finished = on_finished
        self._lock: threading.Lock | LeftBehind = threading.Lock()
        self._queues: dict[Link, list[tuple[int, int, Transfer]]] = {}
        self._queued: dict[Link, int] = {}
        self._order = itertools.count()
        self._touches_files = files
        self._running = 0
        self._at_files = 0
        """Transfers under way, and those of them that read or write files; the loop thread's."""
        self._closed = False
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="kvtier-mover", daemon=True)
        self._thread.start()

    def after_fork_in_child(self) -> None:
        """Nothing can be queued from now on, nor started."""
        self._lock = LeftBehind("this mover")

    def report(self) -> dict[str, object]:
        """For `stats()`: the workers and, where the device is a GPU, which way copies to it go (`Crossover.as_json`)."""
        crossover = self.staging.crossover
        return {**self.workers.report(), **({} if crossover is None else {"copies": crossover.as_json()})}

    @property
    def utilisation(self) -> float:
        """Share of the workers that carry a transfer, at this moment."""
        return min(1.0, self._running / self.workers.count)

    def submit(self, transfer: Transfer) -> bool:
        """Queue a transfer. False if its link is full and it is not a demand; raises Closed after `close`. Either way it is cancelled then:
        nobody will carry it."""
        link = (transfer.source, transfer.target)
        with self._lock:
            if self._closed:
                transfer.cancelled = True
                raise Closed("the mover is closed")
            queued = self._queued.get(link, 0)
            if queued and queued + transfer.queue_bytes > self._queue_bytes and transfer.priority != Priority.DEMAND:
                transfer.cancelled = True
                return False
            transfer.queued = True
            self._queued[link] = queued + transfer.queue_bytes
            heapq.heappush(self._queues.setdefault(link, []), (transfer.priority, next(self._order), transfer))
        if threading.current_thread() is self._thread:
            self._pump()  # now: another turn of the loop would come before the first read
        else:
            self.loop.call_soon_threadsafe(self._pump)
        return True

    def urge(self, transfer: Transfer) -> None:
        """Make a transfer that has not started a demand (somebody waits for it now)."""
        with self._lock:
            if transfer.started or transfer.cancelled or transfer.priority == Priority.DEMAND:
                return
            transfer.priority = Priority.DEMAND
            if transfer.queued:  # else it is about to be, as a demand
                heapq.heappush(self._queues[transfer.source, transfer.target], (Priority.DEMAND, next(self._order), transfer))

    def cancel(self, transfer: Transfer, only: Priority | None = None) -> bool:
        """Take a queued transfer out; False if it is not queued yet, has started (then it runs to its end), or has another priority than
        `only` by now."""
        with self._lock:
            if not transfer.queued or transfer.started or transfer.cancelled or only not in (None, transfer.priority):
                return False
            transfer.cancelled = True
            self._queued[transfer.source, transfer.target] -= transfer.queue_bytes
        self.call(self._finish, transfer, Outcome(cancelled=True))
        return True

    def queued_bytes(self, source: int, target: int) -> int:
        """Page bytes waiting on a link."""
        with self._lock:
            return self._queued.get((source, target), 0)

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the mover's loop; the future is safe to wait for from any other thread.

        Raises Closed after `close`, but for jobs on the loop itself: those still end.
        """
        with self._lock:
            if not self._closed or threading.current_thread() is self._thread:
                return asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        coroutine.close()
        raise Closed("the mover is closed")

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Call a function on the loop thread soon; after `close` this does nothing."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(function, *args)

    async def work(self, function: Callable[..., T], *args: object, node: int | None = None) -> T:
        """Run a blocking function on a worker, of `node` if that is given, and wait for it (on the loop)."""
        return await asyncio.wrap_future(self.workers.submit(node, function, *args))

    def close(self) -> None:
        """Cancel what is queued, let what runs end, stop loop and workers. Safe to call twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            waiting = [entry[2] for queue in self._queues.values() for entry in queue if not entry[2].started]
        for transfer in waiting:
            self.cancel(transfer)
        self.workers.shutdown()
        self.staging.close()
        asyncio.run_coroutine_threadsafe(_settle(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    # -- loop thread -----------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def _pump(self) -> None:
        while transfer := self._next():
            self._count(transfer, 1)
            ahead = self._begin(transfer)
            try:
                running = self.workers.submit(transfer.node, self._carry, transfer, ahead)
            except Closed:
                if ahead is not None:
                    ahead.close()
                transfer.cancelled = True
                self._ended(transfer, Outcome(cancelled=True))
                continue
            running.add_done_callback(partial(self._carried, transfer))

    def _begin(self, transfer: Transfer) -> Ahead | None:
        """Reads that go on while a worker is being woken, and while this thread plans the next transfer."""
        try:
            return begin(transfer, self.tiers, self.staging)
        except Exception:  # the loop must not die: the worker meets the same fault, and says so
            log.exception("transfer %s -> %s cannot begin ahead", self.tiers[transfer.source].name, self.tiers[transfer.target].name)
            return None

    def _is_at_files(self, link: Link) -> bool:
        return self._touches_files[link[0]] or self._touches_files[link[1]]

    def _count(self, transfer: Transfer, change: int) -> None:
        self._running += change
        self._at_files += change * self._is_at_files((transfer.source, transfer.target))

    def _next(self) -> Transfer | None:
        """The most urgent transfer that a thread is free for, of all links, oldest first; cancelled and urged ones are skipped."""
        only_memory = self._running >= self.workers.count
        if only_memory and (self._at_files < self.workers.count or self._running == self.workers.count + self._spare):
            return None
        with self._lock:
            best: list[tuple[int, int, Transfer]] | None = None
            for link, queue in self._queues.items():
                if only_memory and self._is_at_files(link):
                    continue
                while queue and (queue[0][2].started or queue[0][2].cancelled or queue[0][0] != queue[0][2].priority):
                    heapq.heappop(queue)
                if queue and (best is None or queue[0][:2] < best[0][:2]):
                    best = queue
            if best is None:
                return None
            transfer = heapq.heappop(best)[2]
            transfer.started = True
            self._queued[transfer.source, transfer.target] -= transfer.queue_bytes
            return transfer

    def _carried(self, transfer: Transfer, done: Future[Outcome]) -> None:
        self.call(self._ended, transfer, done.result())

    def _ended(self, transfer: Transfer, outcome: Outcome) -> None:
        self._count(transfer, -1)
        try:
            self._finish(transfer, outcome)
        finally:
            self._pump()

    def _finish(self, transfer: Transfer, outcome: Outcome) -> None:
        try:
            self._on_finished(transfer, outcome)
        finally:
            transfer.finish(outcome)

    # -- worker threads --------------------------------------------------------------------------------------------------------

    def _carry(self, transfer: Transfer, ahead: Ahead | None) -> Outcome:
        start = time.perf_counter()
        try:
            moved = carry(transfer, self.tiers, self.staging, ahead)
        except Exception as error:  # a worker must not die: the transfer fails, is counted, and the log has the trace
            log.exception("transfer %s -> %s failed", self.tiers[transfer.source].name, self.tiers[transfer.target].name)
            reason = Refused("gpu" if isinstance(error, DeviceError) else "internal")
            return Outcome(dict.fromkeys(range(len(transfer.moves)), reason), seconds=time.perf_counter() - start)
        return Outcome(transfer.refused, frozenset(transfer.lost), link_bytes=moved, seconds=time.perf_counter() - start)


async def _settle() -> None:
    """Wait until every other task of the loop has ended, and those that they started."""
    await asyncio.sleep(0)
    while tasks := [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]:
        await asyncio.wait(tasks)
        await asyncio.sleep(0)
