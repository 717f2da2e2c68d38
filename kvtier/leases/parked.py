"""The parked pages of one sequence: leased, but only in tiers below the device, from where single layers of them are read.

Parked copies are held like those of a transfer, so their bytes stay where they are until `release`. State belongs to the thread that uses
the lease; the page table is touched under the residency's lock. `read` may run on a worker beside it, as long as nothing is parked or let
go meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kvtier.errors import LeaseError, TransferFailed
from kvtier.formats import Payload
from kvtier.leases.lease import Lease
from kvtier.memory.region import aligned_array
from kvtier.mover.transfer import Priority
from kvtier.pages import DEVICE, READY, Rows
from kvtier.residency import Residency
from kvtier.tiers.base import Refused, Tier


class Parked:
    """Of the full pages of `lease`, those from `first` up to some page: `pages`. All others are on the device."""

    def __init__(self, residency: Residency, lease: Lease, first: int) -> None:
        self._residency = residency
        self._lease = lease
        self._first = first
        self._to = 0
        self._held: dict[int, tuple[int, int]] = {}
        """Parked page -> (tier, slot) of the copy that is held."""
        self._payloads: dict[int, Payload] = {}
        """Parked page -> its bytes, where the tier's memory can be looked at."""

    @property
    def pages(self) -> range:
        """The pages that are parked."""
        return range(self._first, max(self._first, self._to))

    # -- who is where ----------------------------------------------------------------------------------------------------------

    def settle(self, device_pages: int, recent: int) -> None:
        """Bring a leased prefix into shape, so that `device_pages` of it are on the device at most: park all but the first and the `recent`
        last ones, bring those up; what does not come or verify shortens the lease."""
        while self._lease.pages:
            pages = self._lease.pages
            to = pages - recent if pages > device_pages else 0
            self._let_go([page for page in self._held if page >= to])
            if to > self._first:
                self.park(to, whole=False)
            ends = [*range(min(self._first, pages)), *range(max(self._first, self._to), pages)]
            if self._lease.pages == pages and self._bring(ends):
                return

    def park(self, to: int, whole: bool = True) -> None:
        """Let the pages up to `to` leave the device, but for the first ones. With `whole`, LeaseError if they have nowhere to go."""
        residency, table = self._residency, self._residency.table
        start = max(self._first, self._to)
        rows = np.array(self._lease.rows[start:to], np.int64)
        residency.mover.spawn(self._sink(rows)).result()
        with residency.lock:
            cold = table.has_copy_below(rows, DEVICE)
            if not cold.all():
                if whole:
                    raise LeaseError("no tier below the device has room for the pages of this sequence; raise host.capacity_bytes")
                self._cut(start + int(cold.argmin()))
                rows = rows[: self._lease.pages - start] if self._lease.pages > start else rows[:0]
            gone = rows[(table.leases[rows] == 1) & (table.readers[DEVICE][rows] == 0) & (table.state[DEVICE][rows] == READY)]
            known = gone[residency.policies[DEVICE].here(gone)]
            residency.device.leave()  # the engine's stream may still be reading them
            residency.policies[DEVICE].remove(known)
            residency.eviction.drop(known, DEVICE, "parked")
            for page, row in enumerate(rows.tolist(), start):
                tier = next(tier for tier in range(DEVICE + 1, len(residency.tiers)) if table.state[tier, row] == READY)
                table.hold([row], tier)
                self._held[page] = (tier, int(table.slot[tier, row]))
            self._to = start + len(rows)
        self._look(range(start, start + len(rows)), whole)

    def release(self) -> None:
        """Let all copies go that are held."""
        self._let_go(list(self._held))

    async def _sink(self, rows: Rows) -> None:
        """Give each of these pages a copy below the device, in memory if there is room. On the loop."""
        residency, table = self._residency, self._residency.table
        for below in range(DEVICE + 1, len(residency.tiers)):
            with residency.lock:
                homeless = rows[~table.has_copy_below(rows, DEVICE) & (table.state[DEVICE][rows] == READY)]
            if len(homeless):
                await residency.copying.down(homeless, DEVICE, below, Priority.DEMAND)
        for tier in range(DEVICE + 2, len(residency.tiers)):
            with residency.lock:
                deep = rows[(table.state[tier][rows] == READY) & ~table.has_copy_below(rows, DEVICE, tier - 1)]
            if len(deep) and _in_memory(residency, DEVICE + 1):
                await residency.copying.down(deep, tier, DEVICE + 1, Priority.DEMAND)

    def _look(self, pages: range, whole: bool) -> None:
        """Verify parked copies; keep a view of those in memory. What does not verify shortens the sequence, or is TransferFailed."""
        for page in pages:
            if page >= self._lease.pages:
                return
            payload = self._load([page])[0]
            if isinstance(payload, Refused):
                self._refused(page, payload)
                if whole:
                    raise _lost(payload)
                self._cut(page)
                return
            if _in_memory(self._residency, self._held[page][0]):
                self._payloads[page] = payload

    def _bring(self, pages: Sequence[int]) -> bool:
        """Have these pages on the device; False, and the sequence shorter, if one does not come."""
        residency, table = self._residency, self._residency.table
        rows = np.array([self._lease.rows[page] for page in pages], np.int64)
        residency.mover.spawn(residency.copying.bring(rows)).result()
        with residency.lock:
            ready = table.state[DEVICE][rows] == READY
            if not ready.all():
                self._cut(pages[int(ready.argmin())])
        return bool(ready.all())

    def _cut(self, pages: int) -> None:
        """Only the first `pages` pages can be had; let go of the others."""
        residency, lease = self._residency, self._lease
        with residency.lock:
            self._let_go([page for page in self._held if page >= pages])
            residency.release(lease.rows[pages:])
            del lease.rows[pages:]
            lease.tokens = pages * residency.layout.page_tokens
        del lease.ids[lease.tokens :]
        self._to = min(self._to, pages)

    def _let_go(self, pages: Sequence[int]) -> None:
        with self._residency.lock:
            for page in pages:
                tier, _ = self._held.pop(page)
                self._payloads.pop(page, None)
                self._residency.copying.let_go(np.array([self._lease.rows[page]]), tier)
            if pages:
                self._to = min(self._to, min(pages))

    def _refused(self, page: int, refused: Refused) -> None:
        """Count a copy that did not verify, and let go of it, by which it is buried."""
        copying, row = self._residency.copying, self._lease.rows[page]
        with self._residency.lock:
            tier, _ = self._held.pop(page)
            copying.lose(row, tier, refused)
            copying.let_go(np.array([row]), tier)

    # -- bytes -----------------------------------------------------------------------------------------------------------------

    def read_into(self, pages: Sequence[int], layer: int, slots: Sequence[int]) -> None:
        """Read `layer` of parked pages into these slots of the device, which the caller has reserved. TransferFailed as `decode`."""
        pool = self._residency.device
        memory, layers = pool.memory(), slice(layer, layer + 1)
        if memory is None:
            pool.scatter(slots, self.read(pages, layer)[:, None], layers)
            return
        for tier, some in self._by_tier(pages):
            to = [slots[pages.index(page)] for page in some]
            tier.format.decode(self._payloads_of(some), pool.layout, layers, memory[:, layers], to)

    def read(self, pages: Sequence[int], layer: int) -> torch.Tensor:
        """`layer` of parked pages `[len(pages), planes, page_tokens, kv_heads, head_dim]`, CPU. TransferFailed as `decode`."""
        return self.decode(pages, slice(layer, layer + 1))[:, 0]

    def decode(self, pages: Sequence[int], layers: slice) -> torch.Tensor:
        """These layers of parked pages `[len(pages), layers, planes, page_tokens, kv_heads, head_dim]`, CPU.

        TransferFailed if one cannot be read any more.
        """
        layout = self._residency.layout
        first, stop, _ = layers.indices(layout.layers)
        out = torch.empty((len(pages), stop - first, *layout.shape[1:]), dtype=layout.torch_dtype)
        for tier, some in self._by_tier(pages):
            tier.format.decode(self._payloads_of(some), layout, layers, out, [pages.index(page) for page in some])
        return out

    def _by_tier(self, pages: Sequence[int]) -> list[tuple[Tier, list[int]]]:
        if not self._held.keys() >= set(pages):
            raise _lost(Refused("unusable"))  # and told so when they were parked
        held = sorted({self._held[page][0] for page in pages})
        return [(_tier(self._residency, index), [page for page in pages if self._held[page][0] == index]) for index in held]

    def _payloads_of(self, pages: Sequence[int]) -> list[Payload]:
        unseen = [page for page in pages if page not in self._payloads]
        read = dict(zip(unseen, self._load(unseen), strict=True)) if unseen else {}
        payloads = []
        for page in pages:
            payload = self._payloads[page] if page in self._payloads else read[page]
            if isinstance(payload, Refused):
                raise _lost(payload)
            payloads.append(payload)
        return payloads

    def _load(self, pages: Sequence[int]) -> list[Payload | Refused]:
        """Verified payloads of parked pages of one tier, as `decode` takes them."""
        residency = self._residency
        tier = _tier(residency, self._held[pages[0]][0])
        # A tier in memory gives views of it and reads nothing.
        staging = np.empty((len(pages), 0), np.uint8) if tier.in_memory else aligned_array(len(pages) * tier.slot_bytes)
        keys = [residency.table.page_id(self._lease.rows[page]).key for page in pages]
        payloads: list[Payload | Refused] = []
        for payload in tier.load([self._held[page][1] for page in pages], keys, staging.reshape(len(pages), -1)):
            if isinstance(payload, Refused):
                payloads.append(payload)
                continue
            try:
                payloads += tier.format.unpack([payload], residency.layout)
            except ValueError:
                payloads.append(Refused("format"))
        return payloads


def _tier(residency: Residency, index: int) -> Tier:
    tier = residency.tiers[index]
    if not isinstance(tier, Tier):
        raise LeaseError(f"pages cannot be recalled from {tier.name}")
    return tier


def _in_memory(residency: Residency, index: int) -> bool:
    tier = residency.tiers[index]
    return isinstance(tier, Tier) and tier.in_memory


def _lost(refused: Refused) -> TransferFailed:
    return TransferFailed(f"a parked page cannot be read any more ({refused.reason}); release the lease and compute its tokens again")
