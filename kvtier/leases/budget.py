"""One sequence on a device budget smaller than itself: what of it stays on the device, what is recalled, what streams through.

Of the sequence's full pages the first and the last few stay on the device; the others are *parked* (`parked.py`): leased, but only in
colder tiers. The budget that is left is *frames*: device slots that belong to the sequence, of which each layer fills its share with the
parked pages that its own query asks for, layer by layer (`choose`, `gather`), or nothing, where every layer gets all pages (`stream`).

State belongs to the thread that uses the lease, one at a time; the page table is touched under the residency's lock. A worker reads ahead
for `stream` and touches only its own buffer.
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
from kvtier.errors import ConfigError, LeaseError
from kvtier.keys import TokenIds
from kvtier.leases.digesting import pool_digests
from kvtier.leases.lease import Lease
from kvtier.leases.parked import Parked
from kvtier.leases.writing import Writer
from kvtier.pages import DEVICE
from kvtier.residency import Residency

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
        self._parked = Parked(residency, lease, SINKS)
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
            self._parked.settle(device_pages - 1, self._recent)
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
        return self._parked.pages

    # -- attending -------------------------------------------------------------------------------------------------------------

    def choose(self, layer: int, queries: torch.Tensor, scaling: float | None = None) -> list[int]:
        """The pages `layer` attends over for `queries` `[heads, head_dim]`, in order: those that stay, and the best parked ones.

        The best are those of which the digests say that they would get most attention, as many as there are frames.
        """
        self._residency.check_open()
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
        self._residency.check_open()
        placed, parked = self._placed[layer], self.parked
        missing = [page for page in pages if page in parked and page not in placed]
        if missing:
            taken = set(placed.values())
            free = [slot for slot in self._frames if slot not in taken][: len(missing)]
            if len(free) < len(missing):
                raise LeaseError("gather: more parked pages than there are frames; give the pages that choose named")
            self._parked.read_into(missing, layer, free)
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
        self._residency.check_open()
        pool, parked = self._residency.device.layer(layer), self.parked
        kept = [*range(min(SINKS, self.pages)), *range(parked.stop, self.pages)]
        stayed = pool[torch.tensor(self._slots(kept), dtype=torch.int64, device=pool.device)]
        if not parked:
            return stayed
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == (layer, parked.stop):
            passing = ahead[1].result()
        else:
            if ahead is not None:
                ahead[1].result()
            passing = self._parked.read(list(parked), layer)
        following = (layer + 1) % self._residency.layout.layers
        mover = self._residency.mover
        self._ahead = ((following, parked.stop), mover.spawn(mover.work(self._parked.read, list(parked), following)))
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
                self._parked.park(self.pages - min(self._recent, limit - SINKS - some))
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
            self._parked.release()
            residency.give_back(self._frames)
            self._frames = []
        self._lease.release()

    def __enter__(self) -> BudgetedLease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

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
                self._parked.park(self.pages - self._recent)
            self._frames = self._residency.eviction.wait_for_slots(self._frame_count)
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
            self._digests[page] = encode(self._parked.decode([page], slice(None))[:, :, 0].to(self._digests.device))[0]
        self._digested = self.pages
