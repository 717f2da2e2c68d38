"""What a caller holds: a `Match` (a look, no promise) and a `Lease` (a hold on pages that stays until it is released).

A lease's rows belong to the cache's lock. Its waiting side (`wait`, `ready`, `layer`) may be used from any one thread at a time.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
import warnings
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from kvtier.errors import LeaseError, TransferFailed
from kvtier.keys import PageKey
from kvtier.mover.transfer import Transfer
from kvtier.pages import READY

if TYPE_CHECKING:
    from kvtier.residency import Residency


@dataclass(frozen=True, repr=False)
class Match:
    """The longest prefix of some tokens that the cache holds, as it was when `lookup` was called. Holds nothing.

    `tokens`: tokens covered, a multiple of the page size; `ids` are those tokens. `pages_by_tier`: pages per tier name, counted where
    they are warmest. `restore_s`: seconds to bring the colder ones up, as far as restores so far tell; `recompute_s`: seconds that
    computing all `tokens` adds to a prefill, as far as `record_prefill` told. None before the first measurement.
    """

    tokens: int
    ids: NDArray[np.int64]
    keys: tuple[PageKey, ...]
    root: PageKey
    pages_by_tier: dict[str, int]
    restore_bytes: int
    restore_s: float | None
    recompute_s: float | None

    def __bool__(self) -> bool:
        return self.tokens > 0

    def __repr__(self) -> str:
        return f"Match({self.tokens} tokens, pages {self.pages_by_tier})"  # not which tokens: it gets into logs and tracebacks


@dataclass(eq=False, repr=False)
class Lease:
    """A hold on the pages of one sequence: they stay on the device until `release`.

    Made by `TieredKVCache.acquire` or `begin`; also a context manager. `tokens` shrinks if a restore fails (the prefix becomes shorter)
    and grows with `append`. The block table lists device slots, one per page, the last one possibly a partly filled open page.
    """

    residency: Residency
    root: PageKey
    rows: list[int]
    ids: array[int]
    """The sequence's tokens so far; only the first `tokens` of them count."""
    tokens: int
    restored: Future[None]
    transfers: list[Transfer] = field(default_factory=list)
    submitted: threading.Event = field(default_factory=threading.Event)
    full: bool = False
    """True once the device had no room for more pages of this sequence; further appends store nothing."""
    released: bool = False
    give_back: Callable[[Lease], None] | None = None
    known: bool = False
    """Whether the holder was told the final `tokens` (by `wait`, `ready` or a layer). It may not write before."""
    promised: int | None = None
    """Tokens that were said to be final when the first layer was there."""
    relied_on: set[Transfer] = field(default_factory=set)
    """Transfers that were under way when that was said: what one of them fails to bring is broken, also if another brings it, elsewhere."""
    broken: bool = False
    """Fewer came than were promised."""
    attention: NDArray[np.float64] | None = None
    """What `record_queries` told so far: the mean over its last calls, as many as there are layers, of each page's share of attention."""
    attention_calls: int = 0

    # -- waiting ---------------------------------------------------------------------------------------------------------------

    def wait(self, timeout: float | None = None) -> NDArray[np.int64]:
        """Block until every page is on the device (or given up); the block table, int64 `[pages]`. TimeoutError after `timeout` seconds."""
        self._check()
        try:
            self.restored.result(timeout)
        except FutureTimeout:
            raise TimeoutError(f"the lease was not ready after {timeout} s; it goes on, wait again or release it") from None
        return self.block_table

    async def ready(self) -> NDArray[np.int64]:
        """As `wait`, for async callers."""
        self._check()
        await asyncio.shield(asyncio.wrap_future(self.restored))
        return self.block_table

    @property
    def block_table(self) -> NDArray[np.int64]:
        """Device slots of the pages, int64 `[pages]`. LeaseError before the lease is ready."""
        self._check()
        if not self.restored.done():
            raise LeaseError("the block table is not known yet: wait() for the lease or `await ready()` first")
        self.known = True
        self.residency.device.enter()
        with self.residency.lock:
            slots: NDArray[np.int64] = self.residency.table.slot[0, self.rows]
        return slots

    def layer(self, index: int, timeout: float | None = None) -> torch.Tensor:
        """Block until layer `index` of every page is on the device; the pool seen by that layer.

        On a GPU the calling thread goes on once the layer is on its way, and only its current stream waits, on the GPU. Call `release` with
        the same stream current, or once that stream is done with the pages.

        A view `[slots, planes, page_tokens, kv_heads, head_dim]` of the layout's dtype, to be indexed with `slots()`. After the first call
        `tokens` is final: pages that did not verify have shortened it. Layers arrive in order, so an engine computes layer 0 while layer 1
        is still being decoded.
        """
        layers = self.residency.layout.layers
        if not 0 <= index < layers:
            raise LeaseError(f"layer {index}: this model has layers 0 to {layers - 1}")
        self.wait_layers(index + 1, timeout)
        self._enter(index + 1)
        return self.residency.device.layer(index)

    def slots(self) -> NDArray[np.int64]:
        """Device slots of the pages of `tokens`, int64 `[pages]`; known as soon as the first layer is there."""
        self.wait_layers(1)
        with self.residency.lock:
            slots: NDArray[np.int64] = self.residency.table.slot[0, self.rows[: self.pages]]
        return slots

    def wait_layers(self, layers: int, timeout: float | None = None) -> None:
        """Block until the first `layers` layers are on the device.

        TimeoutError after `timeout` seconds, TransferFailed if a restore broke.
        """
        self._check()
        if not self.restored.done():
            end = math.inf if timeout is None else time.monotonic() + timeout
            if not self.submitted.wait(timeout):
                raise TimeoutError(f"no room for the restore was found in {timeout} s")
            while True:
                transfers = self.transfers
                for transfer in transfers:
                    if not transfer.wait_layers(layers, None if timeout is None else max(0.0, end - time.monotonic())):
                        raise TimeoutError(f"layer {layers - 1} was not there after {timeout} s")
                if self._shorten(transfers):
                    break
        self.known = True
        self.check_whole()

    def _enter(self, layers: int) -> None:
        """Let the calling thread's stream wait for the first `layers` layers, where the device is a GPU."""
        events = [event for transfer in self.transfers if (event := transfer.event_of(layers)) is not None]
        self.residency.device.enter(events)

    def check_whole(self) -> None:
        """TransferFailed if fewer tokens came than the holder was told."""
        if self.broken:
            raise TransferFailed("a restore failed after verification; release the lease and compute these tokens again")

    @property
    def pages(self) -> int:
        """Pages of `tokens`, a partly filled one included."""
        return -(-self.tokens // self.residency.layout.page_tokens)

    def _shorten(self, waited: Sequence[Transfer]) -> bool:
        """Cut `tokens` before the first page that will not come; False, and nothing done, if more transfers than `waited` bring pages now.
        Refusals are final once the first layer is placed."""
        with self.residency.lock:
            if self.transfers != waited:
                return False
            state, failed = self.residency.table.state, self.failed()
            coming = {row for transfer in self.transfers for row in transfer.coming()} - failed
            missing = (index for index, row in enumerate(self.rows) if row in failed or (state[0, row] != READY and row not in coming))
            self.cut(next(missing, len(self.rows)))
            self.promised = self.tokens
            self.relied_on.update(transfer for transfer in waited if not transfer.future.done())
            return True

    def failed(self) -> set[int]:
        """Rows that were promised by a transfer that did not bring them. Lock held."""
        ended = [transfer for transfer in self.relied_on if transfer.future.done()]
        return {move.row for transfer in ended for move in transfer.moves} - {row for transfer in ended for row in transfer.coming()}

    def cut(self, pages: int) -> None:
        """Only the first `pages` pages came or will come. Lock held."""
        self.tokens = min(self.tokens, pages * self.residency.layout.page_tokens)
        self.broken = self.broken or (self.promised is not None and self.tokens < self.promised)

    # -- the end ---------------------------------------------------------------------------------------------------------------

    def release(self) -> None:
        """Let the pages go; they stay cached until a policy evicts them. A second release does nothing, nor does one in a forked child."""
        if not self.released and self.give_back is not None and self.residency.left_behind is None:
            self.give_back(self)

    def __repr__(self) -> str:
        state = "released" if self.released else "ready" if self.restored.done() else "restoring"
        return f"Lease({self.tokens} tokens, {len(self.rows)} pages, {state}{', full' * self.full})"

    def __del__(self) -> None:
        if self.give_back is not None and not (self.released or self.residency.closed or self.residency.left_behind):
            told = f"{self!r} was never released: its pages stay where they are for ever; use `with`, or release()"
            warnings.warn(told, ResourceWarning, stacklevel=2, source=self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _check(self) -> None:
        if self.released:
            raise LeaseError("this lease was released; acquire a new one")
        self.residency.check_open()
