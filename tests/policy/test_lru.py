"""LRU: the contract, and that the order is that of the last touch."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvtier.policy import LRU, ROOT
from kvtier.testing.policy import PolicyContract


class TestContract(PolicyContract):
    def make_policy(self) -> LRU:
        return LRU()


@given(st.lists(st.integers(0, 9), max_size=60))
def test_unrelated_pages_leave_in_the_order_of_their_last_touch(touches):
    policy = LRU()
    for page in range(10):
        policy.insert(page, ROOT, 0, now=float(page))
    order = list(range(10))
    for now, page in enumerate(touches, start=10):
        policy.touch(page, float(now))
        order.remove(page)
        order.append(page)
    assert policy.evict(10, frozenset(), 100.0, 0.0) == order


def test_a_clock_that_runs_backwards_stands_still():
    policy = LRU()
    policy.insert(0, ROOT, 0, now=50.0)
    policy.insert(1, ROOT, 1, now=20.0)
    assert policy.score(1, 50.0, 0.0) == 50.0
    policy.insert(2, ROOT, 0, now=60.0)
    assert policy.evict(1, {0, 1}, now=90.0, pressure=0.0) == [2]
    policy.touch(0, now=70.0)
    assert policy.score(0, 90.0, 0.0) == 90.0, "evict saw a later time"


def test_a_parent_freed_by_an_eviction_leaves_at_its_own_recency():
    policy = LRU()
    policy.insert(0, ROOT, 0, now=1.0)
    policy.insert(1, 0, 1, now=2.0)
    policy.insert(2, ROOT, 0, now=3.0)
    policy.insert(3, ROOT, 0, now=4.0)
    policy.touch(0, now=3.5)
    assert policy.evict(4, frozenset(), 5.0, 0.0) == [1, 2, 0, 3]


def test_pressure_attention_and_thresholds_mean_nothing():
    policy = LRU()
    policy.insert(0, ROOT, 0, now=1.0)
    policy.record_attention(0, 1.0)
    assert policy.score(0, 9.0, 0.0) == policy.score(0, 99.0, 1.0) == 1.0
    assert policy.expired(1, frozenset(), 1e9, 1.0) == []
