"""In the live cache a page goes by the same name whatever row it is in, and the next page in its row by another."""

from __future__ import annotations

import numpy as np
import pytest

from kvtier.keys import page_keys, root_key
from kvtier.policy import LRU, Ghosts
from kvtier.residency import residency
from tests.cache.rig import PAGE, make_cache, put, run


class Remembers(LRU):
    """LRU that counts, across evictions, how often each page came."""

    def __init__(self) -> None:
        super().__init__()
        self.ghosts: Ghosts[int] = Ghosts()
        self.called: dict[int, int] = {}
        self.times: dict[int, int] = {}
        self.rows_seen: dict[int, list[int]] = {}

    def insert(self, pages, parents, depths, now):
        super().insert(pages, parents, depths, now)
        for page, name in zip(pages.tolist(), self.names(pages).tolist(), strict=True):
            self.called[page] = name
            self.times[page] = (self.ghosts.recall(name) or 0) + 1
            self.rows_seen.setdefault(name, []).append(page)

    def evict(self, count, protected, now, pressure):
        before = len(self)
        victims = super().evict(count, protected, now, pressure)
        if victims is not None:
            self.ghosts.leave([(self.called.pop(page), self.times.pop(page)) for page in victims.tolist()], before)
        return victims


def test_a_page_that_comes_back_in_another_row_is_known_and_the_next_in_its_row_is_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(residency, "make_policy", lambda *_: Remembers())
    with make_cache(host_pages=None, device_pages=8) as cache:
        policy = cache._residency.policies[0]
        assert isinstance(policy, Remembers)
        put(cache, run(1, 4))
        put(cache, run(2, 3))
        for start in (3, 4):
            put(cache, run(start, 7))
        assert not cache.lookup(run(1, 4)).tokens, "gone from the only tier, and their rows are others' now"
        assert set(policy.times.values()) == {1}, "pages in rows used again are new pages"
        put(cache, run(1, 4))
        rows = cache._residency.table.find(page_keys(run(1, 4), PAGE, root_key(cache._namespace)))
        assert [policy.times[row] for row in rows.tolist()] == [2] * 4
        moved = [rows_seen for rows_seen in policy.rows_seen.values() if len(rows_seen) > 1]
        assert any(len(set(rows_seen)) > 1 for rows_seen in moved), "the test is about rows that are used again"
        assert np.array_equal(policy.names(rows), cache._residency.table.names(rows))
