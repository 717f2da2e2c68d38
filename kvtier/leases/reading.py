"""How a lease gets what it covers: found, held, worth bringing up, brought to the device, and cut where something does not come.

Made once per cache. `lookup` and `acquire` run on the caller's thread and return at once; `_restore` runs on the mover's loop. What it took
to bring pages up teaches the prices.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from kvtier.keys import PageKey, page_keys
from kvtier.leases.lease import Lease, Match
from kvtier.mover.transfer import Transfer
from kvtier.pages import ABSENT, DEVICE, READY, WRITING, Rows
from kvtier.residency import Residency

LEARN_AFTER_S = 0.001
"""So long whoever waited for a restore is left alone before what it took is learned: it goes on with the interpreter's lock, and soon
needs that of the cache."""


class Reader:
    """Gives leases on the pages of one cache, and takes them back."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._page_tokens = residency.layout.page_tokens

    def lookup(self, ids: NDArray[np.int64], root: PageKey) -> Match:
        """See `TieredKVCache.lookup`."""
        residency, page_tokens = self._residency, self._page_tokens
        keys = page_keys(ids, page_tokens, root)
        with residency.lock:
            rows = residency.table.find(keys)
            tiers = residency.table.warmest(rows)
            counts = np.bincount(tiers, minlength=len(residency.tiers))
            moved = counts * residency.page_bytes
            restore_s = residency.prices.restore_s(moved)
            recompute_s = residency.prices.recompute_s(0, len(rows) * page_tokens)
        return Match(
            tokens=len(rows) * page_tokens,
            ids=ids[: len(rows) * page_tokens],
            keys=tuple(keys[: len(rows)]),
            root=root,
            pages_by_tier={name: int(count) for name, count in zip(residency.names, counts, strict=True)},
            restore_bytes=int(moved[1:].sum()),
            restore_s=restore_s,
            recompute_s=recompute_s,
        )

    def acquire(self, match: Match) -> Lease:
        """See `TieredKVCache.acquire`."""
        residency = self._residency
        with residency.lock:
            table = residency.table
            rows = residency.claim(match.keys[: self._worthwhile(match)])
            lease = self._lease(match, rows)
            missing = int((table.state[DEVICE][rows] != READY).sum())
            if missing:
                moved = np.bincount(table.warmest(rows), minlength=len(residency.tiers)) * residency.page_bytes
        if missing:
            residency.start(self._restore(lease, missing, moved, time.perf_counter()))
        else:
            _complete(lease)
        return lease

    def hold(self, match: Match) -> Lease:
        """A lease on the pages of `match` where they are: nothing is brought up, and `tokens` is final."""
        with self._residency.lock:
            rows = self._residency.claim(match.keys)
        lease = self._lease(match, rows)
        _complete(lease)
        return lease

    def fork(self, lease: Lease) -> Lease:
        """A second lease on what `lease`, which is ready, covers."""
        residency = self._residency
        with residency.lock:
            residency.table.lease(np.array(lease.rows, np.int64))
            ids = lease.ids[: lease.tokens]
            twin = Lease(residency, lease.root, list(lease.rows), ids, lease.tokens, Future(), give_back=self._release)
        _complete(twin)
        return twin

    def _lease(self, match: Match, rows: Rows) -> Lease:
        tokens = len(rows) * self._page_tokens
        ids = array("q", match.ids[:tokens].tobytes())
        return Lease(self._residency, match.root, rows.tolist(), ids, tokens, Future(), give_back=self._release)

    def _worthwhile(self, match: Match) -> int:
        """How many of the match's pages are worth bringing up, counting as declined those that are not. Lock held."""
        residency = self._residency
        if not match.keys or residency.config.mover.restore == "always":
            return len(match.keys)
        rows = residency.table.find(match.keys)
        pages = residency.prices.pages_to_restore(residency.table.warmest(rows), residency.page_bytes)
        if pages == len(rows):
            return len(match.keys)
        residency.metrics.tokens_declined += (len(rows) - pages) * self._page_tokens
        return pages

    async def _restore(self, lease: Lease, missing: int, moved: NDArray[np.int64], asked_s: float) -> None:
        """Bring the lease's pages to the device, as far as there is room; cut the lease where one does not come.

        `missing`: pages that were not on the device when it was asked for, at `asked_s`; `moved`: their encoded bytes by tier. What it
        took teaches the prices only if nobody else brought any of them.
        """
        residency, table = self._residency, self._residency.table
        asked: set[int] = set()
        alone, tokens = True, lease.tokens

        def in_state(state: int) -> Rows:
            """Rows of this lease whose device copy is in that state. Lock held."""
            rows = np.array([] if lease.released else lease.rows, np.int64)
            found: Rows = rows[table.state[DEVICE][rows] == state]
            return found

        def join() -> list[Transfer]:
            """Go along with every transfer that brings pages of this lease, whoever started it."""
            with residency.lock:
                rows = in_state(WRITING).tolist()
                coming = list(dict.fromkeys([residency.copying.inflight[row, DEVICE] for row in rows]))
                lease.transfers = list(dict.fromkeys([*lease.transfers, *coming]))
            for transfer in coming:
                residency.mover.urge(transfer)
            return coming

        def launched(_: list[Transfer]) -> None:
            join()
            lease.submitted.set()

        try:
            while True:
                joined = join()
                alone = alone and not joined
                if not any(transfer.cancelled for transfer in joined):  # else a hint was taken back this moment: see what is left then
                    with residency.lock:
                        wanted = [row for row in in_state(ABSENT).tolist() if row not in asked]
                    if not joined and not wanted:
                        break
                    asked.update(wanted)
                    await residency.copying.lift(wanted, launched)
                for transfer in joined:
                    await transfer.ending()
        finally:
            with residency.lock:
                if not lease.released:
                    self._cut(lease)
            whole, seconds = alone and len(asked) == missing and lease.tokens == tokens, time.perf_counter() - asked_s
            lease.submitted.set()
            lease.restored.set_result(None)
        if whole:
            await asyncio.sleep(LEARN_AFTER_S)
            with residency.lock:
                residency.prices.restored(moved, seconds)

    def _cut(self, lease: Lease) -> None:
        """Shorten a lease to the prefix that is on the device and let the rest go. Lock held."""
        ready = self._residency.table.state[DEVICE, lease.rows] == READY
        if failed := lease.failed():
            ready &= ~np.isin(lease.rows, list(failed))
        lease.cut(len(lease.rows) if ready.all() else int(ready.argmin()))
        self._residency.table.release(lease.rows[lease.pages :])
        del lease.rows[lease.pages :]

    def _release(self, lease: Lease) -> None:
        residency = self._residency
        with residency.lock:
            if lease.released:
                return
            residency.release(lease.rows)
            lease.released = True


def _complete(lease: Lease) -> None:
    """Nothing has to come: what the lease covers is final."""
    lease.known = True
    lease.submitted.set()
    lease.restored.set_result(None)
