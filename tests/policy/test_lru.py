"""LRU: the contract, that the order is that of the last touch, what an eviction costs, and that what it leaves behind stays bounded."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.policy import LRU, ROOT, nothing_protected
from kvtier.policy import recency as recency_module
from kvtier.testing.policy import Asked, PolicyContract, evicted, insert_one, pages_of

PAGES = 1_000_000


class TestContract(PolicyContract):
    def make_policy(self) -> LRU:
        return LRU()


class TestContractWithAJournalThatIsCompactedAllTheTime(PolicyContract):
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        monkeypatch.setattr(recency_module, "SPARE_ENTRIES", 2)

    def make_policy(self) -> LRU:
        return LRU()


@given(st.lists(st.integers(0, 9), max_size=60))
def test_unrelated_pages_leave_in_the_order_of_their_last_touch(touches):
    policy = LRU()
    for page in range(10):
        insert_one(policy, page, ROOT, 0, now=float(page))
    order = list(range(10))
    for now, page in enumerate(touches, start=10):
        policy.touch(pages_of(page), float(now))
        order.remove(page)
        order.append(page)
    assert evicted(policy, 10, nothing_protected, 100.0, 0.0) == order


def test_a_clock_that_runs_backwards_stands_still():
    policy = LRU()
    insert_one(policy, 0, ROOT, 0, now=50.0)
    insert_one(policy, 1, ROOT, 1, now=20.0)
    assert policy.score(1, 50.0, 0.0) == 50.0
    insert_one(policy, 2, ROOT, 0, now=60.0)
    assert evicted(policy, 1, Asked({0, 1}), now=90.0, pressure=0.0) == [2]
    policy.touch(pages_of(0), now=70.0)
    assert policy.score(0, 90.0, 0.0) == 90.0, "evict saw a later time"


def test_a_parent_freed_by_an_eviction_leaves_at_its_own_recency():
    policy = LRU()
    insert_one(policy, 0, ROOT, 0, now=1.0)
    insert_one(policy, 1, 0, 1, now=2.0)
    insert_one(policy, 2, ROOT, 0, now=3.0)
    insert_one(policy, 3, ROOT, 0, now=4.0)
    policy.touch(pages_of(0), now=3.5)
    assert evicted(policy, 4, nothing_protected, 5.0, 0.0) == [1, 2, 0, 3]


def test_pressure_attention_and_thresholds_mean_nothing():
    policy = LRU()
    insert_one(policy, 0, ROOT, 0, now=1.0)
    policy.record_attention(0, 1.0)
    assert policy.score(0, 9.0, 0.0) == policy.score(0, 99.0, 1.0) == 1.0
    assert policy.expired(1, nothing_protected, 1e9, 1.0).tolist() == []


class Lines:
    """Counts the lines of Python executed while it is entered."""

    def __enter__(self):
        def trace(_frame, event, _argument):
            self.count += event == "line"
            return trace

        self.count = 0
        self.before = sys.gettrace()
        sys.settrace(trace)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)


def million() -> LRU:
    """A million pages in pairs of parent and child, a pair a millisecond."""
    policy = LRU()
    pages = np.arange(PAGES)
    for start in range(0, PAGES, 2):
        policy.insert(pages[start : start + 2], np.array([ROOT, start]), np.array([0, 1]), now=start / 1000)
    return policy


@pytest.mark.slow
def test_evicting_a_hundred_of_a_million_pages_looks_at_few():
    policy = million()
    policy.touch(np.arange(200), now=PAGES / 1000)
    protected = Asked(page for page in range(200, 300) if page % 2)
    with Lines() as lines:
        peeked = policy.peek(100, protected, PAGES / 1000, 0.95)
        victims = evicted(policy, 100, protected, PAGES / 1000, 0.95)
        assert policy.evict(len(policy) + 1, protected, PAGES / 1000, 0.95) is None
        policy.touch(np.array([PAGES - 1]), PAGES / 1000)
    assert peeked.tolist() == victims == [page for pair in range(300, 400, 2) for page in (pair + 1, pair)]
    assert set(protected.asked) <= set(range(200, 400))
    assert lines.count < 40_000


@pytest.mark.slow
def test_a_moment_of_a_million_pages_is_sorted_once_and_not_for_every_eviction():
    policy = LRU()
    pages = np.arange(PAGES)
    policy.insert(pages, np.where(pages % 100, pages - 1, ROOT), pages % 100, now=1.0)
    assert evicted(policy, 1, nothing_protected, 1.0, 0.95) == [99]
    with Lines() as lines:
        for _ in range(50):
            victims = evicted(policy, 100, nothing_protected, 1.0, 0.95)
            insert_one(policy, victims[0], ROOT, 0, now=1.0)
            assert len(policy.peek(100, nothing_protected, 1.0, 0.95)) == 100
    assert lines.count < 50 * 10_000


def test_touching_without_evicting_keeps_the_journal_bounded():
    policy = LRU()
    pages = np.arange(10)
    policy.insert(pages, np.full(10, ROOT), np.zeros(10, np.int64), now=0.0)
    for step in range(5_000):
        policy.touch(pages[step % 3 :: 3], now=float(step))
    assert len(policy._keys) <= 2 * (recency_module.SPARE_ENTRIES + 2 * 10 + 10)
    assert evicted(policy, 10, nothing_protected, 5_000.0, 0.5) == [2, 5, 8, 0, 3, 6, 9, 1, 4, 7]


def test_a_clock_that_stands_still_keeps_journal_and_heap_bounded():
    policy = LRU()
    pages = np.arange(10)
    policy.insert(pages, np.full(10, ROOT), np.zeros(10, np.int64), now=0.0)
    policy.peek(1, nothing_protected, 0.0, 0.5)
    assert evicted(policy, 1, nothing_protected, 0.0, 0.5) == [0]
    for _ in range(2_000):
        policy.touch(pages[1:], now=0.0)
        policy.remove(pages[1:2])
        insert_one(policy, 1, ROOT, 0, now=0.0)
    assert len(policy._late) <= 2 * 10 + recency_module.SPARE_ENTRIES
    assert len(policy._keys) <= 2 * (recency_module.SPARE_ENTRIES + 2 * 10 + 10)
    policy.check_integrity()
    assert evicted(policy, 9, nothing_protected, 0.0, 0.5) == list(range(1, 10))


def test_an_insert_or_touch_that_is_refused_changes_nothing():
    policy = LRU()
    policy.insert(pages_of(0, 1), pages_of(ROOT, 0), pages_of(0, 1), now=1.0)
    before = policy.peek(2, nothing_protected, 1.0, 0.5).tolist()
    for pages, parents, depths in (
        ((5, -1), (ROOT, ROOT), (0, 0)),
        ((5, 6), (ROOT, -2), (0, 0)),
        ((5, 6), (ROOT, 5), (0, -1)),
        ((6, 1), (0, 0), (0, 0)),
    ):
        with pytest.raises(ValueError, match="already|ROOT"):
            policy.insert(np.array(pages), np.array(parents), np.array(depths), now=2.0)
    for page in (-1, -2, 7, PAGES):
        with pytest.raises(KeyError, match=str(page)):
            policy.touch(pages_of(0, page), now=2.0)
    policy.check_integrity()
    assert len(policy) == 2
    assert policy.peek(2, nothing_protected, 1.0, 0.5).tolist() == before
    assert policy.score(0, 2.0, 0.5) == 1.0
