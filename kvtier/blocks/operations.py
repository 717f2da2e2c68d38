"""The batches of a block store that are under way: one future each, carried by transfers of the mover.

The parts of operations and the lent memory belong to the store's lock; what needs it held says so, the rest takes it. It is never held
while bytes move.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from kvtier.blocks.contents import Contents
from kvtier.config import MoverConfig
from kvtier.errors import Closed
from kvtier.mover.mover import Mover
from kvtier.mover.transfer import Move, Outcome, Priority, Transfer
from kvtier.pages import Rows
from kvtier.repeated import RepeatedWarning
from kvtier.tiers.disk import DiskTier
from kvtier.tiers.lent import BlockLayout, LentBlocks, Parts

log = logging.getLogger(__name__)

_CALLER, _DISK = 0, 1
"""Ends of the mover's link."""


@dataclass(eq=False)
class Operation:
    """A batch under way. `done` says per key whether it succeeded so far; `left` counts its transfers."""

    done: list[bool]
    left: int = 0
    future: Future[list[bool]] = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.future.set_running_or_notify_cancel()  # nobody can call a batch off: its memory is being read or written


class _Part(NamedTuple):
    """The keys of an operation that one transfer carries, by index."""

    operation: Operation
    indices: tuple[int, ...]


class Operations:
    """Moves blocks of `blocks` between the caller's memory and `disk`, and tells `contents` how it went."""

    def __init__(self, config: MoverConfig, blocks: BlockLayout, disk: DiskTier, contents: Contents, lock: threading.RLock) -> None:
        self._block_bytes = blocks.block_bytes
        self._contents = contents
        self._lock = lock
        self._lent = LentBlocks(blocks)
        self._parts: dict[Transfer, _Part] = {}
        self._running: set[Operation] = set()
        self._workers = config.workers
        self._warnings = RepeatedWarning(log)
        self.mover = Mover([self._lent, disk], config.workers, config.staging_bytes, config.queue_bytes, self._finished)

    # -- lock held -------------------------------------------------------------------------------------------------------------

    def begin(self, done: list[bool]) -> Operation:
        """An operation that has succeeded for the keys that `done` says."""
        operation = Operation(done)
        self._running.add(operation)
        return operation

    def running(self) -> list[Future[list[bool]]]:
        """Those that have not ended."""
        return [operation.future for operation in self._running]

    def plan_reads(self, operation: Operation, indices: Sequence[int], rows: Rows, memory: Sequence[Parts]) -> list[Transfer]:
        """Transfers that bring held blocks to the keys of these indices."""
        slots = self._contents.slots(rows)
        return self._plan(operation, indices, self._moves(rows, slots, self._lent.lend(memory)), _DISK, _CALLER, Priority.DEMAND)

    def plan_writes(self, operation: Operation, indices: Sequence[int], rows: Rows, memory: Sequence[Parts]) -> list[Transfer]:
        """Transfers that take admitted blocks from the keys of these indices."""
        slots = self._contents.slots(rows)
        return self._plan(operation, indices, self._moves(rows, self._lent.lend(memory), slots), _CALLER, _DISK, Priority.DEMOTION)

    def _moves(self, rows: Rows, sources: Sequence[int], targets: Sequence[int]) -> list[Move]:
        page_id = self._contents.table.page_id
        return [Move(row, page_id(row), taken, given) for row, taken, given in zip(rows.tolist(), sources, targets, strict=True)]

    def _plan(
        self, operation: Operation, indices: Sequence[int], moves: Sequence[Move], source: int, target: int, priority: Priority
    ) -> list[Transfer]:
        """Small enough for one staging round and for all workers to share."""
        size = max(1, min(self.mover.staging.pages_per_round, -(-len(moves) // self._workers)))
        transfers = []
        for start in range(0, len(moves), size):
            part = tuple(moves[start : start + size])
            transfer = Transfer(source, target, part, priority, len(part) * self._block_bytes)
            self._parts[transfer] = _Part(operation, tuple(indices[start : start + size]))
            transfers.append(transfer)
        operation.left = len(transfers)
        return transfers

    # -- takes the lock itself -------------------------------------------------------------------------------------------------

    def submit(self, operation: Operation, transfers: Sequence[Transfer]) -> None:
        """Queue the transfers; what the queue has no room for, or a closing mover does not take, fails."""
        if not transfers:
            self._end(operation)
        for transfer in transfers:
            try:
                queued = self.mover.submit(transfer)
            except Closed:
                queued = False
            if not queued:
                with self._lock:
                    self._contents.counts["turned away"] += len(transfer.moves)
                outcome = Outcome(cancelled=True)
                self._finished(transfer, outcome)
                transfer.finish(outcome)

    def _finished(self, transfer: Transfer, outcome: Outcome) -> None:
        """Tell the contents the outcome of a transfer, and end its operation if it was the last."""
        with self._lock:
            part = self._parts.pop(transfer)
            good = [index for index in range(len(transfer.moves)) if not outcome.cancelled and index not in outcome.refused]
            for index, refused in outcome.refused.items():
                self._contents.counts[f"refused: {refused.reason}"] += 1
                key = transfer.moves[index].page.key.hex()
                self._warnings.say(refused.reason, "block refused: %s; it is as if it were not there (%s)", refused.reason, key)
            for index in good:
                part.operation.done[part.indices[index]] = True
            if transfer.target == _DISK:
                self._wrote(transfer, set(good))
            else:
                self._read(transfer, outcome)
            part.operation.left -= 1
            ended = part.operation.left == 0
        if ended:
            self._end(part.operation)

    def _wrote(self, transfer: Transfer, good: set[int]) -> None:
        self._lent.free([move.source_slot for move in transfer.moves])
        rows = np.array([move.row for move in transfer.moves], np.int64)
        written = np.array([index in good for index in range(len(rows))], np.bool_)
        self._contents.abandon(rows[~written])
        self._contents.commit(rows[written])

    def _read(self, transfer: Transfer, outcome: Outcome) -> None:
        self._lent.free([move.target_slot for move in transfer.moves])
        self._contents.lose(transfer.moves[index].row for index in outcome.lost)
        self._contents.unhold(np.array([move.row for move in transfer.moves], np.int64))

    def _end(self, operation: Operation) -> None:
        operation.future.set_result(operation.done)  # before it counts as ended: whoever drains the store looks at futures next
        with self._lock:
            self._running.discard(operation)
