"""One planned movement of pages over one link, and its future.

Made by `kvtier.residency`, carried by the mover; plain data but for the future and the progress of layers. `outcome` is set once, by the
mover; anyone may wait for it.
"""

from __future__ import annotations

import asyncio
import enum
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from kvtier.cuda.surface import Event
from kvtier.tiers.base import PageId, Refused


class Priority(enum.IntEnum):
    """Who goes first on a link and for a worker."""

    DEMAND = 0
    PREFETCH = 1
    DEMOTION = 2


class Move(NamedTuple):
    """One page of a transfer: its row and identity, the slot it is read from and the slot it is written to."""

    row: int
    page: PageId
    source_slot: int
    target_slot: int


@dataclass(frozen=True)
class Outcome:
    """How a transfer ended. `refused` maps the index of a move to why it failed; `cancelled` means nothing was moved at all.

    `lost` are the moves whose source copy turned out to be unusable (wrong checksum, key, length). `link_bytes` are encoded bytes read
    or written at the colder end, `seconds` the time a worker spent on it.
    """

    refused: dict[int, Refused] = field(default_factory=dict)
    lost: frozenset[int] = frozenset()
    cancelled: bool = False
    link_bytes: int = 0
    seconds: float = 0.0


@dataclass(eq=False)
class Transfer:
    """Pages on their way from tier `source` to tier `target` (indices; 0 is the device). Identity is the object."""

    source: int
    target: int
    moves: tuple[Move, ...]
    priority: Priority
    queue_bytes: int
    node: int | None = None
    """The NUMA node of the host memory that is read or written, where workers are on several."""
    future: Future[Outcome] = field(default_factory=Future)
    refused: dict[int, Refused] = field(default_factory=dict)
    lost: set[int] = field(default_factory=set)
    queued: bool = False
    started: bool = False
    cancelled: bool = False
    """Whether it is, or was, in a queue; a worker has it, or had; nobody will carry it. Set by the mover, under its lock."""
    _waiting: list[asyncio.Future[None]] = field(default_factory=list)
    _layers: int = 0
    _marks: list[tuple[int, Event]] = field(default_factory=list)
    _progress: threading.Condition = field(default_factory=threading.Condition)

    def coming(self) -> list[int]:
        """Rows that were not refused so far: all that will come, once the first layer was placed, unless the worker fails."""
        if self.cancelled:
            return []
        refused = self.future.result().refused if self.future.done() else self.refused
        return [move.row for index, move in enumerate(self.moves) if index not in refused]

    def placed(self, layers: int, event: Event | None = None) -> None:
        """The first `layers` layers of every page that was not refused are in their target slots (device targets only).

        With `event`, they are on their way there, and are there once it is reached.
        """
        with self._progress:
            self._layers = max(self._layers, layers)
            if event is not None:
                self._marks.append((layers, event))
            self._progress.notify_all()

    def event_of(self, layers: int) -> Event | None:
        """What a stream has to wait for before it reads the first `layers` layers; None if they are there."""
        with self._progress:
            if self.future.done():
                return None
            return next((event for placed, event in self._marks if placed >= layers), None)

    def ending(self) -> asyncio.Future[None]:
        """Done once this has ended. For coroutines of the mover's loop, where transfers end: wrapping `future` takes it one more turn."""
        waiting = asyncio.get_running_loop().create_future()
        if self.future.done():
            waiting.set_result(None)
        else:
            self._waiting.append(waiting)
        return waiting

    def finish(self, outcome: Outcome) -> None:
        """Set the outcome and wake everybody. On the thread of the mover's loop, unless no coroutine can be waiting (`ending`)."""
        self.future.set_result(outcome)
        with self._progress:
            self._progress.notify_all()
        for waiting in self._waiting:
            if not waiting.done():  # a coroutine that was cancelled waits no longer
                waiting.set_result(None)

    def wait_layers(self, layers: int, timeout: float | None = None) -> bool:
        """Block until `layers` layers are placed, or on their way with an event (`event_of`), or the transfer ended; False on timeout.

        Refusals are known by then.
        """
        with self._progress:
            return self._progress.wait_for(lambda: self._layers >= layers or self.future.done(), timeout)


async def ended(transfers: Iterable[Transfer]) -> None:
    """Wait until all of these have ended, however they did. On the mover's loop."""
    for transfer in transfers:
        await transfer.ending()
