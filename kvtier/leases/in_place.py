"""A lease whose pages in host memory stay there: the cores of their NUMA node attend to them, the device to its own; the parts are merged.

Made by `TieredKVCache.acquire_in_place`. State belongs to the thread that uses the lease, one at a time; the page table is touched under
the residency's lock. Host copies are held like those of a transfer, so their bytes stay where they are until `release`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter

import numpy as np
import torch

from kvtier.attention.in_place import EncodedPage, begin
from kvtier.attention.learned import Attended, LearnedCosts
from kvtier.attention.partial import Partial, attend, merge, nothing
from kvtier.attention.router import Decision, Expected, Router, Side
from kvtier.errors import LayoutError, LeaseError
from kvtier.formats import Payload
from kvtier.leases.lease import Lease
from kvtier.numa.executor import NumaThreadPool
from kvtier.pages import ABSENT, DEVICE, READY, Rows
from kvtier.residency import Residency
from kvtier.tiers.base import Refused
from kvtier.tiers.host import HostTier


class InPlaceLease:
    """A hold on the pages of one sequence, each attended to where it is. Also a context manager.

    `tokens` is final, a multiple of the page size, and may be less than was matched: what neither came nor verified ends it. `decision`
    says what was done about pages in host memory, and why.
    """

    def __init__(
        self,
        residency: Residency,
        lease: Lease,
        pool: NumaThreadPool,
        router: Router,
        costs: LearnedCosts,
        workload: str,
        device_utilisation: float | None,
    ) -> None:
        self._residency = residency
        self._costs = costs
        self._workload = workload
        self._attended = Attended()
        self._lease = lease
        self._pool = pool
        self._held: dict[int, int] = {}
        """Page -> slot of the host copy that is held."""
        self._payloads: dict[int, Payload] = {}
        try:
            self._host_index, self._host = _host_of(residency)
            self.decision = self._decide(router, workload, device_utilisation)
            self._settle()
        except BaseException:
            self.release()
            raise
        with residency.lock:
            routed = residency.metrics.routing
            routed.fetched += self.decision.choice == "fetch"
            routed.in_place += self.decision.choice == "in_place"

    @property
    def tokens(self) -> int:
        """Tokens of the sequence that are covered."""
        return self._lease.tokens

    @property
    def pages(self) -> int:
        """Pages of `tokens`."""
        return self._lease.pages

    @property
    def pages_in_place(self) -> int:
        """Of these, how many are attended to in host memory."""
        return len(self._payloads)

    def attend(self, layer: int, queries: torch.Tensor, scaling: float | None = None) -> Partial:
        """What `queries` `[tokens, heads, head_dim]`, which stand after all tokens of the lease, get from them at `layer`.

        The result is on the queries' device, without gradients. Merge it (`kvtier.attention.partial.merge`) with the part of tokens that
        are not in the cache yet, or take `out` as it is. LeaseError for a layer there is not, or a released lease; LayoutError for queries
        that do not fit.
        """
        layout = self._residency.layout
        if self._lease.released:
            raise LeaseError("this lease was released; acquire a new one")
        if not 0 <= layer < layout.layers:
            raise LeaseError(f"attend: layer {layer}; this model has layers 0 to {layout.layers - 1}")
        if queries.ndim != 3 or queries.shape[1] % layout.kv_heads or queries.shape[2] != layout.head_dim:
            raise LayoutError(
                f"attend: queries have shape {list(queries.shape)}; expected [tokens, heads, head_dim] with a multiple of "
                f"{layout.kv_heads} heads of {layout.head_dim}"
            )
        queries = queries.detach()
        asked_s = perf_counter()
        parked = [EncodedPage(payload, self._host.node_of(self._held[page], layer)) for page, payload in self._payloads.items()]
        started = begin(self._pool, self._host.format, layout, layer, queries, parked, scaling) if parked else None
        if started is None:
            part = self._on_device(layer, queries, scaling)
            self._attended.add(queries.shape[0], perf_counter() - asked_s)
            return part
        try:
            if self._residency.device.place.type == "cpu":
                # On the pool's threads as well: the caller's team of torch threads would fight them for the same cores.
                here = self._pool.executor.submit(self._pool.nodes[0], self._on_device, layer, queries, scaling).result()
            else:
                here = self._on_device(layer, queries, scaling)
        finally:
            here_s = perf_counter()
            away = started.result()
        whole = merge([here, Partial(away.out.to(here.out.device), away.lse.to(here.lse.device))])
        # Without what only the device's part took.
        self._attended.add(queries.shape[0], perf_counter() - asked_s - max(0.0, here_s - max(asked_s, started.ended_s)))
        return whole

    def release(self) -> None:
        """Let everything go; the pages stay cached where they are. A second release does nothing."""
        with self._residency.lock:
            if not self._lease.released:
                parked = len(self._payloads)
                tokens = (parked or self.pages) * self._residency.layout.page_tokens
                self._costs.ended(self._workload, "in_place" if parked else "fetch", tokens, self._attended)
            self._let_go(list(self._held))
        self._lease.release()

    def __enter__(self) -> InPlaceLease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    # -- who is where ----------------------------------------------------------------------------------------------------------

    def _decide(self, router: Router, workload: str, device_utilisation: float | None) -> Decision:
        residency, table = self._residency, self._residency.table
        executor = self._pool.executor
        with residency.lock:
            rows = np.array(self._lease.rows, np.int64)
            missing = table.state[DEVICE][rows] != READY
            mass = table.attention[rows][missing]
            attention = None if np.isnan(mass).all() else float(np.nansum(mass))  # shares of one step: the rest went to other pages
            there = int((missing & (table.state[self._host_index][rows] == READY)).sum())
            moved = np.zeros(len(residency.tiers), np.int64)
            moved[self._host_index] = there * residency.page_bytes[self._host_index]
            tokens = there * residency.layout.page_tokens
            expected = self._costs.expect(workload, tokens, residency.prices.restore_s(moved)) if there else Expected()
            held = int(((table.leases[: table.rows] > 0) & (table.state[DEVICE, : table.rows] != ABSENT)).sum())
            fits = int(missing.sum()) <= residency.device.capacity_slots - held
            fetching = len({id(transfer) for (_, target), transfer in residency.copying.inflight.items() if target == DEVICE})
        busy = residency.mover.utilisation if device_utilisation is None else device_utilisation
        cores, device = Side(executor.queued, executor.utilisation), Side(fetching, busy)
        decision = router.decide(attention, cores, device, workload, fits, expected)
        if decision.why or not there:
            return decision
        with residency.lock:
            why = self._costs.exploring(decision)
        return replace(decision, choice="in_place" if decision.choice == "fetch" else "fetch", why=why) if why else decision

    def _settle(self) -> None:
        """Bring up what must be, hold the host copies of the rest; what does not come or verify shortens the lease."""
        residency, table, index = self._residency, self._residency.table, self._host_index
        rows = np.array(self._lease.rows, np.int64)
        with residency.lock:
            wanted = table.state[DEVICE][rows] != READY
            if self.decision.choice == "in_place":
                wanted &= table.state[index][rows] != READY
        if wanted.any():
            self._bring(rows[wanted])
        with residency.lock:
            here = table.state[DEVICE][rows] == READY
            there = ~here & (table.state[index][rows] == READY)
            self._cut(len(rows) if (here | there).all() else int((here | there).argmin()))
            parked = np.flatnonzero(there[: self.pages]).tolist()
            table.hold(rows[parked], index)
            self._held = {page: int(table.slot[index, rows[page]]) for page in parked}
        self._verify(parked)

    def _verify(self, parked: Sequence[int]) -> None:
        """Look at the host copies once, and keep views of them; the first that does not verify ends the lease, and is buried."""
        residency, table, index = self._residency, self._residency.table, self._host_index
        keys = [table.page_id(self._lease.rows[page]).key for page in parked]
        payloads = self._host.load([self._held[page] for page in parked], keys, np.empty((len(parked), 0), np.uint8))
        for page, payload in zip(parked, payloads, strict=True):
            if not isinstance(payload, Refused):
                self._payloads[page] = payload
                continue
            with residency.lock:
                residency.copying.lose(self._lease.rows[page], index, payload)
                self._let_go([page])
                self._cut(page)
            return

    def _bring(self, rows: Rows) -> None:
        """Bring rows to the device; what that took teaches the prices if all came and nobody else brought any of them."""
        residency, table = self._residency, self._residency.table
        with residency.lock:
            alone = bool((table.state[DEVICE][rows] == ABSENT).all())
            moved = np.bincount(table.warmest(rows), minlength=len(residency.tiers)) * residency.page_bytes
        asked_s = perf_counter()
        residency.mover.spawn(residency.copying.bring(rows)).result()
        seconds = perf_counter() - asked_s
        with residency.lock:
            if alone and (table.state[DEVICE][rows] == READY).all():
                residency.prices.restored(moved, seconds)

    def _cut(self, pages: int) -> None:
        """Only the first `pages` pages are covered. Lock held."""
        self._let_go([page for page in self._held if page >= pages])
        self._residency.release(self._lease.rows[pages:])
        del self._lease.rows[pages:]
        self._lease.tokens = pages * self._residency.layout.page_tokens
        del self._lease.ids[self._lease.tokens :]

    def _let_go(self, pages: Sequence[int]) -> None:
        for page in pages:
            del self._held[page]
            self._payloads.pop(page, None)
            self._residency.copying.let_go(np.array([self._lease.rows[page]]), self._host_index)

    def _on_device(self, layer: int, queries: torch.Tensor, scaling: float | None) -> Partial:
        residency = self._residency
        rows = np.array([row for page, row in enumerate(self._lease.rows) if page not in self._payloads], np.int64)
        if not len(rows):
            return nothing(queries)
        with residency.lock:
            slots = torch.from_numpy(residency.table.slot[DEVICE][rows])
        memory = residency.device.layer(layer)
        pages = memory[slots.to(memory.device)]
        part = attend(queries.to(memory.device), pages[:, 0].flatten(0, 1), pages[:, -1].flatten(0, 1), scaling)
        return Partial(part.out.to(queries.device), part.lse.to(queries.device))


def _host_of(residency: Residency) -> tuple[int, HostTier]:
    for index, tier in enumerate(residency.tiers):
        if isinstance(tier, HostTier):
            return index, tier
    raise LeaseError("attending in place needs a host tier; configure host, or use acquire")
