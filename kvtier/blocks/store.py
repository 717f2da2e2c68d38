"""BlockStore: kvtier's disk tier as a keyed store of blocks, for engines that have their own memory tiers and only want a bottom for them.

Blocks come from and go to the caller's memory, in batches, keyed by the caller's bytes; equal key means equal block, so a block that is
there is not written again. Everything below is what `TieredKVCache` uses, too: page table, policy, mover, formats, disk tier.

State and its owner. What is in the store (`contents.py`) and the operations under way (`operations.py`) belong to `_lock`, which is never
held while bytes move. Any thread may call any method; bytes move on the mover's workers. `submit_get` and `submit_put` never wait for a
disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any

from kvtier.blocks.contents import Chain, Contents, Presence
from kvtier.blocks.operations import Operations
from kvtier.config import Config
from kvtier.errors import Closed, ConfigError, LayoutError
from kvtier.forked import LeftBehind, tell_children
from kvtier.formats import get_format
from kvtier.keys import KEY_BYTES
from kvtier.policy import make_policy
from kvtier.residency.opening import policy_parameters
from kvtier.tiers.disk import DiskTier
from kvtier.tiers.lent import BlockLayout, Parts, parts_of

log = logging.getLogger(__name__)

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


class BlockStore:
    """A store of blocks of `blocks` in the directory `config.disk.path`, one process at a time.

    `facts`: plain values that must be equal for two blocks of equal keys to be interchangeable (model, dtype, layout, ranks, ...). They
    are part of every key, and a store that was written under others is refused. The sections `disk`, `policy` and `mover` of `config` are
    used. `clock` gives seconds.

    Survives kill -9 and, after `close`, restarts; what does not verify when it is read is a miss, counted and logged. Full, it lets go
    what the policy says. ConfigError for a format that loses bits of opaque blocks; else raises as `DiskTier`. Nothing is left open then.
    In a forked child, where its threads are not, methods raise Closed, but for `close`, which leaves all to the parent.
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
        lock = threading.RLock()
        self._lock: threading.RLock | LeftBehind = lock
        self._closed = False
        salt = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=KEY_BYTES).digest()
        self._disk = DiskTier(own.path, blocks.page, codec, own.capacity_bytes, salt, own.durability, own.io_engine, own.io_depth, clock)
        try:
            self._disk.compress = own.compress
            policy = make_policy(config.policy.name, policy_parameters(config), blocks.page.page_tokens)
            self._contents = Contents(self._disk, policy, salt, clock)
            self._contents.recover()
            self._operations = Operations(config.mover, blocks, self._disk, self._contents, lock)
        except BaseException:
            self._disk.close()
            raise
        self._mover = self._operations.mover
        self._keeper = self._mover.spawn(self._keep(config.policy.cleanup_interval))
        tell_children(self)

    def after_fork_in_child(self) -> None:
        """Nothing of it can be used from now on."""
        self._lock = LeftBehind("this store")

    # -- looking ---------------------------------------------------------------------------------------------------------------

    def lookup(self, keys: Sequence[bytes]) -> list[Presence]:
        """Which blocks are there. Does no I/O, changes nothing, promises nothing."""
        with self._lock:
            return self._contents.presence(keys)

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        """Which blocks can be read now."""
        return [presence is Presence.READY for presence in self.lookup(keys)]

    def touch(self, keys: Sequence[bytes]) -> None:
        """These blocks were used, all by one request; those that are not there are passed over."""
        with self._lock:
            self._contents.touch(dict.fromkeys(keys))

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
            self._check_open()
            operation = self._operations.begin([False] * len(keys))
            here, rows = self._contents.hold(keys)
            transfers = self._operations.plan_reads(operation, here, rows, [memory[index] for index in here])
        self._operations.submit(operation, transfers)
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
            self._check_open()
            admitted = self._contents.admit(keys, chain)
            operation = self._operations.begin(admitted.there)
            given = [memory[index] for index in admitted.chosen]
            transfers = self._operations.plan_writes(operation, admitted.chosen, admitted.rows, given)
        self._operations.submit(operation, transfers)
        return operation.future

    def delete(self, keys: Sequence[bytes]) -> int:
        """Let blocks go, restarts included; how many that were there. Those being read or written go when that is over."""
        with self._lock:
            return self._contents.delete(dict.fromkeys(keys))

    def clear(self) -> int:
        """Let all blocks go; how many there were."""
        with self._lock:
            return self._contents.clear()

    def drain(self, timeout: float | None = None) -> None:
        """Wait until all batches submitted so far have ended. TimeoutError after `timeout` seconds."""
        with self._lock:
            running = self._operations.running()
        if wait(running, timeout).not_done:
            raise TimeoutError(f"batches were still under way after {timeout} s")

    def stats(self) -> dict[str, Any]:
        """Plain values: blocks, `hits`, `misses`, `stored`, `evicted`, `turned away`, `refused: <reason>`, ..., and how the disk stands."""
        achieved = self._disk.report()
        with self._lock:
            held = self._contents
            return {"blocks": len(held.policy), "policy": held.policy.name, **held.counts, "disk": achieved}

    def close(self) -> None:
        """End what runs, give up what is queued, mark the store clean. Safe to call twice, and in a forked child nothing."""
        if isinstance(self._lock, LeftBehind):
            return
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
            self._contents.check_integrity()

    # -- inside ----------------------------------------------------------------------------------------------------------------

    def _check(self, keys: Sequence[bytes], blocks: Sequence[object], writable: bool) -> list[Parts]:
        if len(keys) != len(blocks):
            raise LayoutError(f"{len(keys)} keys and {len(blocks)} blocks; expected as many of each")
        if len(set(keys)) != len(keys):
            raise LayoutError("a key is named twice in one batch; name each once")
        return [parts_of(block, self.blocks.block_bytes, writable) for block in blocks]

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("this store was closed; open a new one")

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
