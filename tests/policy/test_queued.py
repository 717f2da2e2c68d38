"""The shared mechanism: what an eviction costs, and that what it leaves behind stays bounded."""

from __future__ import annotations

import heapq
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvtier.policy import FIFO, ROOT, A2CRClassic, a2cr_classic, nothing_protected, queued, queues
from kvtier.policy.queued import QueuedPolicy
from kvtier.policy.queues import SPARE_ENTRIES
from kvtier.testing.policy import evicted, insert_one, pages_of

PAGES = 1_000_000


class Work:
    """Counts lines executed, heap operations and questions about protection while it is entered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, protected: set[int]) -> None:
        self.lines = self.heap_operations = self.questions = 0
        self.protected = protected
        costs = {"heappush": lambda _: 1, "heappop": lambda _: 1, "heapreplace": lambda _: 1, "heapify": len}
        for module in (queued, queues, a2cr_classic):
            for operation in costs.keys() & vars(module).keys():
                monkeypatch.setattr(module, operation, self.counted(getattr(heapq, operation), costs[operation]))

    def counted(self, operation: Callable[..., Any], cost: Callable[[list[Any]], int]) -> Callable[..., Any]:
        def call(heap: list[Any], *rest: Any) -> Any:
            self.heap_operations += cost(heap)
            return operation(heap, *rest)

        return call

    def __call__(self, pages):
        self.questions += len(pages)
        return np.isin(pages, list(self.protected))

    def __enter__(self):
        def trace(_frame, event, _argument):
            self.lines += event == "line"
            return trace

        self.before = sys.gettrace()
        sys.settrace(trace)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)


@pytest.mark.slow
def test_evicting_a_hundred_of_a_million_pages_looks_at_few(monkeypatch):
    policy = A2CRClassic()
    pages = np.arange(PAGES)
    for start in range(0, PAGES, 2):
        policy.insert(pages[start : start + 2], np.array([ROOT, start]), np.array([0, 1]), now=start / 1000)
    policy.touch(pages[:200], now=PAGES / 1000)
    work = Work(monkeypatch, {page for page in range(200, 300) if page % 2})
    with work:
        peeked = policy.peek(100, work, now=PAGES / 1000, pressure=0.95)
        victims = evicted(policy, 100, work, PAGES / 1000, 0.95)
        assert policy.evict(len(policy) + 1, work, PAGES / 1000, 0.95) is None
        policy.touch(pages[-1:], now=PAGES / 1000)
    # The 200 touched (dead entries) are met on the way. Of the first hundred half are protected: all are asked about, then a hundred more,
    # which go two by two.
    assert peeked.tolist() == victims == [page for pair in range(300, 400, 2) for page in (pair + 1, pair)]
    assert work.questions == 2 * (100 + 100)
    assert work.heap_operations < 5_000
    assert work.lines < PAGES / 10


def entries(policy: QueuedPolicy) -> int:
    return sum(map(len, policy._heaps))


def test_entries_stay_bounded_when_attention_swings():
    policy = A2CRClassic()
    for page in range(10):
        insert_one(policy, page, ROOT, 0, now=0.0)
    most = 0
    for step in range(2_000):
        policy.record_attention(step % 10, float(step // 10 % 2))
        policy.check_integrity()
        most = max(most, entries(policy))
    assert SPARE_ENTRIES < most <= 2 * 10 + SPARE_ENTRIES, "dead entries were made, and swept"


def test_entries_stay_bounded_when_ids_are_reused():
    policy = FIFO()
    for step in range(2_000):
        insert_one(policy, step % 7, ROOT, 0, now=0.0)
        policy.check_integrity()
        assert entries(policy) <= 2 * len(policy) + SPARE_ENTRIES + 1
        policy.remove(pages_of(step % 7))
    assert len(policy) == 0


def test_a_chain_grown_page_by_page_has_one_entry_per_page_at_most():
    policy = FIFO()
    for page in range(500):
        insert_one(policy, page, page - 1 if page else ROOT, page, now=float(page))
    assert entries(policy) == 500
    assert evicted(policy, 500, nothing_protected, 500.0, 1.0) == list(reversed(range(500)))
    assert entries(policy) == 0


@pytest.mark.parametrize(("page", "parent"), [(-1, ROOT), (3, -2), (3, 3)])
def test_impossible_ids_are_refused(page, parent):
    policy = FIFO()
    with pytest.raises(ValueError, match="ROOT"):
        insert_one(policy, page, parent, 0, now=0.0)
    assert len(policy) == 0


def test_a_large_id_or_parent_grows_the_columns_once():
    policy = FIFO()
    insert_one(policy, 5, 70_000, 3, now=1.0)
    insert_one(policy, 70_000, ROOT, 2, now=0.0)
    assert evicted(policy, 2, nothing_protected, 1.0, 1.0) == [5, 70_000]
