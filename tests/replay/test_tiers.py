"""Several tiers: they add up where nothing is held twice, follow the write policies, and agree with their policies at every step."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.policy import LRU, POLICIES, make_policy
from kvtier.replay.lab import replay
from kvtier.replay.tiers import EXCLUSIVE, NOWHERE, SELECTIVE, WRITE_BACK, WRITE_POLICIES, WRITE_THROUGH, Tiers
from kvtier.replay.trace import Trace
from tests.replay.rig import prefix_in, prompts_of, public_trace, trace_of, traces

LONGEST = 6


def lru_tiers(trace: Trace, capacities: list[int], write: str = EXCLUSIVE, uses: int = 2) -> Tiers:
    return Tiers(trace, [LRU() for _ in capacities], capacities, [write] * (len(capacities) - 1), uses)


def found(trace: Trace, tiers: Tiers) -> list[list[int]]:
    """Per request, the tiers its prefix was found in."""
    served = tiers.replay().served.tolist()
    parts = [served[start:stop] for start, stop in zip(trace.starts[:-1], trace.starts[1:], strict=True)]
    return [part[: part.index(NOWHERE)] if NOWHERE in part else part for part in parts]


@pytest.mark.parametrize("name", POLICIES)
@given(trace=traces(), capacity=st.integers(1, 20))
def test_one_tier_here_is_one_tier_there(name, trace, capacity):
    alone = replay(trace, make_policy(name), capacity)
    outcome = Tiers(trace, [make_policy(name)], [capacity], []).replay()
    assert trace.sum_per_request(outcome.served == 0).tolist() == alone.hit_pages.tolist()
    assert (outcome.inserted, outcome.evicted) == (alone.inserted, [alone.evicted])


@given(trace=traces(moments=False, longest=LONGEST), capacities=st.lists(st.integers(LONGEST, 12), min_size=2, max_size=3))
def test_exclusive_lru_tiers_find_what_one_as_large_as_all_finds(trace, capacities):
    outcome = lru_tiers(trace, capacities).replay()
    alone = replay(trace, LRU(), sum(capacities))
    assert trace.sum_per_request(outcome.served != NOWHERE).tolist() == alone.hit_pages.tolist()
    first = replay(trace, LRU(), capacities[0])
    assert trace.sum_per_request(outcome.served == 0).tolist() == first.hit_pages.tolist()


@pytest.mark.parametrize("write", WRITE_POLICIES)
@given(
    trace=traces(),
    capacities=st.lists(st.integers(1, 9), min_size=2, max_size=3),
    names=st.lists(st.sampled_from(POLICIES), min_size=3, max_size=3),
    uses=st.integers(1, 3),
)
def test_every_request_ends_in_the_first_tier_and_every_tier_agrees_with_its_policy(write, trace, capacities, names, uses):
    policies = [make_policy(name) for name in names[: len(capacities)]]
    tiers = Tiers(trace, policies, capacities, [write] * (len(capacities) - 1), uses)
    seen: Counter[int] = Counter()
    for start, prompt, at_s in zip(trace.starts.tolist(), prompts_of(trace), trace.at_s.tolist(), strict=False):
        named = prompt[: capacities[0]]
        before = {page for page in range(trace.distinct) if tiers.here[:, page].any()}
        homes = tiers.serve(trace.pages[start : start + len(named)], at_s)
        tiers.check_integrity()
        assert len(homes) == prefix_in(named, before)
        assert tiers.here[0, named].all()
        assert not tiers.running.any()
        seen.update(named)
        if write == SELECTIVE:
            assert all(seen[page] >= uses for page in seen if tiers.here[1, page])
        if write == WRITE_THROUGH and capacities[1] >= capacities[0]:
            assert tiers.here[1:, named].any(0).all()
        if write == EXCLUSIVE:
            assert tiers.here.sum(0).max() <= 1


def test_what_leaves_goes_down_and_comes_back_up():
    trace = trace_of([0, 1], [2, 3], [0, 1], [2, 3])
    tiers = lru_tiers(trace, [2, 2])
    assert found(trace, tiers) == [[], [], [1, 1], [1, 1]]
    assert tiers.moved == {(0, 1): 6, (1, 0): 4}
    assert tiers.evicted == [6, 0]


def test_a_copy_that_stays_below_is_not_written_again():
    trace = trace_of([0, 1], [2, 3], [0, 1], [2, 3])
    tiers = lru_tiers(trace, [2, 4], WRITE_BACK)
    assert found(trace, tiers) == [[], [], [1, 1], [1, 1]]
    assert tiers.moved == {(0, 1): 4, (1, 0): 4}


def test_write_through_writes_at_once_and_selective_at_the_second_use():
    trace = trace_of([0, 1], [0, 1], [2, 3], [0, 1])
    through, selective = lru_tiers(trace, [2, 4], WRITE_THROUGH), lru_tiers(trace, [2, 4], SELECTIVE)
    assert found(trace, through) == [[], [0, 0], [], [1, 1]]
    assert through.moved == {(0, 1): 4, (1, 0): 2}
    assert found(trace, selective) == [[], [0, 0], [], [1, 1]]
    assert selective.moved == {(0, 1): 2, (1, 0): 2}, "2 and 3 were used once"
    assert found(trace, lru_tiers(trace, [2, 4], SELECTIVE, uses=3)) == [[], [0, 0], [], []]


def test_uses_start_again_when_a_page_was_gone():
    trace = trace_of([0], [1], [0], [1])
    tiers = lru_tiers(trace, [1, 4], SELECTIVE)
    assert found(trace, tiers) == [[], [], [], []]
    assert not tiers.moved


def test_an_heir_takes_over_the_recency_of_what_left_above():
    # 0 is written through first, 1 second; 0 is used again in the first tier, so 1 is the older when room is needed below.
    trace = trace_of([0], [1], [0], [2], [3], [0])
    tiers = lru_tiers(trace, [2, 3], WRITE_THROUGH)
    assert found(trace, tiers)[-1] == [1]


def test_what_finds_no_room_below_goes_further_down():
    trace = trace_of([0, 1, 2], [3, 4, 5], [0, 1, 2])
    tiers = lru_tiers(trace, [3, 1, 5])
    assert found(trace, tiers)[-1] == [1, 2, 2], "the head is hottest"
    assert tiers.moved[0, 1] == 2
    assert tiers.moved[0, 2] == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shares", "first", "second"), [((0.01, 0.04), 0.0535, 0.1466), ((0.01, 0.09), 0.0535, 0.2313), ((0.05, 0.15), 0.2002, 0.1518)]
)
def test_two_exclusive_tiers_on_the_conversation_trace_find_what_others_found(shares, first, second):
    trace = public_trace("conversation")
    outcome = lru_tiers(trace, [int(share * trace.distinct) for share in shares]).replay()
    hits = trace.sum_per_request(outcome.served == 0)
    assert trace.hit_tokens(hits) / trace.tokens == pytest.approx(first, abs=2e-3)
    both = trace.sum_per_request(outcome.served != NOWHERE)
    assert (trace.hit_tokens(both) - trace.hit_tokens(hits)) / trace.tokens == pytest.approx(second, abs=2e-3)
    if shares[0] == 0.01:
        assert outcome.moved[0, 1] / trace.requests == pytest.approx(22.6, abs=0.1)


def test_what_comes_down_is_written_through_to_the_next_tier_at_once():
    tiers = Tiers(trace_of([0], [1]), [LRU(), LRU(), LRU()], [1, 2, 4], [WRITE_BACK, WRITE_THROUGH])
    assert tiers.replay().moved == {(0, 1): 1, (1, 2): 1}


def test_a_page_that_was_brought_up_counts_as_used_below():
    trace = trace_of([0], [1], [2], [3], [4], [0], [5])
    tiers = lru_tiers(trace, [2, 3], WRITE_BACK)
    tiers.replay()
    assert [page for page in range(6) if tiers.here[1, page]] == [0, 3, 4]
