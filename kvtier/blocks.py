"""BlockStore: kvtier's disk tier as a keyed store of blocks, for engines that have their own memory tiers and only want a bottom for them.

Blocks come from and go to the caller's memory, in batches, keyed by the caller's bytes; equal key means equal block, so a block that is
there is not written again. Everything below is what `TieredKVCache` uses, too: page table, policy, mover, formats, disk tier.

State and its owner. The page table, the policy, the lent blocks and the operations under way belong to `_lock`, which is never held while
bytes move. Any thread may call any method; bytes move on the mover's workers. `submit_get` and `submit_put` never wait for a disk.
"""

from __future__ import annotations

import asyncio
import enum
import hashlib
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtier.config import Config
from kvtier.errors import Closed, ConfigError, LayoutError
from kvtier.formats import get_format
from kvtier.keys import KEY_BYTES, PageKey
from kvtier.mover.mover import Mover
from kvtier.mover.transfer import Move, Outcome, Priority, Transfer
from kvtier.pages import ABSENT, NO_ROW, READY, WRITING, PageTable, Rows
from kvtier.policy import SmoothedPressure, make_policy
from kvtier.residency.opening import policy_parameters
from kvtier.residency.protection import Protected
from kvtier.tiers.base import PageId
from kvtier.tiers.disk import DiskTier
from kvtier.tiers.lent import BlockLayout, LentBlocks, Parts, parts_of

log = logging.getLogger(__name__)

_CALLER, _DISK = 0, 1
"""Ends of the mover's link."""
_HERE = 0
"""The page table's one tier: the disk."""
_START = bytes(KEY_BYTES)
"""Stands before the first block of a sequence."""
_TIDY_EVERY_S = 1.0


def loses_bits(config: Config) -> bool:
    """Whether the disk's format does, so that blocks have to be of a known layout."""
    return config.disk is not None and not get_format(config.disk.format).lossless


def require_lossless(config: Config) -> None:
    """ConfigError if the disk's format loses bits: for blocks of which nothing but their size is known."""
    if config.disk is not None and loses_bits(config):
        raise ConfigError(
            f"disk.format is {config.disk.format}, which has to know what the numbers of a block are, and these blocks are opaque bytes; "
            "use a format without loss: raw, raw+lz4 or raw+zstd"
        )


class Presence(enum.Enum):
    """Whether a store has a block: not, not yet (it is being written), or ready to be read."""

    ABSENT = enum.auto()
    COMING = enum.auto()
    READY = enum.auto()


class Chain(NamedTuple):
    """Where the blocks of a batch stand: they follow each other, the first one behind `depth` others, the last of which is `after`
    (None for a batch that begins a sequence, and only then)."""

    after: bytes | None
    depth: int


@dataclass(eq=False)
class _Operation:
    """A batch under way. `done` says per key whether it succeeded so far; `left` counts its transfers."""

    done: list[bool]
    left: int = 0
    future: Future[list[bool]] = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.future.set_running_or_notify_cancel()  # nobody can call a batch off: its memory is being read or written


class _Part(NamedTuple):
    """The keys of an operation that one transfer carries, by index."""

    operation: _Operation
    indices: tuple[int, ...]


class BlockStore:
    """A store of blocks of `blocks` in the directory `config.disk.path`, one process at a time.

    `facts`: plain values that must be equal for two blocks of equal keys to be interchangeable (model, dtype, layout, ranks, ...). They
    are part of every key, and a store that was written under others is refused. The sections `disk`, `policy` and `mover` of `config` are
    used. `clock` gives seconds.

    Survives kill -9 and, after `close`, restarts; what does not verify when it is read is a miss, counted and logged. Full, it lets go
    what the policy says. ConfigError for a format that loses bits of opaque blocks; else raises as `DiskTier`. Nothing is left open then.
    """

    def __init__(
        self, config: Config, blocks: BlockLayout, facts: Mapping[str, object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        own = config.disk
        if own is None:
            raise ConfigError("disk.path is missing; name the directory of the store")
        codec = get_format(own.format)
        if not blocks.known:
            require_lossless(config)
        self.blocks = blocks
        self._clock = clock
        self._lock = threading.RLock()
        self._closed = False
        self._salt = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=KEY_BYTES).digest()
        self._lent = LentBlocks(blocks)
        self._disk = DiskTier(
            own.path, blocks.page, codec, own.capacity_bytes, self._salt, own.durability, own.io_engine, own.io_depth, clock
        )
        try:
            self._disk.compress = own.compress
            self._table = PageTable(1, 1)
            self._policy = make_policy(config.policy.name, policy_parameters(config), blocks.page.page_tokens)
            self._policy.names = self._table.names
            self._pressure = SmoothedPressure()
            self._parts: dict[Transfer, _Part] = {}
            self._operations: set[_Operation] = set()
            self._doomed: set[int] = set()
            """Rows to be dropped as soon as nobody writes or reads them; until then they count as absent."""
            self._lost: set[int] = set()
            """Those of them whose block did not verify."""
            self._counts: Counter[str] = Counter()
            self._recover()
            self._workers, mover = config.mover.workers, config.mover
            self._mover = Mover([self._lent, self._disk], mover.workers, mover.staging_bytes, mover.queue_bytes, self._finished)
        except BaseException:
            self._disk.close()
            raise
        self._keeper = self._mover.spawn(self._keep(config.policy.cleanup_interval))

    # -- looking ---------------------------------------------------------------------------------------------------------------

    def lookup(self, keys: Sequence[bytes]) -> list[Presence]:
        """Which blocks are there. Does no I/O, changes nothing, promises nothing."""
        with self._lock:
            states = self._states(self._find(self._names(keys))).tolist()
        return [{ABSENT: Presence.ABSENT, WRITING: Presence.COMING, READY: Presence.READY}[state] for state in states]

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        """Which blocks can be read now."""
        return [presence is Presence.READY for presence in self.lookup(keys)]

    def touch(self, keys: Sequence[bytes]) -> None:
        """These blocks were used, all by one request; those that are not there are passed over."""
        with self._lock:
            rows = self._find(self._names(dict.fromkeys(keys)))
            self._use(rows[self._states(rows) == READY])

    # -- moving ----------------------------------------------------------------------------------------------------------------

    def get(self, keys: Sequence[bytes], blocks: Sequence[object]) -> list[bool]:
        """Read blocks into the caller's memory and wait for that: see `submit_get`."""
        return self.submit_get(keys, blocks).result()

    def put(self, keys: Sequence[bytes], blocks: Sequence[object], chain: Chain | None = None) -> list[bool]:
        """Write blocks from the caller's memory and wait for that: see `submit_put`."""
        return self.submit_put(keys, blocks, chain).result()

    def submit_get(self, keys: Sequence[bytes], blocks: Sequence[object]) -> Future[list[bool]]:
        """Start reading blocks into the caller's memory; which of them came, in the order of `keys`.

        `blocks`: for each key writable memory of `block_bytes`, as one buffer or a list of buffers that follow each other. It belongs to
        the store until the future is done, and means nothing afterwards where the answer is False: not there, or did not verify.
        LayoutError for memory that does not fit or keys named twice, Closed after `close`; nothing is started then.
        """
        memory = self._check(keys, blocks, writable=True)
        with self._lock:
            operation = self._begin(keys)
            rows = self._find(self._names(keys))
            here = np.flatnonzero(self._states(rows) == READY)
            found = rows[here]
            self._use(found)
            self._counts["hits"] += len(found)
            self._counts["misses"] += len(keys) - len(found)
            self._table.hold(found, _HERE)
            slots = self._lent.lend([memory[index] for index in here.tolist()])
            sources = self._table.slot[_HERE][found].tolist()
            transfers = self._plan(operation, here.tolist(), found, sources, slots, _DISK, _CALLER, Priority.DEMAND)
        self._submit(operation, transfers)
        return operation.future

    def submit_put(self, keys: Sequence[bytes], blocks: Sequence[object], chain: Chain | None = None) -> Future[list[bool]]:
        """Start writing blocks from the caller's memory; which of them are in the store at the end, or were on their way there before.

        `blocks` as in `submit_get`, but only read. `chain` says where they stand in their sequence, so that the policy lets sequences go
        from their ends; None where that is unknown. Where room does not reach, the first ones come first; when more than
        `mover.queue_bytes` are waiting already, none does (counted as turned away). Raises as `submit_get`.
        """
        memory = self._check(keys, blocks, writable=False)
        if chain is not None and (chain.depth < 0 or (chain.after is None) != (chain.depth == 0)):
            raise LayoutError(
                f"a chain after {chain.after!r} at depth {chain.depth}; the first block of a sequence, and no other, has none"
            )
        with self._lock:
            operation = self._begin(keys)
            names = self._names(keys)
            rows = self._find(names)
            states = self._table.state[_HERE][rows]
            missing, there = np.flatnonzero(states == ABSENT), np.flatnonzero(states != ABSENT)
            present = rows[there]
            self._doomed.difference_update(set(present.tolist()) - self._lost)
            for index, row in zip(there.tolist(), present.tolist(), strict=True):
                operation.done[index] = row not in self._doomed
            self._use(present[self._states(present) == READY])
            self._table.hold(present, _HERE)  # making room for the others must not take these
            targets = self._reserve(len(missing))
            self._unhold(present)
            chosen = missing[: len(targets)].tolist()
            self._counts["no room"] += len(missing) - len(chosen)
            added = self._add(names, chosen, chain)
            self._table.begin(added, _HERE, targets)
            slots = self._lent.lend([memory[index] for index in chosen])
            transfers = self._plan(operation, chosen, added, slots, targets, _CALLER, _DISK, Priority.DEMOTION)
        self._submit(operation, transfers)
        return operation.future

    def delete(self, keys: Sequence[bytes]) -> int:
        """Let blocks go, restarts included; how many that were there. Those being read or written go when that is over."""
        with self._lock:
            rows = self._find(self._names(dict.fromkeys(keys)))
            rows = rows[self._states(rows) != ABSENT]
            self._doomed.update(rows.tolist())
            self._bury(rows)
        return len(rows)

    def clear(self) -> int:
        """Let all blocks go; how many there were."""
        with self._lock:
            rows = np.flatnonzero(self._table.state[_HERE][: self._table.rows] != ABSENT)
            self._doomed.update(rows.tolist())
            self._bury(rows)
        return len(rows)

    def drain(self, timeout: float | None = None) -> None:
        """Wait until all batches submitted so far have ended. TimeoutError after `timeout` seconds."""
        with self._lock:
            running = [operation.future for operation in self._operations]
        if wait(running, timeout).not_done:
            raise TimeoutError(f"batches were still under way after {timeout} s")

    def stats(self) -> dict[str, Any]:
        """Plain values: blocks, `hits`, `misses`, `stored`, `evicted`, `turned away`, `refused: <reason>`, ..., and how the disk stands."""
        achieved = self._disk.report()
        with self._lock:
            return {"blocks": len(self._policy), "policy": self._policy.name, **self._counts, "disk": achieved}

    def close(self) -> None:
        """End what runs, give up what is queued, mark the store clean. Safe to call twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._keeper.cancel()
        self._mover.close()
        self._disk.close()

    def __enter__(self) -> BlockStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_integrity(self) -> None:
        """IntegrityError if any structure contradicts another. Call when nothing is under way. Slow; for tests."""
        with self._lock:
            self._table.check_integrity()
            self._policy.check_integrity()
            self._disk.check_integrity()
            self._table.check_tier(_HERE, self._policy)

    # -- inside: lock held -----------------------------------------------------------------------------------------------------

    def _check(self, keys: Sequence[bytes], blocks: Sequence[object], writable: bool) -> list[Parts]:
        if len(keys) != len(blocks):
            raise LayoutError(f"{len(keys)} keys and {len(blocks)} blocks; expected as many of each")
        if len(set(keys)) != len(keys):
            raise LayoutError("a key is named twice in one batch; name each once")
        return [parts_of(block, self.blocks.block_bytes, writable) for block in blocks]

    def _begin(self, keys: Sequence[bytes]) -> _Operation:
        if self._closed:
            raise Closed("this store was closed; open a new one")
        operation = _Operation([False] * len(keys))
        self._operations.add(operation)
        return operation

    def _names(self, keys: Iterable[bytes]) -> list[PageKey]:
        """What the store calls these blocks: of one length, and others under other facts."""
        return [hashlib.blake2b(key, digest_size=KEY_BYTES, key=self._salt).digest() for key in keys]

    def _find(self, names: Sequence[PageKey]) -> Rows:
        return self._table.rows_of(names)

    def _states(self, rows: Rows) -> NDArray[np.uint8]:
        """ABSENT, WRITING or READY for each row."""
        states: NDArray[np.uint8] = self._table.state[_HERE][rows]
        if self._doomed:
            states[[row in self._doomed for row in rows.tolist()]] = ABSENT
        return states

    def _use(self, rows: Rows) -> None:
        if len(rows):
            self._table.use(rows)
            self._policy.touch(rows, self._clock())

    def _reserve(self, count: int) -> list[int]:
        """Slots for up to `count` blocks, evicting what must leave; fewer when no more can be had."""
        while count > 0:
            slots = self._disk.reserve(count)
            if slots is not None:
                return slots
            pressure = self._pressure.observe(self._disk.bytes_used, self._disk.capacity_bytes)
            missing, now = max(1, count - self._disk.free_slots), self._clock()
            with Protected(self._table, _HERE, now) as protected:
                victims = self._policy.evict(missing, protected, now, pressure)
            if victims is None:
                with Protected(self._table, _HERE, now) as protected:
                    likely = len(self._policy.peek(missing, protected, now, pressure))
                count = min(count - 1, self._disk.free_slots + likely)
                continue
            self._counts["evicted"] += len(victims)
            self._disk.free(self._table.drop(victims, _HERE))
        return []

    def _add(self, names: Sequence[PageKey], chosen: Sequence[int], chain: Chain | None) -> Rows:
        """Rows for the blocks of these indices, linked to those before them where that is known."""
        table, rows = self._table, []
        first = _START if chain is None or chain.after is None else self._names([chain.after])[0]
        for index in chosen:
            before = _START if chain is None else names[index - 1] if index else first
            parent = table.row(before)
            row, name = table.row(names[index]), names[index]
            if row == NO_ROW:
                depth = 0 if chain is None else int(table.depth[parent]) + 1 if parent != NO_ROW else chain.depth + index
                row = table.add(PageId(name, before, depth), parent)
            elif table.parent[row] == NO_ROW:  # known only as what stands before others
                depth = int(table.depth[row])
                if parent != NO_ROW and table.depth[parent] == depth - 1:
                    table.add(PageId(name, before, depth), parent)
                else:
                    table.parent_key[row] = before
            rows.append(row)
        return np.array(rows, np.int64)

    def _plan(
        self,
        operation: _Operation,
        indices: Sequence[int],
        rows: Rows,
        sources: Sequence[int],
        targets: Sequence[int],
        source: int,
        target: int,
        priority: Priority,
    ) -> list[Transfer]:
        """Transfers for these keys of `operation`, small enough for one staging round and for all workers to share."""
        moves = [
            Move(row, self._table.page_id(row), taken, given) for row, taken, given in zip(rows.tolist(), sources, targets, strict=True)
        ]
        size = max(1, min(self._mover.staging.pages_per_round, -(-len(moves) // self._workers)))
        transfers = []
        for start in range(0, len(moves), size):
            part = tuple(moves[start : start + size])
            transfer = Transfer(source, target, part, priority, len(part) * self.blocks.block_bytes)
            self._parts[transfer] = _Part(operation, tuple(indices[start : start + size]))
            transfers.append(transfer)
        operation.left = len(transfers)
        return transfers

    def _unhold(self, rows: Rows) -> None:
        self._table.unhold(rows, _HERE)
        if self._doomed:
            self._bury(rows)

    def _bury(self, rows: Rows) -> None:
        """Drop the doomed among these that nobody reads or writes."""
        for row in rows.tolist():
            if row not in self._doomed or self._table.readers[_HERE, row] or self._table.state[_HERE, row] != READY:
                continue
            self._doomed.discard(row)
            self._lost.discard(row)
            one = np.array([row])
            self._policy.remove(one)
            self._disk.free(self._table.drop(one, _HERE))

    # -- inside: takes the lock itself -----------------------------------------------------------------------------------------

    def _submit(self, operation: _Operation, transfers: Sequence[Transfer]) -> None:
        """Queue the transfers; what the queue has no room for, or a closing mover does not take, fails."""
        if not transfers:
            self._end(operation)
        for transfer in transfers:
            try:
                queued = self._mover.submit(transfer)
            except Closed:
                queued = False
            if not queued:
                with self._lock:
                    self._counts["turned away"] += len(transfer.moves)
                outcome = Outcome(cancelled=True)
                self._finished(transfer, outcome)
                transfer.finish(outcome)

    def _finished(self, transfer: Transfer, outcome: Outcome) -> None:
        """Write the outcome of a transfer into the page table, and end its operation if it was the last."""
        with self._lock:
            part = self._parts.pop(transfer)
            good = [index for index in range(len(transfer.moves)) if not outcome.cancelled and index not in outcome.refused]
            for index, refused in outcome.refused.items():
                self._counts[f"refused: {refused.reason}"] += 1
                log.warning("block refused: %s; it is as if it were not there (%s)", refused.reason, transfer.moves[index].page.key.hex())
            for index in good:
                part.operation.done[part.indices[index]] = True
            if transfer.target == _DISK:
                self._wrote(transfer, good)
            else:
                self._read(transfer, outcome)
            part.operation.left -= 1
            ended = part.operation.left == 0
        if ended:
            self._end(part.operation)

    def _wrote(self, transfer: Transfer, good: Sequence[int]) -> None:
        table, written = self._table, set(good)
        self._lent.free([move.source_slot for move in transfer.moves])
        arrived = np.array([transfer.moves[index].row for index in good], np.int64)
        table.commit(arrived, _HERE)
        parents, depths, _ = table.links(arrived)
        self._policy.insert(arrived, parents, depths, self._clock())
        failed = np.array([move.row for index, move in enumerate(transfer.moves) if index not in written], np.int64)
        self._doomed.difference_update(failed.tolist())
        self._disk.free(table.drop(failed, _HERE))
        self._counts["stored"] += len(arrived)
        self._bury(arrived)

    def _read(self, transfer: Transfer, outcome: Outcome) -> None:
        self._lent.free([move.target_slot for move in transfer.moves])
        lost = {transfer.moves[index].row for index in outcome.lost}
        self._lost |= lost
        self._doomed |= lost
        self._unhold(np.array([move.row for move in transfer.moves], np.int64))

    def _end(self, operation: _Operation) -> None:
        with self._lock:
            self._operations.discard(operation)
        operation.future.set_result(operation.done)

    def _recover(self) -> None:
        table, found = self._table, []
        for slot, page in self._disk.recover():
            row = table.add(page)
            if table.state[_HERE, row] != ABSENT:
                self._disk.free([slot])
                continue
            table.begin([row], _HERE, [slot])
            table.commit([row], _HERE)
            found.append(row)
        rows = np.array(found, np.int64)
        self._policy.insert(rows, table.parent[rows], table.depth[rows], self._clock())
        self._counts["recovered"] += len(rows)

    async def _keep(self, checkpoint_every_s: float) -> None:
        """Erase freed blocks now and then, and shorten the next start after a crash."""
        next_checkpoint = self._clock() + checkpoint_every_s
        while True:
            await asyncio.sleep(_TIDY_EVERY_S)
            try:
                await self._mover.work(self._disk.tidy)
                if self._clock() >= next_checkpoint:
                    next_checkpoint = self._clock() + checkpoint_every_s
                    await self._mover.work(self._disk.checkpoint)
            except Exception:  # it must go on; the failure is in the log
                log.exception("house-keeping of a block store failed; it goes on")
