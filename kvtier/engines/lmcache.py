"""kvtier's disk tier under an LMCache server (multiprocess mode), as its `native_plugin` adapter; LMCache is not patched.

    --l2-adapter '{"type": "native_plugin", "module_path": "kvtier.engines.lmcache", "class_name": "KvtierL2",
                   "adapter_params": {"disk.path": ..., "disk.capacity_bytes": ...}}'

LMCache submits batches of keys and memory and polls an eventfd for completions. One lock guards the completions and whether this is
closed, another one is held while the store is being opened; the store has its own. Chunks are opaque, so only formats without loss are
taken. Needs nothing of LMCache's to be imported; written for LMCache 0.5.6.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from kvtier.blocks import BlockStore, require_lossless
from kvtier.engines.settings import check_new_store, store_config, stored_block_bytes
from kvtier.engines.versions import require_engine
from kvtier.errors import Closed, KVTierError, LayoutError
from kvtier.tiers.lent import BlockLayout

log = logging.getLogger(__name__)

Completion = tuple[int, bool, str, list[bool] | None]
"""(number of the batch, whether all went well, what was wrong, which keys did)."""


class KvtierL2:
    """LMCache's six methods, and `submit_batch_delete`, over a `kvtier.blocks.BlockStore`. `settings`: kvtier's dotted keys, and `config`.

    LMCache does not say beforehand how large a chunk is: a store that is there already is opened at once, a new one with the first chunk;
    but whether there can be one is known at once (ConfigError, StoreError, StoreLocked). Chunks of another size than the store's are
    refused; give each model and chunk size a server and a directory of its own.
    """

    def __init__(self, **settings: Any) -> None:
        require_engine("lmcache")
        self._config = store_config(settings)
        require_lossless(self._config)
        self._lock = threading.Lock()
        self._opening = threading.Lock()
        self._next = 0
        self._completed: list[Completion] = []
        self._closed = False
        known = stored_block_bytes(self._config)
        if known is None:
            check_new_store(self._config)
        self._store = None if known is None else self._open(known)
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def event_fd(self) -> int:
        """Readable when completions wait for `drain_completions`."""
        return self._event

    def submit_batch_get(self, keys: list[str], memoryviews: list[memoryview]) -> int:
        """Read chunks into this memory; the number of the batch."""
        names = _names(keys)
        return self._start(
            len(keys), lambda: self._ready_store(memoryviews, opening=False), lambda store: store.submit_get(names, memoryviews)
        )

    def submit_batch_set(self, keys: list[str], memoryviews: list[memoryview]) -> int:
        """Write chunks from this memory; the number of the batch."""
        names = _names(keys)
        return self._start(
            len(keys), lambda: self._ready_store(memoryviews, opening=True), lambda store: store.submit_put(names, memoryviews)
        )

    def submit_batch_exists(self, keys: list[str]) -> int:
        """Ask which chunks can be read; the number of the batch."""
        names = _names(keys)
        return self._start(len(keys), lambda: self._store, lambda store: store.exists(names))

    def submit_batch_delete(self, keys: list[str]) -> int:
        """Let chunks go; the number of the batch."""
        names = _names(keys)
        return self._start(len(keys), lambda: self._store, lambda store: [store.delete([name]) == 1 for name in names])

    def drain_completions(self) -> list[Completion]:
        """What ended since the last call, each batch once."""
        with self._lock:
            completed, self._completed = self._completed, []
            if completed and not self._closed:
                os.eventfd_read(self._event)
        return completed

    def close(self) -> None:
        """Write what is queued and leave the store to the next process. Safe to call twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        with self._opening:  # who is opening the store is done then
            if self._store is not None:
                self._store.drain()
                self._store.close()
        os.close(self._event)

    # -- inside ----------------------------------------------------------------------------------------------------------------

    def _start(
        self,
        count: int,
        find: Callable[[], BlockStore | None],
        submit: Callable[[BlockStore], Future[list[bool]] | list[bool]],
    ) -> int:
        """A batch of `count` keys; without a store, none of them is there."""
        with self._lock:
            if self._closed:
                raise Closed("this adapter was closed; make a new one")
            number, self._next = self._next, self._next + 1
        try:
            store = find()
            answer = [False] * count if store is None else submit(store)
        except KVTierError as error:
            log.error("a batch of %d chunks is refused: %s", count, error)
            self._complete((number, False, str(error), [False] * count))
            return number
        if isinstance(answer, Future):
            answer.add_done_callback(lambda done: self._complete((number, all(done.result()), "", done.result())))
        else:
            self._complete((number, True, "", answer))
        return number

    def _complete(self, completion: Completion) -> None:
        with self._lock:
            self._completed.append(completion)
            if not self._closed:
                os.eventfd_write(self._event, 1)

    def _ready_store(self, memory: Sequence[memoryview], opening: bool) -> BlockStore | None:
        """The store, opened for chunks of this size if it is not yet and `opening`. LayoutError if its chunks have another size, Closed if
        this was closed meanwhile."""
        sizes = {view.nbytes for view in memory}
        if self._store is None and opening and len(sizes) == 1:
            with self._opening:
                if self._closed:
                    raise Closed("this adapter was closed; make a new one")
                if self._store is None:
                    self._store = self._open(next(iter(sizes)))
        store = self._store
        if store is not None and sizes - {store.blocks.block_bytes}:
            raise LayoutError(
                f"chunks of {', '.join(map(str, sorted(sizes)))} bytes in a store of chunks of {store.blocks.block_bytes}; "
                "give each model and chunk size a server and a disk.path of its own"
            )
        return store

    def _open(self, block_bytes: int) -> BlockStore:
        model = self._config.model
        facts = {"engine": "lmcache", "model": model.name, "revision": model.revision}
        return BlockStore(self._config, BlockLayout.opaque(block_bytes), facts)


def _names(keys: Sequence[str]) -> list[bytes]:
    return [key.encode() for key in keys]
