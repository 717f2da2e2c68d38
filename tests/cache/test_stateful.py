"""The whole cache against a model that knows the right KV of every sequence: whatever happens, never a wrong byte; and nothing is lost
while the last tier has room and no copy was damaged."""

from __future__ import annotations

import asyncio
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from kvtier.cache import TieredKVCache
from kvtier.errors import LeaseError
from kvtier.keys import page_keys, root_key
from kvtier.leases.lease import Lease
from kvtier.pages import NO_ROW, READY
from tests.cache.rig import (
    DEVICE,
    HOST,
    LAYOUT,
    PAGE,
    Clock,
    assert_right,
    flip_in_host,
    flip_on_disk,
    grow,
    hold,
    kv_of,
    make_config,
)

NUMBER = st.integers(0, 1000)
SALTS = st.sampled_from(["", "b"])
TOKENS = st.builds(
    lambda pages, length: [token for page in pages for token in (0, page // 2, 0, page % 2)][:length],
    st.tuples(*[st.integers(0, 3)] * 6),
    st.sampled_from([24, 20, 16, 23, 13, 12, 8, 7, 4, 1, 0]),
)
"""Up to six pages, four kinds of each: enough shared prefixes, and the device is soon full."""
Page = tuple[str, tuple[int, ...]]


@dataclass
class Held:
    """A lease and the tokens it should cover."""

    lease: Lease
    tokens: list[int]
    salt: str


class CacheMachine(RuleBasedStateMachine):
    """Few tokens, so that sequences share prefixes; tiers so small that pages move all the time."""

    policy = "lru"
    write_policy = "write_back"

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.clock = Clock()
        self.held: list[Held] = []
        self.ever: dict[Page, None] = {}
        """Pages that were committed once, in that order; nothing else may ever be found."""
        self.kept: set[Page] = set()
        """Pages that must still be found: committed, and nothing happened that may lose them."""
        self.pinned = False
        self.open_cache: TieredKVCache | None = None

    @property
    def cache(self) -> TieredKVCache:
        assert self.open_cache is not None
        return self.open_cache

    @property
    def keeps_all(self) -> bool:
        return self.write_policy != "write_through_selective" and self.roomy

    @initialize(
        roomy=st.booleans(),
        host=st.booleans(),
        workers=st.integers(1, 2),
        clean=st.sampled_from([0.5, 1.0]),
        staging=st.sampled_from([1, 10**6]),
    )
    def start(self, roomy, host, workers, clean, staging) -> None:
        self.roomy = roomy
        more: dict[str, Any] = {"host__write_policy": self.write_policy} if host else {}
        self.config = make_config(
            Path(self.folder.name) / "store",
            device_pages=8,
            host_pages=(24 if roomy else 5) if host else None,
            disk_pages=400 if roomy else 7,
            policy__name=self.policy,
            disk__write_policy=self.write_policy,
            mover__workers=workers,
            mover__clean_pressure=clean,
            mover__staging_bytes=staging,
            **more,
        )
        self.open()
        for first in range(6):
            self.put([first % 4] * (PAGE - 1) + [0] + [first] * 4 * PAGE, "")

    def open(self) -> None:
        self.open_cache = TieredKVCache(self.config, LAYOUT, self.clock)

    def teardown(self) -> None:
        if self.open_cache is not None:
            self.open_cache.close()
        self.folder.cleanup()

    # -- the model -------------------------------------------------------------------------------------------------------------

    def committed(self, tokens, salt) -> None:
        for end in range(PAGE, len(tokens) + 1, PAGE):
            page = (salt, tuple(tokens[:end]))
            self.ever[page] = None
            if self.keeps_all:
                self.kept.add(page)

    def row(self, page: Page) -> int:
        salt, tokens = page
        return self.cache._residency.table.row(page_keys(tokens, PAGE, root_key(self.cache._namespace, salt))[-1])

    def last_tier_has(self, page: Page) -> bool:
        residency = self.cache._residency
        row = self.row(page)
        return row != NO_ROW and residency.table.state[residency.last, row] == READY

    def choose(self, number):
        """One of the leases. Nothing is drawn from what threads may have changed: Hypothesis must be able to draw the same again."""
        return self.held[number % len(self.held)]

    def known(self, which, tokens) -> tuple[list[int], str]:
        """A sequence that was committed once, with `tokens` behind it, and its salt."""
        salt, before = list(self.ever)[which % len(self.ever)]
        return [*before, *tokens], salt

    # -- what an engine does ---------------------------------------------------------------------------------------------------

    @rule(tokens=TOKENS, salt=SALTS)
    def put(self, tokens, salt) -> None:
        taken = self.cache.put(tokens, kv_of(tokens, salt), salt=salt)
        assert taken % PAGE == 0
        assert taken <= len(tokens)
        self.committed(tokens[:taken], salt)
        assert self.cache.lookup(tokens, salt).tokens >= taken

    @precondition(lambda self: len(self.held) < 4)
    @rule(which=NUMBER, tokens=TOKENS)
    def acquire(self, which, tokens) -> None:
        tokens, salt = self.known(which, tokens)
        match = self.cache.lookup(tokens, salt)
        assert match.tokens == sum(match.pages_by_tier.values()) * PAGE
        assert not match or (salt, tuple(tokens[: match.tokens])) in self.ever
        table = self.cache._residency.table
        leased = {row for held in self.held for row in held.lease.rows}
        needed = {table.row(key) for key in match.keys} - leased
        lease = self.cache.acquire(match)
        lease.wait(30)
        if self.keeps_all and not self.pinned and len(needed) <= self.cache._residency.device.capacity_slots - len(leased):
            assert lease.tokens == match.tokens
        assert lease.tokens <= match.tokens
        self.held.append(Held(lease, tokens[: lease.tokens], salt))

    @precondition(lambda self: len(self.held) < 4)
    @rule(salt=SALTS)
    def begin(self, salt) -> None:
        self.held.append(Held(self.cache.begin(salt), [], salt))

    @precondition(lambda self: self.held)
    @rule(which=NUMBER, tokens=TOKENS, one_by_one=st.booleans())
    def append(self, which, tokens, one_by_one) -> None:
        held = self.choose(which)
        for part in [[token] for token in tokens] if one_by_one else [tokens]:
            taken = grow(self.cache, held.lease, part, held.salt)
            assert taken == len(part) or held.lease.full
            held.tokens += part[:taken]
            if held.lease.full:
                break
        assert held.lease.tokens == len(held.tokens)
        self.committed(held.tokens, held.salt)

    @precondition(lambda self: self.held and len(self.held) < 4)
    @rule(which=NUMBER)
    def fork(self, which) -> None:
        held = self.choose(which)
        self.held.append(Held(self.cache.fork(held.lease), list(held.tokens), held.salt))

    @precondition(lambda self: self.held)
    @rule(which=NUMBER, keep=NUMBER, tokens=TOKENS)
    def truncate_and_append(self, which, keep, tokens) -> None:
        held = self.choose(which)
        keep %= len(held.tokens) + 1
        try:
            self.cache.truncate(held.lease, keep)
        except LeaseError:
            return
        del held.tokens[keep:]
        held.tokens += tokens[: grow(self.cache, held.lease, tokens, held.salt)]
        self.committed(held.tokens, held.salt)

    @precondition(lambda self: self.held)
    @rule(which=NUMBER)
    def release(self, which) -> None:
        held = self.choose(which)
        self.held.remove(held)
        held.lease.release()
        held.lease.release()

    # -- hints and signals -----------------------------------------------------------------------------------------------------

    @rule(which=NUMBER, ttl=st.sampled_from([None, 5.0]), tier=st.sampled_from([None, "device", "disk", "unpin"]))
    def pin(self, which, ttl, tier) -> None:
        match = self.cache.lookup(*self.known(which, []))
        if tier == "unpin":
            self.cache.unpin(match)
        elif self.cache.pin(match, ttl, tier) and tier == "device":
            self.pinned = True

    @rule(which=NUMBER, cancel=st.booleans(), deadline=st.sampled_from([None, 0.0]))
    def prefetch(self, which, cancel, deadline) -> None:
        tokens, salt = self.known(which, [])
        hint = self.cache.prefetch(tokens, deadline, salt)
        if cancel:
            hint.cancel()
        assert hint.wait(30)

    @precondition(lambda self: self.held)
    @rule(which=NUMBER, values=st.lists(st.sampled_from([0.0, 0.3, 1.0, -1.0, 2.0, math.nan, math.inf]), min_size=5, max_size=5))
    def record_attention(self, which, values) -> None:
        held = self.choose(which)
        pages = held.lease.pages
        self.cache.record_attention(held.lease, np.resize(np.array(values), pages))

    # -- time and trouble ------------------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.1, 3.0, 100.0]), clean=st.booleans())
    def later(self, seconds, clean) -> None:
        self.clock.now += seconds
        if clean:
            residency = self.cache._residency
            asyncio.run_coroutine_threadsafe(residency.house.clean_up(), residency.mover.loop).result(30)

    @rule(clear=st.sampled_from([False, False, False, True]))
    def flush_or_clear(self, clear) -> None:
        if not clear:
            self.cache.flush()
            if self.keeps_all:
                assert all(self.last_tier_has(page) for page in self.kept)
            return
        self.cache.clear()
        self.kept = {
            page for page in self.kept if any(page[0] == held.salt and page[1] == tuple(held.tokens[: len(page[1])]) for held in self.held)
        }

    @precondition(lambda self: self.ever)
    @rule(which=NUMBER, byte=st.integers(0, 2047), mask=st.integers(1, 255), host=st.booleans())
    def damage(self, which, byte, mask, host) -> None:
        """A copy, if there is one of a page that is not on the device: that would be read next, and is."""
        residency = self.cache._residency
        tier = HOST if host else residency.last
        state = residency.table.state
        cold = [page for page in self.ever if (row := self.row(page)) != NO_ROW and state[tier, row] == READY != state[DEVICE, row]]
        if not cold:
            return
        salt, tokens = cold[which % len(cold)]
        if tier == residency.last:
            flip_on_disk(self.cache, self.row((salt, tokens)), byte, mask)
        else:
            flip_in_host(self.cache, self.row((salt, tokens)), byte, mask)
        self.roomy = False
        self.kept.clear()
        with hold(self.cache, tokens, salt) as lease:
            assert_right(lease, tokens, salt)

    @rule(flush=st.booleans(), held=st.booleans())
    def reopen(self, flush, held) -> None:
        if not held:
            self.release_all()
        self.cache.settle(30)
        survivors = set(self.kept) if flush else {page for page in self.kept if self.last_tier_has(page)}
        self.cache.close(flush)
        self.release_all()
        self.kept = survivors
        self.pinned = False
        self.open()
        self.check_kept()

    def release_all(self) -> None:
        for held in self.held:
            held.lease.release()
        self.held.clear()

    # -- what must hold --------------------------------------------------------------------------------------------------------

    @invariant()
    def structures_agree(self) -> None:
        if self.open_cache is not None:
            self.cache.check_integrity()

    @invariant()
    def every_lease_reads_right(self) -> None:
        for held in self.held:
            assert held.lease.tokens == len(held.tokens)
            assert_right(held.lease, held.tokens, held.salt)

    @invariant()
    def check_kept(self) -> None:
        """Page by page: its parents are kept too, or were not written before a close without flush."""
        if self.open_cache is None:
            return
        for page in self.kept:
            row = self.row(page)
            assert row != NO_ROW, f"lost {page}"
            assert (self.cache._residency.table.state[:, row] == READY).any(), f"lost {page}"


@pytest.mark.slow
@pytest.mark.parametrize("write_policy", ["write_back", "write_through", "write_through_selective"])
@pytest.mark.parametrize("policy", ["a2cr", "lru", "a2cr-classic"])
def test_never_a_wrong_byte_and_nothing_lost_while_there_is_room(policy, write_policy):
    machine = type("Machine", (CacheMachine,), {"policy": policy, "write_policy": write_policy})
    bounds = settings(max_examples=25, stateful_step_count=25, suppress_health_check=list(HealthCheck), print_blob=True)
    run_state_machine_as_test(machine, settings=bounds)
