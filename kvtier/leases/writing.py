"""How a lease's sequence grows and shrinks on the device: open pages, sealing, sharing, copy-on-write, roll-back.

Runs on the caller's thread, one caller per lease at a time. Bytes are written into slots nobody else can see yet, without the lock; pages
become visible under it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from kvtier.errors import LayoutError, LeaseError
from kvtier.formats.base import check_address
from kvtier.keys import PageKey, TokenIds, page_keys, token_array
from kvtier.leases.digesting import pool_digests
from kvtier.leases.fresh import Computed, FreshPages, Held
from kvtier.leases.lease import Lease
from kvtier.mover.transfer import Transfer
from kvtier.pages import DEVICE, NO_ROW, READY, WRITING, Rows
from kvtier.residency import Residency
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
            done += self._append_pages(lease, ids[done:], Computed(kv[:, :, done:], self.layout))
        if not lease.full and done < len(ids):
            done += self._fill_open_page(lease, ids[done:], kv[:, :, done:], start=True)
        return done

    def take_over(self, twin: Lease, lease: Lease) -> None:
        """Continue `twin`, an empty lease of this cache, with the tokens of `lease`, of another cache; see `forking.py`."""
        page_tokens, other = self.layout.page_tokens, lease.residency
        with other.lock:
            slots = other.table.slot[DEVICE, lease.rows].tolist()
        ids = token_array(lease.ids[: lease.tokens])
        full = lease.tokens // page_tokens
        taken = self._append_pages(twin, ids[: full * page_tokens], Held(other.device, slots[:full]))
        if not twin.full and taken < len(ids):
            rest = other.device.gather(slots[full:])[0, :, :, : len(ids) - taken]
            self._fill_open_page(twin, ids[taken:], rest, start=True)

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
            with self._given_back_on_failure(slots):
                residency.device.copy(int(table.slot[DEVICE, lease.rows[pages]]), slots[0], fill)
            with residency.lock:
                fresh = table.open(lease.rows[pages - 1] if pages else NO_ROW, slots[0], pages)
        with residency.lock:
            keep = pages + (1 if fill and fresh == NO_ROW else 0)
            residency.release(lease.rows[keep:])
            del lease.rows[keep:]
            if fresh != NO_ROW:
                lease.rows.append(fresh)
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
        fresh = self._take_slots(1) if fill == 0 or shared else []
        if (fill == 0 or shared) and not fresh:
            lease.full = True
            return 0
        count = min(page_tokens - fill, len(ids))
        slot = fresh[0] if fresh else int(table.slot[DEVICE, lease.rows[-1]])
        with self._given_back_on_failure(fresh):
            if shared:
                residency.device.copy(int(table.slot[DEVICE, lease.rows[-1]]), slot, fill)
            residency.device.write_tokens(slot, fill, kv[:, :, :count])
        if fresh:
            with residency.lock:
                parent = lease.rows[lease.tokens // page_tokens - 1] if lease.tokens >= page_tokens else NO_ROW
                row = table.open(parent, slot, lease.tokens // page_tokens)
                if shared:
                    residency.release([lease.rows.pop()])
                lease.rows.append(row)
        lease.ids.extend(ids[:count].tolist())
        lease.tokens += count
        if fill + count == page_tokens:
            self._seal(lease)
        return count

    def _seal(self, lease: Lease) -> None:
        residency, table, page_tokens = self._residency, self._residency.table, self.layout.page_tokens
        parent = self._last_key(lease, len(lease.rows) - 1)
        key = page_keys(lease.ids[lease.tokens - page_tokens : lease.tokens], page_tokens, parent)[0]
        kept = residency.digests
        digest = None if kept is None else pool_digests(residency.device, [int(table.slot[DEVICE, lease.rows[-1]])])
        while True:
            with residency.lock:
                coming = self._coming(table.rows_of([key]))
                if not coming:
                    row, spare = table.seal(lease.rows[-1], PageId(key, parent, len(lease.rows) - 1))
                    lease.rows[-1] = row
                    rows = np.array([row])
                    if spare == -1:
                        residency.written(rows)
                    else:
                        residency.device.free([spare])
                        residency.used(rows)
                    if kept is not None and digest is not None:
                        kept.put([row], [key], digest)
                    residency.house.tend(DEVICE, rows)
                    return
            self._await_now(coming)

    def _coming(self, rows: Rows) -> list[Transfer]:
        """The transfers that bring any of these rows to the device; NO_ROW is passed over. Lock held."""
        residency = self._residency
        writing = rows[residency.table.state[DEVICE][rows] == WRITING]
        return list(dict.fromkeys(residency.copying.inflight[row, DEVICE] for row in writing.tolist()))

    def _await_now(self, transfers: Sequence[Transfer]) -> None:
        for transfer in transfers:
            self._residency.mover.urge(transfer)
            transfer.future.result()

    def _append_pages(self, lease: Lease, ids: NDArray[np.int64], pages: FreshPages) -> int:
        """Write and commit the full pages of `ids`; the lease ends on a page boundary.

        Pages others already hold on the device are shared. If writing fails, nothing is taken.
        """
        residency, layout, count = self._residency, self.layout, pages.count
        if not count:
            return 0
        table, base = residency.table, len(lease.rows)
        keys = page_keys(ids, layout.page_tokens, self._last_key(lease, base))
        rows = self._hold_present(keys)
        missing = np.flatnonzero(rows == NO_ROW).tolist()
        slots: list[int] = []
        digests = None
        with self._given_back_on_failure(slots, rows):
            slots += self._take_slots(len(missing))
            stop = missing[len(slots)] if len(slots) < len(missing) else count
            written = missing[: len(slots)]
            if written:
                pages.write(residency.device, slots, written)
                digests = pool_digests(residency.device, slots) if residency.digests is not None else None
        with residency.lock:
            placed, collided = self._place(lease, keys, rows, written, slots, stop)
            if residency.digests is not None and digests is not None:
                there = [index for index in written if index < placed]
                residency.digests.put(rows[there].tolist(), [keys[index] for index in there], digests[: len(there)])
            left = rows[placed:]
            table.release(left[left != NO_ROW])
        taken = placed * layout.page_tokens
        lease.ids.extend(ids[:taken].tolist())
        lease.tokens += taken
        if collided:
            return taken + self._append_pages(lease, ids[taken:], pages.after(placed))
        lease.full = placed < count
        return taken

    def _hold_present(self, keys: Sequence[PageKey]) -> Rows:
        """Lease the pages that are on the device already; their rows, NO_ROW for the others. Waits for those on their way up."""
        residency = self._residency
        while True:
            with residency.lock:
                table = residency.table
                rows = table.rows_of(keys)
                coming = self._coming(rows)
                if not coming:
                    rows[table.state[DEVICE][rows] != READY] = NO_ROW
                    held = rows[rows != NO_ROW]
                    table.lease(held)
                    residency.used(held)
                    return rows
            self._await_now(coming)

    def _place(
        self, lease: Lease, keys: Sequence[PageKey], rows: Rows, written: Sequence[int], slots: Sequence[int], stop: int
    ) -> tuple[int, bool]:
        """Put the pages before `stop` on the lease: those that `rows` names, and what was written for the others; (how many, collided).

        Somebody else may have begun to bring up, or have written, the same pages meanwhile. The first lets these be (collided: ask again),
        the second's are used. Slots that so are left over are freed. Lock held.
        """
        residency, base = self._residency, len(lease.rows)
        table = residency.table
        others = table.rows_of([keys[index] for index in written])
        states = table.state[DEVICE][others]
        collided = bool((states == WRITING).any())
        if collided:
            stop = written[int((states == WRITING).argmax())]
        slot_of = dict(zip(written, slots, strict=True))
        for index, row, state in zip(written, others.tolist(), states.tolist(), strict=True):
            if state == READY and index < stop:
                rows[index] = row
                table.lease(rows[index : index + 1])
                residency.device.free([slot_of.pop(index)])
        residency.device.free([slot_of.pop(index) for index in written if index >= stop])
        fresh = np.array(list(slot_of), np.int64)
        for run in np.split(fresh, np.flatnonzero(np.diff(fresh) > 1) + 1) if len(fresh) else ():
            first, end = int(run[0]), int(run[-1]) + 1
            before = keys[first - 1] if first else self._last_key(lease, base)
            parent = int(rows[first - 1]) if first else lease.rows[-1] if lease.rows else NO_ROW
            rows[first:end] = residency.settle_in(keys[first:end], before, base + first, parent, [slot_of[index] for index in run.tolist()])
        lease.rows += rows[:stop].tolist()
        residency.house.tend(DEVICE, rows[fresh])
        return stop, collided

    def _last_key(self, lease: Lease, pages: int) -> PageKey:
        """Key of the page before page `pages` of the lease."""
        if not pages:
            return lease.root
        return self._residency.table.page_id(lease.rows[pages - 1]).key

    def _take_slots(self, count: int) -> list[int]:
        """Up to `count` device slots, waiting for evicted pages to be copied down if that is needed."""
        residency = self._residency
        with residency.lock:
            slots = residency.eviction.reserve_now(DEVICE, count)
        return slots if slots is not None else residency.eviction.wait_for_slots(count)

    @contextmanager
    def _given_back_on_failure(self, slots: Sequence[int], rows: Rows | None = None) -> Iterator[None]:
        """If what is done inside fails, nobody will ask for these slots again, nor for the holds on these rows (NO_ROW is passed over)."""
        try:
            yield
        except BaseException:
            with self._residency.lock:
                self._residency.device.free(slots)
                if rows is not None:
                    self._residency.table.release(rows[rows != NO_ROW])
            raise

    def check_own(self, lease: Lease) -> None:
        """LeaseError for a lease of another cache: its rows mean other pages here."""
        if lease.residency is not self._residency:
            raise LeaseError("this lease belongs to another cache; use it with the cache that gave it")

    def check_kv(self, tokens: int, kv: torch.Tensor) -> None:
        """LayoutError unless `kv` is `[layers, planes, tokens, kv_heads, head_dim]` of the layout's dtype, at a multiple of its size."""
        layout = self.layout
        if not isinstance(kv, torch.Tensor):
            raise LayoutError(f"kv is {type(kv).__name__}; expected a torch tensor")
        if kv.layout != torch.strided or kv.is_meta:
            raise LayoutError(f"kv is a {kv.layout} tensor on {kv.device}; expected a dense tensor on a CPU or GPU")
        expected = (layout.layers, layout.planes, tokens, layout.kv_heads, layout.head_dim)
        if tuple(kv.shape) != expected:
            raise LayoutError(f"kv has shape {tuple(kv.shape)}; expected [layers, planes, tokens, kv_heads, head_dim] = {list(expected)}")
        if kv.dtype != layout.torch_dtype:
            raise LayoutError(f"kv is {kv.dtype}; this cache holds {layout.torch_dtype}")
        check_address(kv, layout, "kv begins")
