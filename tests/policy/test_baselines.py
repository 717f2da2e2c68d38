"""The published baselines: each keeps the contract, does what it is known for, and remembers a bounded number of pages that left."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.config.tree import PolicyName
from kvtier.policy import (
    ARC,
    GDSF,
    LFU,
    LFUDA,
    LRU2,
    POLICIES,
    ROOT,
    S3FIFO,
    SIEVE,
    SLRU,
    DepthDiscounted,
    EvictionPolicy,
    InCacheLFU,
    Marconi,
    ReuseProbability,
    WTinyLFU,
    make_policy,
    nothing_protected,
)
from kvtier.policy.ghosts import GHOSTS_PER_PAGE
from kvtier.testing.policy import Asked, PolicyContract, evicted, insert_one, pages_of

BASELINES = [name for name in POLICIES if name not in ("lru", "a2cr", "a2cr-classic")]
ORDER_IS_NOT_THE_SCORES = {"arc", "s3-fifo", "sieve", "w-tinylfu"}
RATES_DEPTH = {"gdsf", "marconi", "reuse-probability"}


def contract_of(name: str) -> type[PolicyContract]:
    class Contract(PolicyContract):
        exact_score = name not in ORDER_IS_NOT_THE_SCORES
        scores_depth = name in RATES_DEPTH
        examples = 60

        def make_policy(self) -> EvictionPolicy:
            return make_policy(name)

    return Contract


TestFIFO = contract_of("fifo")
TestLRU2 = contract_of("lru-2")
TestLFU = contract_of("lfu")
TestInCacheLFU = contract_of("lfu-in-cache")
TestLFUDA = contract_of("lfu-da")
TestGDSF = contract_of("gdsf")
TestDepthDiscounted = contract_of("depth-discounted")
TestMarconi = contract_of("marconi")
TestSLRU = contract_of("slru")
TestARC = contract_of("arc")
TestS3FIFO = contract_of("s3-fifo")
TestSIEVE = contract_of("sieve")
TestWTinyLFU = contract_of("w-tinylfu")
TestReuseProbability = contract_of("reuse-probability")


def test_every_policy_can_be_configured_and_has_the_name_it_goes_by():
    assert set(get_args(PolicyName)) == set(POLICIES)
    assert all(make_policy(name).name == name for name in POLICIES)


def test_every_baseline_is_tested_against_the_contract():
    tested = {value().make_policy().name for key, value in globals().items() if key.startswith("Test")}
    assert tested == set(BASELINES)


def single(policy: EvictionPolicy, *pages: int, now: float) -> None:
    """Unrelated pages come, a millisecond apart."""
    for step, page in enumerate(pages):
        insert_one(policy, page, ROOT, 0, now + step / 1000)


def use(policy: EvictionPolicy, *pages: int, now: float) -> None:
    """Pages are used, a millisecond apart."""
    for step, page in enumerate(pages):
        policy.touch(pages_of(page), now + step / 1000)


def leave(policy: EvictionPolicy, count: int, now: float, protected: Any = nothing_protected) -> list[int]:
    return evicted(policy, count, protected, now, 1.0)


# What each is known for


def test_fifo_takes_the_oldest_however_often_it_was_used():
    policy = make_policy("fifo")
    single(policy, 0, 1, 2, now=1.0)
    use(policy, 0, 0, 1, now=2.0)
    assert leave(policy, 3, 3.0) == [0, 1, 2]


def test_lru_2_takes_pages_used_once_first_then_those_whose_last_use_but_one_is_oldest():
    policy = LRU2()
    single(policy, 0, 1, 2, now=1.0)
    use(policy, 1, 0, now=2.0)
    use(policy, 1, now=3.0)
    assert policy.score(1, 9.0, 1.0) == 2.0
    assert leave(policy, 3, 4.0) == [2, 0, 1]


def test_lru_2_knows_when_a_page_that_comes_back_was_used_before_it_left():
    policy = LRU2()
    single(policy, 0, 1, 2, now=1.0)
    assert leave(policy, 1, 2.0) == [0]
    single(policy, 3, 0, now=3.0)
    assert policy.score(0, 9.0, 1.0) == 1.0
    assert leave(policy, 3, 4.0) == [1, 2, 3], "0 came back, so it was used twice"


def test_lfu_counts_go_on_after_an_eviction_and_in_cache_ones_do_not():
    for policy, order in ((LFU(), [1, 2, 0]), (InCacheLFU(), [0, 1, 2])):
        single(policy, 0, now=1.0)
        use(policy, 0, 0, now=2.0)
        assert leave(policy, 1, 3.0) == [0]
        single(policy, 0, 1, 2, now=4.0)
        use(policy, 1, 2, now=5.0)
        assert leave(policy, 3, 6.0) == order


def test_lfu_da_lets_pages_that_were_popular_long_ago_go():
    aged, plain = LFUDA(), InCacheLFU()
    for policy in (aged, plain):
        single(policy, 0, now=1.0)
        use(policy, *[0] * 5, now=2.0)
        for page in range(1, 12):
            single(policy, page, now=2.0 + page)
            leave(policy, 1, 2.5 + page)
    assert 0 in plain
    assert 0 not in aged


def test_gdsf_keeps_what_is_dear_to_compute_again():
    policy = GDSF(page_tokens=512)
    for page, depth in ((0, 0), (1, 100), (2, 0)):
        policy.insert(pages_of(page), pages_of(50 + page if depth else ROOT), pages_of(depth), 1.0)
    use(policy, 2, now=2.0)
    assert policy.score(1, 2.0, 1.0) == pytest.approx(1 + 0.0168 * 100)
    assert leave(policy, 3, 3.0) == [0, 2, 1]


def test_depth_discounted_is_count_times_decay_over_depth():
    policy = DepthDiscounted()
    policy.insert(pages_of(0, 1), pages_of(ROOT, 9), pages_of(0, 3), 10.0)
    use(policy, 1, 1, now=20.0)
    now = 100.0
    assert math.exp(policy.score(0, now, 1.0) - now / 300) == pytest.approx(1 * math.exp(-90 / 300) / 1)
    assert math.exp(policy.score(1, now, 1.0) - now / 300) == pytest.approx(3 * math.exp(-79.999 / 300) / 4)


def test_marconi_is_lru_until_the_first_eviction_and_then_keeps_deep_pages_longer():
    policy = Marconi(page_tokens=512, alpha=1.0)
    single(policy, 0, 1, now=0.0)
    policy.insert(pages_of(2), pages_of(90), pages_of(100), 5.0)
    assert policy.score(2, 5.0, 1.0) == 5.0
    assert leave(policy, 1, 5.0) == [0]
    policy.insert(pages_of(3), pages_of(91), pages_of(50), 6.0)
    assert policy.score(3, 6.0, 1.0) == pytest.approx(6.0 + 5.0 * 0.5), "half the work of the deepest: half a lifetime longer"
    single(policy, 4, now=8.0)
    assert leave(policy, 2, 9.0) == [1, 2]
    assert leave(policy, 2, 9.0) == [4, 3]


def test_slru_protects_from_the_first_use_on_and_puts_the_oldest_back_on_probation():
    policy = SLRU()
    single(policy, *range(10), now=1.0)
    use(policy, 0, 1, now=2.0)
    assert leave(policy, 3, 3.0) == [2, 3, 4]
    single(policy, 10, 11, 12, now=4.0)
    use(policy, *range(5, 13), now=5.0)
    assert policy.sizes == [2, 8], "protected pages take four fifths"
    assert leave(policy, 2, 6.0) == [0, 1]


def test_arc_moves_its_border_towards_the_list_whose_ghosts_come_back():
    policy = ARC()
    single(policy, *range(6), now=1.0)
    use(policy, 0, 1, now=2.0)
    assert leave(policy, 2, 3.0) == [2, 3], "from the pages used once, as the border is at 0"
    single(policy, 2, now=4.0)
    assert policy.target == 1.0
    assert policy.sizes == [2, 3], "a page that comes back was used twice"
    assert leave(policy, 2, 5.0) == [4, 0], "one page used once may stay now"
    single(policy, 0, now=6.0)
    assert policy.target == 0.0


def test_s3_fifo_lets_a_one_hit_wonder_go_before_a_page_used_twice_and_a_ghost_into_main():
    policy = S3FIFO()
    single(policy, *range(10), now=1.0)
    use(policy, 0, 0, now=2.0)
    assert leave(policy, 2, 3.0) == [1, 2]
    assert policy.sizes == [7, 1]
    single(policy, 1, 10, now=4.0)
    assert policy.sizes == [8, 2], "1 was let straight into the main queue"
    assert leave(policy, 6, 5.0) == [3, 4, 5, 6, 7, 8]


def test_s3_fifo_gives_used_pages_of_the_main_queue_another_round():
    policy = S3FIFO()
    single(policy, *range(4), now=1.0)
    use(policy, *[0] * 3, *[1] * 3, now=2.0)
    assert leave(policy, 2, 3.0) == [2, 3]
    use(policy, 0, now=4.0)
    assert leave(policy, 2, 5.0) == [1, 0]


def test_sieve_spares_what_was_used_since_the_hand_last_came_by_and_does_not_go_back():
    policy = SIEVE()
    single(policy, *range(5), now=1.0)
    use(policy, 0, 2, now=2.0)
    assert leave(policy, 2, 3.0) == [1, 3], "the hand went over 0 and 2"
    single(policy, 5, now=4.0)
    assert leave(policy, 2, 5.0) == [4, 5], "the hand goes on to the new pages before it comes back to 0"
    assert leave(policy, 2, 6.0) == [0, 2]


def test_w_tinylfu_lets_a_page_into_the_main_part_only_if_it_was_used_more_often_than_the_victim():
    policy = WTinyLFU()
    single(policy, *range(10), now=1.0)
    assert leave(policy, 1, 2.0) == [0]
    single(policy, 10, 11, now=3.0)
    assert leave(policy, 1, 4.0) == [10], "used once, as 1 was"
    single(policy, 0, 12, now=5.0)
    assert leave(policy, 1, 6.0) == [11]
    assert leave(policy, 1, 7.0) == [1], "0 was used twice"
    assert 0 in policy


def test_reuse_probability_learns_which_pages_return():
    policy = ReuseProbability(page_tokens=512)
    chains = np.arange(400)
    for start in range(0, 400, 2):  # shallow pages return after 10 s, deep ones never do
        now = float(start)
        policy.insert(chains[start : start + 2], pages_of(ROOT, 1000), pages_of(0, 100), now)
        if start >= 10:
            policy.touch(chains[start - 10 : start - 9], now)
    policy.insert(pages_of(500, 501), pages_of(ROOT, 1001), pages_of(100, 0), 400.0)
    assert policy.score(501, 400.0, 1.0) > 2 * policy.score(500, 400.0, 1.0)
    assert policy.score(501, 400.0, 1.0) > policy.score(501, 460.0, 1.0) > 0
    assert not {390, 392, 394, 396, 398} & set(leave(policy, 150, 401.0)), "the shallow ones that are about to return"


# What holds for all


@pytest.mark.parametrize("name", BASELINES)
@settings(max_examples=15)
@given(data=st.data())
def test_victims_of_a_busy_tier_are_leaves_never_protected_and_all_or_none(name, data):
    """Requests of some shared chains, a tier that is full all the time, as its owner would run it."""
    policy, capacity = make_policy(name), 24
    here: dict[int, int] = {}
    for step in range(data.draw(st.integers(5, 40))):
        chain, length = data.draw(st.tuples(st.integers(0, 7), st.integers(1, 9)))
        ids = [100 * chain + index if index > chain % 3 else 1000 + index for index in range(length)]
        parents = dict(zip(ids, [ROOT, *ids], strict=False))
        old, new = [page for page in ids if page in here], [page for page in ids if page not in here]
        if old:
            policy.touch(pages_of(*old), float(step))
        if (missing := len(here) + len(new) - capacity) > 0:
            others = data.draw(st.sets(st.sampled_from(sorted(here)), max_size=4))
            protected = Asked({*old, *others})
            victims = policy.evict(missing, protected, float(step), 1.0)
            if victims is None:
                policy.check_integrity()
                assert len(policy) == len(here)
                continue
            assert len(victims) == missing
            for page in victims.tolist():
                assert page not in protected.pages
                assert page not in here.values(), "it has a child"
                del here[page]
        if new:
            policy.insert(
                pages_of(*new), pages_of(*(parents[page] for page in new)), pages_of(*(ids.index(page) for page in new)), float(step)
            )
        here.update((page, parents[page]) for page in new)
        policy.check_integrity()
    assert len(policy) == len(here)


def remembered(policy: EvictionPolicy) -> int:
    """How many pages that left the policy knows something about."""
    known = [value for value in vars(policy).values() if type(value).__name__ == "Ghosts"]
    known += [ghosts for value in vars(policy).values() if isinstance(value, tuple) for ghosts in value]
    return sum(map(len, known)) + len(getattr(policy, "_frequency", ()))


@pytest.mark.parametrize("name", BASELINES)
def test_a_scan_of_a_hundred_thousand_pages_leaves_bounded_memory(name):
    policy, held = make_policy(name), 50
    policy.names = lambda pages: pages + 1_000_000 * scan[0]  # ids are used again, names are not
    scan, most, at_once = [0], 0, np.arange(25)
    insert = lambda start, now: policy.insert(at_once + start, np.where(at_once, at_once + start - 1, ROOT), at_once, now)  # noqa: E731
    for step in range(4_000):
        if len(policy) == held:
            free = policy.evict(25, nothing_protected, float(step), 1.0)
            assert free is not None
        scan[0] = step
        start = next(start for start in range(0, 10_000, 25) if not policy.here(at_once + start).any())
        insert(start, float(step))
        most = max(most, remembered(policy))
    policy.check_integrity()
    assert most <= GHOSTS_PER_PAGE * held
    if name in ("lru-2", "lfu", "gdsf", "depth-discounted", "reuse-probability"):
        assert most == GHOSTS_PER_PAGE * held
    entries: list[list[Any]] = policy._heaps  # type: ignore[attr-defined]
    assert sum(map(len, entries)) <= 2 * held + 64
