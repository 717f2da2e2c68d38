"""The threads of a file engine in C: what `pool` does, without Python or its lock at each request. `make` gives one, or None where the
extension was not built or does not load.

All state is the extension's (`requests.c`), but for whether there are threads: not in a forked child. Python hands over a batch and is told
what ended, as much at once as there is.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from functools import lru_cache
from typing import NoReturn, Protocol

from kvtier.extensions import load_extension
from kvtier.forked import LeftBehind, keep_for_ever, tell_children
from kvtier.io.files import Outcome, Outcomes, Request, SomeOutcomes, Then


class _Batch(Protocol):
    def ended(self) -> list[tuple[int, int]]:
        """(index, bytes or -errno) of requests that ended since the last call; waits for one. Empty once all were told."""

    def withdraw(self) -> None:
        """Begin no more of it and wait for what is under way."""


class _Threads(Protocol):
    def begin(self, requests: list[Request], writing: bool, helping: bool, /, *then: object) -> _Batch:
        """Start on a batch. `helping`: calls of `ended` carry requests, too. `then`: nothing, or the addresses of a function that is told
        of each request that was read (`Then.function`) and of its context, whose owner is kept, and how many threads may be in such
        functions at once."""

    def keep_on(self, cpus: list[int], /) -> None:
        """Keep threads that start from now on on these CPUs, if the system lets them; any, for none."""

    def stop(self) -> None:
        """End the threads once all batches are done. Safe to call twice; later batches are carried by who waits for them."""


class _Extension(Protocol):
    def Pool(self, depth: int, alignment_bytes: int, /) -> _Threads:
        """Up to `depth` threads, started when first needed. Reads that end off the alignment are at the end of the file."""


class _NoThreads:
    """In a forked child."""

    def begin(self, requests: list[Request], writing: bool, helping: bool, /, *then: object) -> _Batch:  # noqa: ARG002
        _refuse()

    def keep_on(self, cpus: list[int], /) -> None:
        """There are none to keep."""

    def stop(self) -> None:
        """There are none to stop."""


class NativePool:
    """Up to `depth` threads; one less work for a caller who helps. In a forked child batches raise Closed."""

    def __init__(self, threads: _Threads, depth: int) -> None:
        self._threads = threads
        self._depth = depth
        tell_children(self)

    def after_fork_in_child(self) -> None:
        """There are no threads from now on; waiting for their end would have none."""
        keep_for_ever(self._threads)
        self._threads = _NoThreads()

    def each(self, requests: Sequence[Request], writing: bool, helping: bool) -> Outcomes:
        """As `RequestPool.each`, for whole reads or writes of these requests."""
        with closing(self.some(requests, writing, helping)) as groups:
            for group in groups:
                yield from group

    def some(self, requests: Sequence[Request], writing: bool, helping: bool) -> SomeOutcomes:
        """The same, each time all that ended meanwhile."""
        if requests:
            yield from _told(self._threads.begin(list(requests), writing, helping or self._alone(requests)))

    def then(self, requests: Sequence[Request], then: Then, at_once: int) -> SomeOutcomes:
        """Reads of these: an empty list once they are begun, and all at the end, when `then` was told of each by one of the threads, by at
        most `at_once` at a time."""
        if requests:
            batch = self._threads.begin(list(requests), False, self._alone(requests), *then.function(), then, at_once)
            yield from _told(batch, first=[])

    def _alone(self, requests: Sequence[Request]) -> bool:
        """Whether the caller carries them all."""
        return self._depth == 1 or len(requests) == 1

    def keep_on(self, cpus: Sequence[int]) -> None:
        """Keep threads that start from now on on these CPUs, if the system lets them; any, for none."""
        self._threads.keep_on(list(cpus))

    def stop(self) -> None:
        """End the threads once all batches are done. Safe to call twice."""
        self._threads.stop()


def _told(batch: _Batch, first: list[Outcome] | None = None) -> SomeOutcomes:
    process = os.getpid()
    try:
        if first is not None:
            yield first
        while outcomes := _ended(batch, process):
            yield [(index, outcome if outcome >= 0 else OSError(-outcome, os.strerror(-outcome))) for index, outcome in outcomes]
    finally:
        if os.getpid() == process:
            batch.withdraw()
        else:
            keep_for_ever(batch)


def _ended(batch: _Batch, process: int) -> list[tuple[int, int]]:
    """What ended of a batch that was begun in `process`."""
    if os.getpid() != process:
        _refuse()
    return batch.ended()


def _refuse() -> NoReturn:
    LeftBehind("this pool of storage threads").refuse()


def make(depth: int, alignment_bytes: int) -> NativePool | None:
    """A pool whose reads and writes start at multiples of `alignment_bytes`, or None; `why_missing()` then says why."""
    extension = _load()[0]
    return None if extension is None else NativePool(extension.Pool(depth, alignment_bytes), depth)


def why_missing() -> str:
    """One line: why there is no such pool and what to do; empty if there is."""
    return _load()[1]


@lru_cache(maxsize=1)
def _load() -> tuple[_Extension | None, str]:
    return load_extension("kvtier.io._requests", "Python threads do the work, with more CPU time per request")
