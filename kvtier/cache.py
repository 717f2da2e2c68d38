"""TieredKVCache: the one public face of kvtier.

A serving engine looks up what it may reuse, acquires it (a lease), attends over device pages, appends what it computed, releases.
Everything below the device happens by itself. All methods may be called from any thread; `acquire`, `prefetch` and `lookup` return at
once, `append` and `put` may wait for room on the device. State lives in `kvtier.residency` under its lock; this file only speaks for
it, what its methods do is in `kvtier.leases` and there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvtier.config import Config, load_config
from kvtier.config.tree import ModelConfig
from kvtier.errors import ConfigError, LayoutError, LeaseError
from kvtier.forked import tell_children
from kvtier.keys import PageKey, TokenIds, namespace, page_keys, root_key, token_array
from kvtier.layout import PageLayout
from kvtier.leases.attending import record_attention, record_queries
from kvtier.leases.budget import BudgetedLease, check_budget
from kvtier.leases.forking import take_over
from kvtier.leases.in_place import InPlaceLease
from kvtier.leases.keyed import KeyedPages
from kvtier.leases.lease import Lease, Match
from kvtier.leases.reading import Reader
from kvtier.leases.routing import Routing
from kvtier.leases.telling import pin, record_prefill, unpin
from kvtier.leases.writing import Writer
from kvtier.residency import Residency
from kvtier.residency.clearing import clear
from kvtier.residency.fitting import fitting
from kvtier.residency.prefetch import Prefetch
from kvtier.residency.resizing import resize
from kvtier.stats import stats

log = logging.getLogger(__name__)


class TieredKVCache:
    """A paged KV cache over the tiers of `config` for pages of `layout`.

    Raises ConfigError, LayoutError, StoreLocked or StoreError if the configuration cannot be met; nothing is left open then. Also a context
    manager: leaving it closes the cache. Not to be used in a forked child, where its threads and memory are not: every method raises Closed
    there, as do those of its leases, but for `close` and `release`, which leave all to the parent.
    """

    def __init__(self, config: Config, layout: PageLayout, clock: Callable[[], float] = time.monotonic) -> None:
        if not isinstance(layout, PageLayout):
            raise LayoutError(f"layout is a {type(layout).__name__}; expected a kvtier.PageLayout, such as layout_of(model) gives")
        _check_pages(config, layout)
        self.config = config
        self.layout = layout
        self._namespace = namespace(config.model.name, config.model.revision, layout)
        with torch.inference_mode(mode=False):  # memory made in it may be written to in no other mode, and threads are in none
            self._residency = Residency(config, layout, self._namespace, clock)
        if config.disk is not None and config.model.name == ModelConfig().name:
            log.warning(
                "disk store %s: model.name is not set, and every model without a name is given these pages if it has such pages; "
                "set model.name and model.revision",
                config.disk.path,
            )
        self._reader = Reader(self._residency)
        self._writer = Writer(self._residency)
        self._routing = Routing(self._residency, self._reader)
        tell_children(self)

    def after_fork_in_child(self) -> None:
        """Nothing of it can be used from now on."""
        self._residency.after_fork_in_child()

    @classmethod
    def open(cls, path: str | Path | None, layout: PageLayout, overrides: Mapping[str, object] | None = None) -> TieredKVCache:
        """Build a cache from a YAML file (None: the defaults), `KVTIER_...` variables and dotted overrides, in rising order of rank."""
        return cls(load_config(path, overrides=overrides), layout)

    # -- reading ---------------------------------------------------------------------------------------------------------------

    def lookup(self, token_ids: TokenIds, salt: str = "") -> Match:
        """How much of `token_ids` (one sequence from its start) is cached for tenant `salt`, where, and what it costs to bring up.

        No side effects: nothing is held, counted or moved.
        """
        self._open()
        return self._reader.lookup(token_array(token_ids), root_key(self._namespace, salt))

    def acquire(self, match: Match) -> Lease:
        """Hold the pages of `match` and start bringing the colder ones to the device; returns at once.

        The lease covers what is still there and worth bringing up (`mover.restore`), which may be less than `match.tokens`; after `wait`
        (or `ready`) `lease.tokens` is final.
        """
        self._open()
        return self._reader.acquire(match)

    def acquire_within(self, match: Match, device_pages: int, choosing: bool = True) -> BudgetedLease:
        """Hold the pages of `match`, and what is appended to them, with at most `device_pages` pages of them on the device at any time.

        For contexts larger than the device, or than their share of it: docs/attention.md. Waits until the pages are where they belong;
        covers what verified, which may be less than `match.tokens`. `choosing`: whether queries will choose pages, which needs digests.
        LeaseError for a budget below 4 pages or above the device, ConfigError for a cache with nothing below the device.
        """
        residency = self._open()
        check_budget(residency, device_pages)
        return BudgetedLease(residency, self._writer, self._reader.hold(match), device_pages, choosing, self.record_attention)

    def acquire_in_place(self, match: Match, workload: str = "default", device_utilisation: float | None = None) -> InPlaceLease:
        """Hold the pages of `match` and leave those that host memory has there, if that is cheaper than fetching them: `attend` then has
        the cores of their NUMA node do their part (docs/attention.md).

        Decided per request (`routing`) from what both ways took so far, the attention reported for the pages, the `workload` class and how
        busy both sides are; `device_utilisation`, 0 to 1: how busy the device is, as the engine reports it; None: how busy kvtier's workers
        are. Waits until pages that must come up are there. ConfigError for an unknown workload, LeaseError for a cache without a host tier.
        """
        self._open()
        return self._routing.acquire(match, workload, device_utilisation)

    def begin(self, salt: str = "") -> Lease:
        """A lease on nothing yet: the start of a new sequence of tenant `salt`, to be grown with `append`."""
        return self._begin(root_key(self._namespace, salt))

    def _begin(self, root: PageKey) -> Lease:
        return self.acquire(Match(0, np.empty(0, np.int64), (), root, {}, 0, 0.0, 0.0))

    def by_key(self) -> KeyedPages:
        """This cache for an engine that owns its paged cache and names pages by their keys: the device tier is a staging area then.

        Once per cache.
        """
        return KeyedPages(self._open(), self.acquire)

    # -- writing ---------------------------------------------------------------------------------------------------------------

    def put(self, token_ids: TokenIds, kv: torch.Tensor, after: Lease | None = None, salt: str = "") -> int:
        """Keep the full pages of newly computed KV; returns how many tokens are now cached (a multiple of the page size).

        `kv`: `[layers, planes, len(token_ids), kv_heads, head_dim]` of the layout's dtype. `token_ids` follow the tokens of `after`
        (which must end on a page boundary, and grows), or start a sequence of tenant `salt`. A last, partial page is not kept. Waits
        for room on the device; returns less when there is none. LayoutError for another shape or dtype, LeaseError for a lease that
        ends inside a page, or is another tenant's than `salt` says.
        """
        token_ids = token_array(token_ids)
        tokens = len(token_ids) // self.layout.page_tokens * self.layout.page_tokens
        self._writer.check_kv(len(token_ids), kv)
        if after is not None:
            if after.tokens % self.layout.page_tokens:
                raise LeaseError(f"put: the lease ends inside a page ({after.tokens} tokens); use append to continue a partly filled page")
            if salt and after.root != root_key(self._namespace, salt):
                raise LeaseError("put: `salt` names another tenant than that of the lease `after`; leave it out, the lease has its own")
            return self.append(after, token_ids[:tokens], kv[:, :, :tokens])
        with self.begin(salt) as lease:
            return self.append(lease, token_ids[:tokens], kv[:, :, :tokens])

    def append(self, lease: Lease, token_ids: TokenIds, kv: torch.Tensor) -> int:
        """Continue the lease's sequence with computed KV, token by token or many at once; returns how many tokens were taken.

        `kv`: `[layers, planes, len(token_ids), kv_heads, head_dim]` of the layout's dtype, as for `put`; LayoutError for another one.
        Full pages are committed under their content key (visible to everybody), the rest stays in an open page that only this lease
        sees. A page shared with a fork is copied before it is written. Fewer tokens are taken when the device has no room; `lease.full`
        says so, and nothing more is taken then: it would follow tokens that are missing. LeaseError before `lease.tokens` is final: wait
        for the lease first, because KV written behind a prefix that then turns out shorter would be wrong.
        """
        self._open()
        return self._writer.append(lease, token_ids, kv)

    # -- sequences -------------------------------------------------------------------------------------------------------------

    def fork(self, lease: Lease, onto: TieredKVCache | None = None) -> Lease:
        """A second lease on the same tokens (beams, parallel samples).

        Pages are shared; an open page is copied when either side writes it. `onto`, another cache of the same model in this process, makes
        it a lease of that one: what it has not on its device is copied there, from GPU to GPU where one reaches the other, else through
        host memory. It covers fewer tokens where that device has no room (`lease.full`). LayoutError for a cache of another model.
        """
        self._writer.check_own(lease)
        lease.wait()
        self._open()
        if onto is not None and onto is not self:
            onto._open()
            return take_over(lease, onto._namespace == self._namespace, onto._writer, onto._begin)
        return self._reader.fork(lease)

    def truncate(self, lease: Lease, tokens: int) -> None:
        """Roll the lease back to its first `tokens` tokens (rejected speculation). Committed pages stay cached; the lease lets go of them.

        A cut inside a committed page takes a private copy of its head. LeaseError if the lease is shorter, or no device page is free
        for that.
        """
        self._open()
        self._writer.truncate(lease, tokens)

    # -- hints -----------------------------------------------------------------------------------------------------------------

    def prefetch(self, token_ids: TokenIds, deadline: float | None = None, salt: str = "") -> Prefetch:
        """A hint that these tokens will be wanted within `deadline` seconds: bring their cold pages up, as far as the budget allows.

        Returns at once. What is still queued after `deadline` is cancelled; None: the tokens are wanted now, and nothing is. Hints never
        take the place of leased pages, of pages brought up for an earlier hint, or of pages that are worth more to the policy than one that
        is used within `deadline`, and give way to demand. What finds no room is tried again, each page once, when requests release their
        pages; at most `kvtier.residency.hinted.MOST_WAITING` hints wait for that, a newer one in the place of the oldest. LeaseError for a
        deadline below 0.
        """
        residency = self._open()
        if deadline is not None and not deadline >= 0:
            raise LeaseError(f"prefetch: deadline is {deadline} s; expected 0 or more, or None")
        keys = page_keys(token_ids, self.layout.page_tokens, root_key(self._namespace, salt))
        return Prefetch.begin(residency, keys, deadline)

    def record_attention(self, lease: Lease, mass: Sequence[float] | np.ndarray[tuple[int], np.dtype[np.float64]]) -> None:
        """Tell the scorer how much attention each page of the lease got: one value per page, 0 to 1, shares of one step or an average.

        A signal, not a duty: values that are NaN, negative or above one are counted (`attention_ignored`) and ignored. LeaseError if
        the number of values differs from the number of pages.
        """
        self._writer.check_own(lease)
        record_attention(self._open(), lease, mass)

    def record_prefill(self, start: int, tokens: int, seconds: float) -> None:
        """Tell what computing costs: the KV of `tokens` tokens, after `start` others, was computed in one go in `seconds`.

        With that, `acquire` restores only as much of a prefix as is faster to restore than to compute again (`mover.restore`).
        LeaseError for numbers that cannot be.
        """
        record_prefill(self._open(), start, tokens, seconds)

    def record_queries(self, lease: Lease, layer: int, queries: torch.Tensor) -> None:
        """Tell the scorer what `layer` asked for: `queries` `[heads, head_dim]` or `[tokens, heads, head_dim]`, as attention gets them.

        For engines whose attention kernels do not say where attention went: it is estimated from the pages' digests (docs/attention.md) and
        goes the way of `record_attention`, as the mean over the last calls, as many as the model has layers. Some layers, or one step in
        many, are enough. Queries that are not finite are counted (`attention_ignored`) and ignored. ConfigError if no digests are
        kept (`attention.digest_bytes`), LayoutError for queries of another shape, LeaseError for a layer there is not.
        """
        self._writer.check_own(lease)
        record_queries(self._open(), lease, layer, queries)

    def pin(self, match: Match, ttl: float | None = None, tier: str | None = None) -> int:
        """Keep the pages of `match` in `tier` or warmer for `ttl` seconds (None: until `unpin`); returns how many pages are pinned.

        `tier` defaults to the coldest one: the pages are not lost. LeaseError for a tier this cache does not have, and for a ttl below 0.
        """
        return pin(self._open(), match, ttl, tier)

    def unpin(self, match: Match) -> None:
        """Forget the pins of these pages."""
        unpin(self._open(), match)

    def fits(self, requests: Sequence[TokenIds], new_tokens: int = 0, salt: str = "") -> int:
        """How many of the waiting requests, taken in order, the device can hold at once now, each grown by `new_tokens`.

        Counts what is neither leased nor pinned to the device as available (it can be evicted); prefixes shared between requests, or with
        what stays, count once.
        """
        residency, page_tokens, root = self._open(), self.layout.page_tokens, root_key(self._namespace, salt)
        asked = ((page_keys(ids, page_tokens, root), -(-(len(ids) % page_tokens + new_tokens) // page_tokens)) for ids in requests)
        return fitting(residency, asked)

    def resize_device(self, capacity_bytes: int) -> int:
        """Grow or shrink the device tier on a GPU to about `capacity_bytes`, for an engine whose own needs change; its bytes then.

        Addresses, block tables and captured CUDA graphs stay valid. Shrinking moves pages to free slots in front and lets the policy choose
        which leave; what is leased stays where it is, and the pool ends behind the last such page. ConfigError, and nothing changed, if the
        device tier cannot change its size, or not to that.
        """
        residency = self._open()
        return residency.mover.spawn(resize(residency, capacity_bytes // self.layout.page_bytes)).result() * self.layout.page_bytes

    # -- the whole -------------------------------------------------------------------------------------------------------------

    def stats(self, machine: bool = True) -> dict[str, Any]:
        """Counters since the cache was opened, and its state, as one nested dict of plain values.

        `tiers` and `links` by name and `prefetch` are described in docs/cli.md (`kvtier run`); `tiers.<name>.achieved` is what the machine
        allowed. `admission`: `kvtier.policy.admission.Regret`, counted where there is more than one tier. `mover`, `routing`, `prices`: who
        carries pages, where requests attended, what restoring and computing take. `tokens_asked`: tokens of full pages that `acquire` was
        asked for; `tokens_declined`: those cached and faster to compute. `pages`: pages known; `leased_pages`: those held. Reads /proc,
        some milliseconds; not so, and with nothing in `achieved`, without `machine`.
        """
        return stats(self._open(), self._routing.report(), machine)

    def tier_sizes(self) -> tuple[list[str], list[int]]:
        """The tiers' names, warmest first, and the encoded bytes of a page in each, the most it can take where that varies."""
        residency = self._open()
        return residency.names, residency.page_bytes.tolist()

    def settle(self, timeout: float | None = None) -> None:
        """Wait until no transfer is queued or under way: for tests, benchmarks and orderly hand-overs.

        TimeoutError after `timeout` seconds.
        """
        self._open().settle(timeout)

    def flush(self) -> None:
        """Copy everything that only warmer tiers hold into the last tier; returns when it is written.

        Where that is full, its policy lets others go for them; what is not to leave it (held, pinned) stays.
        """
        residency = self._open()
        residency.mover.spawn(residency.house.flush()).result()

    def clear(self) -> int:
        """Drop every page nobody holds, in every tier, on disk too (new weights, a test); returns how many copies went."""
        residency = self._open()
        residency.settle(None)
        return clear(residency)

    def close(self, flush: bool = True) -> None:
        """Stop. With a disk tier and `flush`, what only warmer tiers hold is written there first, so that the next process finds it."""
        if not self._residency.closed and self._residency.left_behind is None:
            self._residency.closed = True  # nobody begins anything from now on
            self._routing.close()
            self._residency.close(flush)

    def check_integrity(self) -> None:
        """IntegrityError if any structure contradicts another. Slow; for tests."""
        self.settle()
        self._residency.check_integrity()

    def __enter__(self) -> TieredKVCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> Residency:
        self._residency.check_open()
        return self._residency


def _check_pages(config: Config, layout: PageLayout) -> None:
    """ConfigError if the configuration says how large pages are, and the layout something else."""
    said = config.pages.page_tokens
    if "page_tokens" in config.pages.model_fields_set and said != layout.page_tokens:
        raise ConfigError(
            f"pages.page_tokens is {said}, but the layout has pages of {layout.page_tokens} tokens; make it with {said} "
            f"(layout_of(model, page_tokens={said})), or change the key"
        )
