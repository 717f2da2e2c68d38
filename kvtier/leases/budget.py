"""One sequence on a device budget smaller than itself: what of it stays on the device, what is recalled, what streams through.

Of the sequence's full pages the first and the last few stay on the device; the others are *parked*: leased, but only in colder tiers. The
budget that is left is *frames*: device slots that belong to the sequence, of which each layer fills its share with the parked pages that
its own query asks for, layer by layer (`choose`, `gather`), or nothing, where every layer gets all pages (`stream`).

State belongs to the thread that uses the lease, one at a time; the page table is touched under the residency's lock. Parked copies are
held like those of a transfer, so their bytes stay where they are until `release`. A worker reads ahead for `stream` and touches only
its own buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np
import torch
from numpy.typing import NDArray

from kvtier.attention.digest import DigestLayout, encode
from kvtier.attention.on_device import page_logits
from kvtier.attention.select import best_pages, page_mass
from kvtier.errors import ConfigError, LeaseError, TransferFailed
from kvtier.formats import Payload
from kvtier.keys import TokenIds
from kvtier.leases.digesting import pool_digests
from kvtier.leases.lease import Lease
from kvtier.leases.writing import Writer
from kvtier.memory.region import aligned_array
from kvtier.mover.transfer import Priority, ended
from kvtier.pages import ABSENT, DEVICE, READY, WRITING, Rows
from kvtier.residency import Residency
from kvtier.tiers.base import Refused, Tier

SINKS = 1
"""Pages from the start that always stay: attention rests on the first tokens (Xiao et al. 2023)."""
RECENT = 4
"""Pages at the end that always stay, the one being filled included. 2, 4 and 8 of 24 came out alike on SmolLM2."""
LEAST_PAGES = SINKS + 2 + 1


def shares(device_pages: int) -> tuple[int, int]:
    """How a budget is spent beside the first page and the one being filled: (recent full pages, frames for pages that are chosen)."""
    recent = min(RECENT, device_pages - SINKS - 1) - 1
    return recent, device_pages - SINKS - 1 - recent


def check_budget(residency: Residency, device_pages: int) -> None:
    """LeaseError for a budget too small to work with or larger than the device, ConfigError where nothing is below the device."""
    if residency.last == DEVICE:
        raise ConfigError("a device budget needs a tier below the device to recall pages from; configure host or disk")
    if device_pages < LEAST_PAGES:
        raise LeaseError(f"device_pages is {device_pages}; expected at least {LEAST_PAGES}: the first, two recent ones, one to choose")
    if device_pages > residency.device.capacity_slots + 1:
        raise LeaseError(f"device_pages is {device_pages}, but the device holds {residency.device.capacity_slots}; ask for fewer")


class BudgetedLease:
    """A hold on one sequence of which at most `device_pages` pages are on the device at any time.

    One of these is the caller's: for the tokens of the page that is being filled, which it keeps until the page is full. Made by
    `TieredKVCache.acquire_within`; also a context manager. `tokens` is a multiple of the page size.
    """

    def __init__(
        self,
        residency: Residency,
        writer: Writer,
        lease: Lease,
        device_pages: int,
        choosing: bool,
        record: Callable[[Lease, NDArray[np.float64]], None],
    ) -> None:
        self.device_pages = device_pages
        self.recalled = 0
        """Layers of pages that were brought back to the device because a query asked for them."""
        self._residency = residency
        self._writer = writer
        self._lease = lease
        self._choosing = choosing
        self._record = record
        self._recent, self._frame_count = shares(device_pages)
        self._parked_to = 0
        """Pages from SINKS up to this one are parked; all others are on the device."""
        self._held: dict[int, tuple[int, int]] = {}
        """Parked page -> (tier, slot) of the copy that is held."""
        self._payloads: dict[int, Payload] = {}
        """Parked page -> its bytes, where the tier's memory can be looked at."""
        self._frames: list[int] = []
        self._placed: list[dict[int, int]] = [{} for _ in range(residency.layout.layers)]
        """Per layer: parked page -> the frame its keys and values are in."""
        self._shape = DigestLayout.of(residency.layout)
        self._digests = torch.empty((0, residency.layout.layers, residency.layout.kv_heads, self._shape.digest_bytes), dtype=torch.uint8)
        self._digests = self._digests.to(residency.device.place)
        self._digested = 0
        self._mass: torch.Tensor | None = None
        self._ahead: tuple[tuple[int, int], Future[torch.Tensor]] | None = None
        try:
            self._settle()
        except BaseException:
            self.release()
            raise

    @property
    def tokens(self) -> int:
        """Tokens of the sequence that are kept, in full pages."""
        return self._lease.tokens

    @property
    def pages(self) -> int:
        """Pages of `tokens`."""
        return self._lease.pages

    @property
    def parked(self) -> range:
        """The pages that are not on the device but for what `gather` recalls."""
        return range(SINKS, max(SINKS, self._parked_to))

    # -- attending -------------------------------------------------------------------------------------------------------------

    def choose(self, layer: int, queries: torch.Tensor, scaling: float | None = None) -> list[int]:
        """The pages `layer` attends over for `queries` `[heads, head_dim]`, in order: those that stay, and the best parked ones.

        The best are those of which the digests say that they would get most attention, as many as there are frames.
        """
        if not self.parked:
            return list(range(self.pages))
        frames, parked = self._take_frames(), self.parked
        self._digest()
        logits = page_logits(self._digests[: self.pages, layer], queries.detach()[None].to(self._digests.device), self._shape, scaling)
        mass = page_mass(logits)
        self._mass = mass[0] if self._mass is None or len(self._mass) != self.pages else self._mass + mass[0]
        candidates = torch.zeros_like(mass, dtype=torch.bool)
        candidates[:, parked.start : parked.stop] = True
        chosen: list[int] = best_pages(mass, candidates, len(frames))[0].nonzero()[:, 0].tolist()
        self._evict(layer, chosen, mass[0])
        return [*range(SINKS), *chosen, *range(parked.stop, self.pages)]

    def gather(self, layer: int, pages: Sequence[int]) -> torch.Tensor:
        """Keys and values of `layer` for pages that `choose` named, `[len(pages), planes, page_tokens, kv_heads, head_dim]`.

        Recalls what is not on the device. TransferFailed if a page cannot be read any more.
        """
        placed, parked = self._placed[layer], self.parked
        missing = [page for page in pages if page in parked and page not in placed]
        if missing:
            taken = set(placed.values())
            free = [slot for slot in self._frames if slot not in taken][: len(missing)]
            if len(free) < len(missing):
                raise LeaseError("gather: more parked pages than there are frames; give the pages that choose named")
            self._read_into_frames(missing, layer, free)
            placed.update(zip(missing, free, strict=True))
            self.recalled += len(missing)
            with self._residency.lock:
                self._residency.metrics.recalls += len(missing)
        slots = iter(self._slots([page for page in pages if page not in parked]))
        pool = self._residency.device.layer(layer)
        order = [placed[page] if page in parked else next(slots) for page in pages]
        return pool[torch.tensor(order, dtype=torch.int64, device=pool.device)]

    def stream(self, layer: int) -> torch.Tensor:
        """Keys and values of `layer` for all pages, in order: `[pages, planes, page_tokens, kv_heads, head_dim]`.

        The parked ones pass through a buffer of one layer, while a worker fills another one with the next layer. TransferFailed if a page
        cannot be read any more.
        """
        pool, parked = self._residency.device.layer(layer), self.parked
        kept = [*range(min(SINKS, self.pages)), *range(parked.stop, self.pages)]
        stayed = pool[torch.tensor(self._slots(kept), dtype=torch.int64, device=pool.device)]
        if not parked:
            return stayed
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == (layer, self._parked_to):
            passing = ahead[1].result()
        else:
            if ahead is not None:
                ahead[1].result()
            passing = self._read(list(parked), layer)
        following = (layer + 1) % self._residency.layout.layers
        mover = self._residency.mover
        self._ahead = ((following, self._parked_to), mover.spawn(mover.work(self._read, list(parked), following)))
        return torch.cat((stayed[:SINKS], passing.to(pool.device), stayed[SINKS:]))

    # -- growing ---------------------------------------------------------------------------------------------------------------

    def append(self, token_ids: TokenIds, kv: torch.Tensor) -> None:
        """Continue the sequence with whole pages of computed KV `[layers, planes, tokens, kv_heads, head_dim]`; older ones are parked.

        LeaseError if the tokens are not whole pages, or if no colder tier has room for what must leave the device.
        """
        layout, count = self._residency.layout, len(token_ids)
        if count % layout.page_tokens:
            raise LeaseError(f"append: {count} tokens; on a device budget only whole pages of {layout.page_tokens} are kept")
        if self._mass is not None and len(self._mass) == self.pages:
            self._record(self._lease, self._mass.double().cpu().numpy() / max(float(self._mass.sum()), 1e-30))
            self._mass = None
        limit = self.device_pages - 1 - len(self._frames)
        done = 0
        while done < count:
            some = (count - done) // layout.page_tokens
            room = limit - (self.pages - len(self.parked))
            if room > 0:
                some = min(some, room)
            else:
                some = min(some, limit - SINKS)
                self._park(self.pages - min(self._recent, limit - SINKS - some))
            part = slice(done, done + some * layout.page_tokens)
            if self._writer.append(self._lease, token_ids[part], kv[:, :, part]) < part.stop - part.start:
                raise LeaseError("append: the device has no room for another page of this sequence; release other leases or ask for fewer")
            done = part.stop
            if self._choosing:
                self._digest()

    def release(self) -> None:
        """Let everything go; the pages stay cached where they are. A second release does nothing."""
        if self._ahead is not None:
            self._ahead[1].exception()
            self._ahead = None
        residency = self._residency
        with residency.lock:
            self._let_go(list(self._held))
            residency.device.free(self._frames)
            self._frames = []
        self._lease.release()

    def __enter__(self) -> BudgetedLease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    # -- who is where ----------------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Bring a leased prefix into shape: park the middle, bring up the ends; what does not come or verify shortens it."""
        while self.pages:
            pages = self.pages
            parked_to = pages - self._recent if pages > self.device_pages - 1 else 0
            self._let_go([page for page in self._held if page >= parked_to])
            if parked_to > SINKS:
                self._park(parked_to, whole=False)
            ends = [*range(min(SINKS, pages)), *range(max(SINKS, self._parked_to), pages)]
            if self.pages == pages and self._bring(ends):
                return

    def _park(self, to: int, whole: bool = True) -> None:
        """Let the pages up to `to` leave the device, but for the first ones. With `whole`, LeaseError if they have nowhere to go."""
        residency, table = self._residency, self._residency.table
        start = max(SINKS, self._parked_to)
        rows = np.array(self._lease.rows[start:to], np.int64)
        residency.mover.spawn(self._sink(rows)).result()
        self._parked_to = max(to, self._parked_to)
        with residency.lock:
            cold = table.has_copy_below(rows, DEVICE)
            if not cold.all():
                if whole:
                    raise LeaseError("no tier below the device has room for the pages of this sequence; raise host.capacity_bytes")
                self._cut(start + int(cold.argmin()))
                rows = rows[: self.pages - start] if self.pages > start else rows[:0]
            gone = rows[(table.leases[rows] == 1) & (table.readers[DEVICE][rows] == 0) & (table.state[DEVICE][rows] == READY)]
            known = gone[residency.policies[DEVICE].here(gone)]
            residency.policies[DEVICE].remove(known)
            residency.eviction.drop(known, DEVICE, "parked")
            for page, row in enumerate(rows.tolist(), start):
                tier = next(tier for tier in range(DEVICE + 1, len(residency.tiers)) if table.state[tier, row] == READY)
                table.hold([row], tier)
                self._held[page] = (tier, int(table.slot[tier, row]))
        self._look(range(start, start + len(rows)), whole)

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
            if page >= self.pages:
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
        residency.mover.spawn(self._lift(rows)).result()
        with residency.lock:
            ready = table.state[DEVICE][rows] == READY
            if not ready.all():
                self._cut(pages[int(ready.argmin())])
        return bool(ready.all())

    async def _lift(self, rows: Rows) -> None:
        """Bring rows to the device, with whoever brings some of them already. On the loop."""
        residency, table = self._residency, self._residency.table
        for _ in range(2):  # a hint that brought some may have been taken back
            await residency.copying.lift([row for row in rows.tolist() if table.state[DEVICE, row] == ABSENT], lambda _: None)
            with residency.lock:
                coming = {residency.copying.inflight[row, DEVICE] for row in rows.tolist() if table.state[DEVICE, row] == WRITING}
            for transfer in coming:
                residency.mover.urge(transfer)
            await ended(coming)

    def _cut(self, pages: int) -> None:
        """Only the first `pages` pages can be had; let go of the others."""
        residency, lease = self._residency, self._lease
        with residency.lock:
            self._let_go([page for page in self._held if page >= pages])
            residency.release(lease.rows[pages:])
            del lease.rows[pages:]
            lease.tokens = pages * residency.layout.page_tokens
        del lease.ids[lease.tokens :]
        self._parked_to = min(self._parked_to, pages)
        self._digested = min(self._digested, pages)

    def _let_go(self, pages: Sequence[int]) -> None:
        with self._residency.lock:
            for page in pages:
                tier, _ = self._held.pop(page)
                self._payloads.pop(page, None)
                self._residency.table.unhold([self._lease.rows[page]], tier)
            if pages:
                self._parked_to = min(self._parked_to, min(pages))

    def _refused(self, page: int, refused: Refused) -> None:
        """Count a copy that did not verify, and bury it."""
        residency = self._residency
        tier = self._held[page][0]
        with residency.lock:
            residency.metrics.tiers[tier].refused[refused.reason] += 1
            row = self._lease.rows[page]
            residency.table.unhold([row], tier)
            del self._held[page]
            if not residency.table.readers[tier, row]:
                residency.eviction.forget(row, tier, "unusable")

    def _slots(self, pages: Sequence[int]) -> list[int]:
        """Device slots of pages that stay, for the calling thread's stream to read."""
        self._residency.device.enter()
        rows = np.array([self._lease.rows[page] for page in pages], np.int64)
        with self._residency.lock:
            slots: list[int] = self._residency.table.slot[DEVICE][rows].tolist()
        return slots

    # -- frames ----------------------------------------------------------------------------------------------------------------

    def _take_frames(self) -> list[int]:
        """The frames; taken when they are first needed: what the budget leaves beside the pages that stay."""
        if not self._frames:
            if self.pages - len(self.parked) > SINKS + self._recent:
                self._park(self.pages - self._recent)
            residency = self._residency
            self._frames = residency.mover.spawn(residency.eviction.reserve(DEVICE, self._frame_count)).result()
            if not self._frames:
                raise LeaseError("the device has no room for a single page to choose; release other leases")
        return self._frames

    def _evict(self, layer: int, wanted: Sequence[int], mass: torch.Tensor) -> None:
        """Let pages of least mass leave the layer's frames until the wanted ones fit."""
        placed = self._placed[layer]
        idle = sorted(set(placed) - set(wanted), key=lambda page: float(mass[page]))
        surplus = len(set(placed) | set(wanted)) - len(self._frames)
        for page in idle[: max(0, surplus)]:
            del placed[page]

    # -- bytes -----------------------------------------------------------------------------------------------------------------

    def _read_into_frames(self, pages: Sequence[int], layer: int, slots: Sequence[int]) -> None:
        pool = self._residency.device
        memory, layers = pool.memory(), slice(layer, layer + 1)
        if memory is None:
            pool.scatter(slots, self._read(pages, layer)[:, None], layers)
            return
        for tier, some in self._by_tier(pages):
            to = [slots[pages.index(page)] for page in some]
            tier.format.decode(self._payloads_of(some), pool.layout, layers, memory[:, layers], to)

    def _read(self, pages: Sequence[int], layer: int) -> torch.Tensor:
        """`layer` of parked pages `[len(pages), planes, page_tokens, kv_heads, head_dim]`, CPU."""
        return self._decode(pages, slice(layer, layer + 1))[:, 0]

    def _decode(self, pages: Sequence[int], layers: slice) -> torch.Tensor:
        layout = self._residency.layout
        first, stop, _ = layers.indices(layout.layers)
        out = torch.empty((len(pages), stop - first, *layout.shape[1:]), dtype=layout.torch_dtype)
        for tier, some in self._by_tier(pages):
            tier.format.decode(self._payloads_of(some), layout, layers, out, [pages.index(page) for page in some])
        return out

    def _by_tier(self, pages: Sequence[int]) -> list[tuple[Tier, list[int]]]:
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

    # -- digests ---------------------------------------------------------------------------------------------------------------

    @torch.inference_mode(mode=False)  # as in `TieredKVCache`: they are written to again, in whatever mode the caller is then
    def _digest(self) -> None:
        """Have the digests of all pages: kept ones, or made from their keys where they are now."""
        residency, lease = self._residency, self._lease
        fresh = list(range(self._digested, self.pages))
        if not fresh:
            return
        if self.pages > len(self._digests):
            room = max(self.pages, 2 * len(self._digests))
            self._digests = torch.cat((self._digests, self._digests.new_empty((room - len(self._digests), *self._digests.shape[1:]))))
        if residency.digests is not None:
            with residency.lock:
                rows = [lease.rows[page] for page in fresh]
                found, kept = residency.digests.get(rows, residency.table.key[rows].tolist())
            self._digests[[fresh[index] for index in found]] = kept
            fresh = [page for index, page in enumerate(fresh) if index not in set(found)]
        stayed = [page for page in fresh if page not in self.parked]
        if stayed:
            self._digests[stayed] = pool_digests(residency.device, self._slots(stayed))
        for page in sorted(set(fresh) - set(stayed)):  # whole pages are large: one at a time
            self._digests[page] = encode(self._decode([page], slice(None))[:, :, 0].to(self._digests.device))[0]
        self._digested = self.pages


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
