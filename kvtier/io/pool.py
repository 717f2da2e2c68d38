"""The threads of a file engine: a fixed few that work through batches of requests, one request of each batch in turn, beside the callers.

All state belongs to `_wake`'s lock, which is never held across I/O. A thread takes its next request under that lock instead of being handed
each one, and a caller with nothing else to do takes one as well: waking a thread costs about as much CPU as a read. Threads start when
first needed and sleep while there is nothing to do; they are daemons, so that a forgotten `stop` does not keep a process from ending. A
forked child has none of them.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue

from kvtier.forked import LeftBehind, tell_children
from kvtier.io.files import Outcomes, Request
from kvtier.repeated import RepeatedWarning

Work = Callable[[Request], int | OSError]
_log = logging.getLogger(__name__)


class _Batch:
    def __init__(self, work: Work, requests: Sequence[Request]) -> None:
        self.work = work
        self.requests = requests
        self.begun = 0
        self.done: SimpleQueue[tuple[int, int | BaseException]] = SimpleQueue()

    def carry_out(self, index: int) -> None:
        outcome: int | BaseException
        try:
            outcome = self.work(self.requests[index])
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits for the batch
            outcome = error
        self.done.put((index, outcome))


class RequestPool:
    """Up to `depth` threads named `name`-0, `name`-1, ...; one less work for a caller who helps. In a forked child batches raise Closed."""

    def __init__(self, depth: int, name: str) -> None:
        self._depth = depth
        self._name = name
        self._wake = threading.Condition(threading.Lock())
        self._batches: deque[_Batch] = deque()
        """Those with requests nobody has begun."""
        self._threads: list[threading.Thread] = []
        self._stopped = False
        self._cpus: tuple[int, ...] = ()
        self._left_behind: LeftBehind | None = None
        self._warnings = RepeatedWarning(_log)
        tell_children(self)

    def after_fork_in_child(self) -> None:
        """There are no threads from now on, and nobody holds the lock."""
        self._left_behind = LeftBehind("this pool of storage threads")
        self._wake = threading.Condition(threading.Lock())
        self._threads = []

    def keep_on(self, cpus: Sequence[int]) -> None:
        """Keep threads that start from now on on these CPUs; any, for none."""
        self._cpus = tuple(cpus)

    def each(self, work: Work, requests: Sequence[Request], helping: bool) -> Outcomes:
        """`work(request)` for each, as (index, result) in the order they end; what `work` raises is raised here.

        While the caller is busy with a result, the threads go on. `helping`: the caller has nothing else to do, so its thread works too,
        which saves waking another; at depth 1 it always does, and nothing is done ahead, and so it is where the system gives no threads.
        However the generator ends, no `work` of it runs afterwards.
        """
        if not requests:
            return
        self._check()
        helping = helping or self._depth == 1 or len(requests) == 1
        batch = _Batch(work, requests)
        collected = 0
        alone = not self._begin(batch, helping)
        try:
            if helping:
                batch.carry_out(0)
            helping |= alone
            while collected < len(requests):
                if helping and batch.done.empty() and (index := self._take(batch)) is not None:
                    batch.carry_out(index)
                index, outcome = batch.done.get()
                collected += 1
                if not isinstance(outcome, int | OSError):
                    raise outcome
                yield index, outcome
                self._check()
        finally:
            self._withdraw(batch)
            while collected < batch.begun and self._left_behind is None:
                batch.done.get()
                collected += 1

    def stop(self) -> None:
        """End the threads once all batches are done. Safe to call twice."""
        with self._wake:
            self._stopped = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()

    def _check(self) -> None:
        if self._left_behind is not None:
            self._left_behind.refuse()

    def _begin(self, batch: _Batch, helping: bool) -> bool:
        """Show the batch to the threads, all but the first request of a caller who helps; whether there are any."""
        batch.begun = int(helping)
        if len(batch.requests) == batch.begun:
            return True
        helpers = min(self._depth, len(batch.requests)) - batch.begun
        with self._wake:
            self._batches.append(batch)
            for number in range(len(self._threads), helpers):
                thread = threading.Thread(target=self._run, name=f"{self._name}-{number}", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    what = "%s: %s; %d of %d storage threads, and who waits for them, do all the work"
                    self._warnings.say("threads", what, self._name, error, len(self._threads), helpers)
                    break
                self._threads.append(thread)
            self._wake.notify(helpers)
            return bool(self._threads)

    def _withdraw(self, batch: _Batch) -> None:
        with self._wake:
            if batch in self._batches:
                self._batches.remove(batch)

    def _run(self) -> None:
        stay_on(self._cpus)
        while (taken := self._next()) is not None:
            batch, index = taken
            batch.carry_out(index)
            del batch, taken  # an idle thread must not keep a caller's buffers

    def _next(self) -> tuple[_Batch, int] | None:
        """A request of whichever batch is next; waits for one. None once stopped."""
        with self._wake:
            while not self._batches:
                if self._stopped:
                    return None
                self._wake.wait()
            batch = self._batches[0]
            self._batches.rotate(-1)
            return batch, self._begin_one(batch)

    def _take(self, batch: _Batch) -> int | None:
        """A request of this batch; None if all are begun."""
        with self._wake:
            return self._begin_one(batch) if batch.begun < len(batch.requests) else None

    def _begin_one(self, batch: _Batch) -> int:
        index = batch.begun
        batch.begun += 1
        if batch.begun == len(batch.requests):
            self._batches.remove(batch)
        return index


def stay_on(cpus: Sequence[int]) -> None:
    """Keep the calling thread on these CPUs, if the system lets it; any, for none."""
    if not cpus:
        return
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        _log.warning("a storage thread cannot be kept on CPUs %s: %s; it runs anywhere", list(cpus), error.strerror)
