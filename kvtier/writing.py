"""How a lease's sequence grows and shrinks on the device: open pages, sealing, sharing, copy-on-write, roll-back.

Runs on the caller's thread, one caller per lease at a time. Bytes are written into slots nobody else can see yet, without the lock; pages
become visible under it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kvtier.errors import LayoutError, LeaseError
from kvtier.keys import PageKey, TokenIds, page_keys, token_array
from kvtier.lease import Lease
from kvtier.mover.transfer import Transfer
from kvtier.pages import NO_ROW, READY, WRITING
from kvtier.residency import DEVICE, Residency
from kvtier.tiers.base import PageId


class Writer:
    """Writes the engine's KV into device pages of one cache."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self.layout = residency.layout

    def append(self, lease: Lease, token_ids: TokenIds, kv: torch.Tensor) -> int:
        """See `TieredKVCache.append`."""
        ids = token_array(token_ids)
        self.check_kv(len(ids), kv)
        self.check_own(lease)
        if lease.released:
            raise LeaseError("append: this lease was released; acquire a new one")
        if not lease.known:
            raise LeaseError(
                "append: lease.tokens is not final yet; wait() for the lease (or await ready(), or read a layer), then compute what follows"
            )
        lease.wait()
        lease.check_whole()
        if lease.full:
            return 0
        del lease.ids[lease.tokens :]
        done = self._fill_open_page(lease, ids, kv)
        if not lease.full:
            done += self._append_pages(lease, ids[done:], kv[:, :, done:])
        if not lease.full and done < len(ids):
            done += self._fill_open_page(lease, ids[done:], kv[:, :, done:], start=True)
        return done

    def truncate(self, lease: Lease, tokens: int) -> None:
        """See `TieredKVCache.truncate`."""
        self.check_own(lease)
        lease.wait()
        if not 0 <= tokens <= lease.tokens:
            raise LeaseError(f"truncate to {tokens} tokens: the lease holds {lease.tokens}")
        residency, page_tokens = self._residency, self.layout.page_tokens
        table = residency.table
        pages, fill = divmod(tokens, page_tokens)
        fresh = NO_ROW
        if fill and table.key[lease.rows[pages]] is not None:
            slots = self._take_slots(1)
            if not slots:
                raise LeaseError(f"truncate to {tokens} tokens needs one free device page and there is none; release a lease first")
            residency.device.copy(int(table.slot[DEVICE, lease.rows[pages]]), slots[0], fill)
            with residency.lock:
                fresh = table.open(lease.rows[pages - 1] if pages else NO_ROW, slots[0], pages)
        with residency.lock:
            keep = pages + (1 if fill and fresh == NO_ROW else 0)
            residency.device.free(table.release(lease.rows[keep:]))
            del lease.rows[keep:]
            if fresh != NO_ROW:
                lease.rows.append(fresh)
            if fill:
                table.fill[lease.rows[-1]] = fill
            lease.tokens = tokens
            lease.full = False
        del lease.ids[tokens:]

    def _fill_open_page(self, lease: Lease, ids: NDArray[np.int64], kv: torch.Tensor, start: bool = False) -> int:
        """Write into the lease's open page (with `start`: a new one) until it is full or the tokens end; seals a full page."""
        residency, page_tokens = self._residency, self.layout.page_tokens
        fill = lease.tokens % page_tokens
        if (fill == 0 and not start) or not len(ids):
            return 0
        table = residency.table
        shared = fill > 0 and int(table.leases[lease.rows[-1]]) > 1
        if fill == 0 or shared:
            fresh = self._take_slots(1)
            if not fresh:
                lease.full = True
                return 0
            with residency.lock:
                parent = lease.rows[lease.tokens // page_tokens - 1] if lease.tokens >= page_tokens else NO_ROW
                row = table.open(parent, fresh[0], lease.tokens // page_tokens)
                old = lease.rows.pop() if shared else NO_ROW
                lease.rows.append(row)
            if shared:
                residency.device.copy(int(table.slot[DEVICE, old]), fresh[0], fill)
                with residency.lock:
                    residency.device.free(table.release([old]))
        row = lease.rows[-1]
        count = min(page_tokens - fill, len(ids))
        residency.device.write_tokens(int(table.slot[DEVICE, row]), fill, kv[:, :, :count])
        lease.ids.extend(ids[:count].tolist())
        lease.tokens += count
        with residency.lock:
            table.fill[row] = fill + count
        if fill + count == page_tokens:
            self._seal(lease)
        return count

    def _seal(self, lease: Lease) -> None:
        residency, table, page_tokens = self._residency, self._residency.table, self.layout.page_tokens
        parent = self._last_key(lease, len(lease.rows) - 1)
        key = page_keys(lease.ids[lease.tokens - page_tokens : lease.tokens], page_tokens, parent)[0]
        while True:
            with residency.lock:
                coming = self._coming([table.row(key)])
                if not coming:
                    row, spare = table.seal(lease.rows[-1], PageId(key, parent, len(lease.rows) - 1))
                    lease.rows[-1] = row
                    if spare == -1:
                        self._commit(row)
                    else:
                        residency.device.free([spare])
                        self._reuse(row)
                    residency.house.tend(DEVICE, [row])
                    return
            self._await_now(coming)

    def _commit(self, row: int) -> None:
        """A page was written by the engine. Lock held."""
        residency = self._residency
        residency.table.uses[row] += 1
        residency.admit(row, DEVICE)
        residency.metrics.tiers[DEVICE].pages_in += 1

    def _reuse(self, row: int) -> None:
        """The engine wrote a page that is on the device already. Lock held."""
        residency = self._residency
        residency.table.uses[row] += 1
        if row in residency.policies[DEVICE]:
            residency.policies[DEVICE].touch(row, residency.clock())

    def _coming(self, rows: Sequence[int]) -> list[Transfer]:
        """The transfers that bring any of these rows to the device; NO_ROW is passed over. Lock held."""
        inflight, state = self._residency.inflight, self._residency.table.state
        return list(dict.fromkeys(inflight[row, DEVICE] for row in rows if row != NO_ROW and state[DEVICE, row] == WRITING))

    def _await_now(self, transfers: Sequence[Transfer]) -> None:
        for transfer in transfers:
            self._residency.mover.urge(transfer)
            transfer.future.result()

    def _append_pages(self, lease: Lease, ids: NDArray[np.int64], kv: torch.Tensor) -> int:
        """Write and commit the full pages of `ids`; the lease ends on a page boundary.

        Pages others already hold on the device are shared.
        """
        residency, layout = self._residency, self.layout
        count = len(ids) // layout.page_tokens
        if not count:
            return 0
        table, base = residency.table, len(lease.rows)
        keys = page_keys(ids, layout.page_tokens, self._last_key(lease, base))
        held, missing = self._hold_present(keys)
        slots = self._take_slots(len(missing))
        stop = missing[len(slots)] if len(slots) < len(missing) else count
        written = missing[: len(slots)]
        if written:
            shape = (layout.layers, layout.planes, count, layout.page_tokens, layout.kv_heads, layout.head_dim)
            pages = kv[:, :, : count * layout.page_tokens].reshape(shape).permute(2, 0, 1, 3, 4, 5)
            residency.device.scatter(slots, pages[written])
        slot_of = dict(zip(written, slots, strict=True))
        collided = False
        with residency.lock:
            committed = []
            for index in range(stop):
                parent = lease.rows[-1] if lease.rows else NO_ROW
                row = held.pop(index, NO_ROW)
                if row == NO_ROW:
                    page = PageId(keys[index], keys[index - 1] if index else self._last_key(lease, base), base + index)
                    row, spare = self._adopt(page, parent, slot_of.pop(index))
                    if spare != -1:
                        residency.device.free([spare])
                    if row == NO_ROW:
                        stop, collided = index, True
                        break
                    committed.append(row)
                lease.rows.append(row)
            table.release(list(held.values()))
            residency.device.free(list(slot_of.values()))
            residency.house.tend(DEVICE, committed)
        taken = stop * layout.page_tokens
        lease.ids.extend(ids[:taken].tolist())
        lease.tokens += taken
        if collided:
            return taken + self._append_pages(lease, ids[taken:], kv[:, :, taken:])
        lease.full = stop < count
        return taken

    def _hold_present(self, keys: Sequence[PageKey]) -> tuple[dict[int, int], list[int]]:
        """Lease the pages that are on the device already (index -> row); indices of the others. Waits for those on their way up."""
        residency = self._residency
        while True:
            with residency.lock:
                table = residency.table
                rows = [table.row(key) for key in keys]
                coming = self._coming(rows)
                if not coming:
                    held = {index: row for index, row in enumerate(rows) if row != NO_ROW and table.state[DEVICE, row] == READY}
                    table.lease(np.array(list(held.values()), np.int64))
                    for row in reversed(held.values()):
                        self._reuse(row)
                    return held, [index for index in range(len(keys)) if index not in held]
            self._await_now(coming)

    def _adopt(self, page: PageId, parent: int, slot: int) -> tuple[int, int]:
        """Give `page` the device copy in `slot` and lease it; (row or NO_ROW, slot that was not needed or -1). Lock held."""
        residency = self._residency
        table = residency.table
        row = table.add(page, parent)
        if table.state[DEVICE, row] == WRITING:  # a restore of this very page started meanwhile: let it be
            return NO_ROW, slot
        table.lease(np.array([row], np.int64))
        if table.state[DEVICE, row] == READY:
            return row, slot
        table.begin([row], DEVICE, [slot])
        table.commit(row, DEVICE)
        self._commit(row)
        return row, -1

    def _last_key(self, lease: Lease, pages: int) -> PageKey:
        """Key of the page before page `pages` of the lease."""
        if not pages:
            return lease.root
        key = self._residency.table.key[lease.rows[pages - 1]]
        assert key is not None
        return key

    def _take_slots(self, count: int) -> list[int]:
        """Up to `count` device slots, waiting for evicted pages to be copied down if that is needed."""
        residency = self._residency
        with residency.lock:
            slots = residency.reserve_now(DEVICE, count)
        return slots if slots is not None else residency.mover.spawn(residency.reserve(DEVICE, count)).result()

    def check_own(self, lease: Lease) -> None:
        """LeaseError for a lease of another cache: its rows mean other pages here."""
        if lease.residency is not self._residency:
            raise LeaseError("this lease belongs to another cache; use it with the cache that gave it")

    def check_kv(self, tokens: int, kv: torch.Tensor) -> None:
        """LayoutError unless `kv` is `[layers, planes, tokens, kv_heads, head_dim]` of the layout's dtype."""
        layout = self.layout
        expected = (layout.layers, layout.planes, tokens, layout.kv_heads, layout.head_dim)
        if tuple(kv.shape) != expected:
            raise LayoutError(f"kv has shape {tuple(kv.shape)}; expected [layers, planes, tokens, kv_heads, head_dim] = {list(expected)}")
        if kv.dtype != layout.torch_dtype:
            raise LayoutError(f"kv is {kv.dtype}; this cache holds {layout.torch_dtype}")
