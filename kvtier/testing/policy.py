"""The proof an eviction policy gives: subclass `PolicyContract`, return a policy from `make_policy`, and let pytest collect it.

A Hypothesis state machine drives the policy beside a brute-force model: a tree of pages that come and go in any order, and victims chosen
by looking at everything. The model takes `score` as given; that the score is the intended one is for the policy's own tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from kvtier.policy.base import ROOT, EvictionPolicy, Mask, Pages, Protection, nothing_protected

SCORE_TOLERANCE = 1e-9
MOST_PAGES = 24

pressures = st.sampled_from([0.0, 0.5, 0.68, 0.72, 0.86, 0.88, 0.92, 1.0])
"""Of a tier, 0 to 1; around the bounds that policies use."""
time_steps = st.sampled_from([0.0, 0.0, 0.25, 1.0, 17.0, 300.0, -5.0])
"""Seconds; the negative one is a clock that ran backwards."""


def pages_of(*numbers: int) -> Pages:
    """Page ids as policies take them, int64 `[n]`."""
    return np.array(numbers, np.int64)


def insert_one(policy: EvictionPolicy, page: int, parent: int, depth: int, now: float) -> None:
    """Insert a single page."""
    policy.insert(pages_of(page), pages_of(parent), pages_of(depth), now)


def evicted(policy: EvictionPolicy, count: int, protected: Protection, now: float, pressure: float) -> list[int]:
    """The victims, of which there must be enough."""
    victims = policy.evict(count, protected, now, pressure)
    assert victims is not None, f"no {count} pages could leave"
    plain: list[int] = victims.tolist()
    return plain


class Asked:
    """A protection of these pages that remembers about which pages it was asked, in which order."""

    def __init__(self, pages: Iterable[int]) -> None:
        self.pages = frozenset(pages)
        self.asked: list[int] = []

    def __call__(self, pages: Pages) -> Mask:
        self.asked += pages.tolist()
        return np.array([page in self.pages for page in pages.tolist()], np.bool_)


class PolicyMachine(RuleBasedStateMachine):
    """Rows are pages that exist somewhere; those in `here` are in the policy's tier. A row's id is free again when it is gone."""

    def __init__(self, make_policy: Callable[[], EvictionPolicy], exact_score: bool) -> None:
        super().__init__()
        self.policy = make_policy()
        self.exact_score = exact_score
        self.now = 100.0
        self.rows: dict[int, tuple[int, int]] = {}
        self.here: set[int] = set()

    def leaves(self, here: set[int]) -> set[int]:
        return here - {self.rows[page][0] for page in here}

    def scores(self, pressure: float) -> dict[int, float]:
        return {page: self.policy.score(page, self.now, pressure) for page in self.here}

    def can_leave(self, protected: frozenset[int]) -> int:
        here = set(self.here)
        while free := self.leaves(here) - protected:
            here -= free
        return len(self.here) - len(here)

    def order(self, pressure: float) -> list[int]:
        """All pages that can leave, in the order in which they would."""
        everybody: list[int] = self.policy.peek(MOST_PAGES, nothing_protected, self.now, pressure).tolist()
        return everybody

    def check_order(self, chosen: list[int], protected: Asked, scores: dict[int, float]) -> None:
        """`chosen` leave one by one: always a leaf, never protected, none with a lower score left behind; only leaves were asked about."""
        here = set(self.here)
        for page in chosen:
            candidates = self.leaves(here) - protected.pages
            assert page in candidates, f"page {page} left; it is protected, absent or has a child (candidates {candidates})"
            if self.exact_score:
                lowest = min(scores[other] for other in candidates)
                assert scores[page] <= lowest + SCORE_TOLERANCE, f"page {page} left at {scores[page]} while {lowest} stayed"
            here.remove(page)
        asked = set(self.here)
        for page in protected.asked:
            assert page in self.leaves(asked), f"page {page} was asked about again, is absent, or was asked about before its children"
            asked.remove(page)

    @rule(step=time_steps)
    def wait(self, step: float) -> None:
        self.now += step

    @precondition(lambda self: len(self.rows) < MOST_PAGES)
    @rule(data=st.data())
    def new_row(self, data: st.DataObject) -> None:
        page = min(set(range(MOST_PAGES)) - set(self.rows))
        parent = data.draw(st.sampled_from([ROOT, *sorted(self.rows), *sorted(self.rows)[-2:]]))
        self.rows[page] = (parent, self.rows[parent][1] + 1 if parent != ROOT else 0)

    @precondition(lambda self: len(self.here) < len(self.rows))
    @rule(data=st.data())
    def insert(self, data: st.DataObject) -> None:
        absent = sorted(set(self.rows) - self.here)
        pages = data.draw(st.lists(st.sampled_from(absent), min_size=1, max_size=4, unique=True))
        links = [self.rows[page] for page in pages]
        self.policy.insert(pages_of(*pages), pages_of(*(parent for parent, _ in links)), pages_of(*(depth for _, depth in links)), self.now)
        self.here.update(pages)

    @precondition(lambda self: self.here)
    @rule(data=st.data())
    def insert_again(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.here)))
        fresh = MOST_PAGES + 1
        with pytest.raises(ValueError, match=str(page)):
            self.policy.insert(pages_of(fresh, page), pages_of(ROOT, self.rows[page][0]), pages_of(0, self.rows[page][1]), self.now)

    @precondition(lambda self: self.here)
    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        self.policy.touch(pages_of(*data.draw(st.lists(st.sampled_from(sorted(self.here)), min_size=1, max_size=8, unique=True))), self.now)

    @precondition(lambda self: self.here)
    @rule(data=st.data(), mass=st.floats(0, 1))
    def record_attention(self, data: st.DataObject, mass: float) -> None:
        self.policy.record_attention(data.draw(st.sampled_from(sorted(self.here))), mass)

    @precondition(lambda self: self.here)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        pages = data.draw(st.lists(st.sampled_from(sorted(self.here)), min_size=1, max_size=4, unique=True))
        self.policy.remove(pages_of(*pages))
        self.here.difference_update(pages)

    @rule()
    def forget_rows_without_copies(self) -> None:
        while gone := set(self.rows) - self.here - {parent for parent, _ in self.rows.values()}:
            for page in gone:
                del self.rows[page]

    @rule(page=st.integers(-2, 2 * MOST_PAGES))
    def name_an_absent_page(self, page: int) -> None:
        if page in self.here:
            return
        for call in (
            lambda: self.policy.touch(pages_of(*sorted(self.here)[:1], page), self.now),
            lambda: self.policy.remove(pages_of(*sorted(self.here)[:1], page)),
            lambda: self.policy.score(page, self.now, 0.5),
        ):
            with pytest.raises(KeyError):
                call()

    @rule(data=st.data(), count=st.integers(0, MOST_PAGES), pressure=pressures)
    def evict(self, data: st.DataObject, count: int, pressure: float) -> None:
        protected = Asked(data.draw(st.sets(st.sampled_from(range(MOST_PAGES)), max_size=MOST_PAGES // 3)))
        scores = self.scores(pressure)
        expected = self.policy.peek(count, Asked(protected.pages), self.now, pressure).tolist()
        before = self.order(pressure)
        leaving = self.policy.evict(count, protected, self.now, pressure)
        if self.can_leave(protected.pages) < count:
            assert leaving is None, "fewer pages could leave than were asked for"
            assert self.order(pressure) == before
            assert self.scores(pressure) == scores
            return
        assert leaving is not None
        victims = leaving.tolist()
        assert victims == expected, "peek promised other victims"
        assert len(victims) == count
        self.check_order(victims, protected, scores)
        self.here -= set(victims)

    @rule(data=st.data(), count=st.integers(0, MOST_PAGES), pressure=pressures)
    def peek(self, data: st.DataObject, count: int, pressure: float) -> None:
        protected = Asked(data.draw(st.sets(st.sampled_from(range(MOST_PAGES)), max_size=MOST_PAGES // 3)))
        scores = self.scores(pressure)
        chosen = self.policy.peek(count, protected, self.now, pressure).tolist()
        assert len(chosen) == min(count, self.can_leave(protected.pages))
        self.check_order(chosen, protected, scores)
        assert self.policy.peek(count, Asked(protected.pages), self.now, pressure).tolist() == chosen
        assert self.scores(pressure) == scores

    @rule(data=st.data(), count=st.integers(0, MOST_PAGES), pressure=pressures)
    def expired(self, data: st.DataObject, count: int, pressure: float) -> None:
        protected = Asked(data.draw(st.sets(st.sampled_from(range(MOST_PAGES)), max_size=MOST_PAGES // 3)))
        chosen = self.policy.expired(count, protected, self.now, pressure).tolist()
        assert len(chosen) <= count
        self.check_order(chosen, protected, self.scores(pressure))
        assert chosen == self.policy.peek(len(chosen), Asked(protected.pages), self.now, pressure).tolist()

    @precondition(lambda self: self.here)
    @rule(count=st.integers(1, MOST_PAGES), answers=st.integers(0, 6), pressure=pressures)
    def evict_with_a_question_that_fails(self, count: int, answers: int, pressure: float) -> None:
        class Failing(Asked):
            def __call__(self, pages: Pages) -> Mask:
                if len(self.asked) >= answers:
                    raise RuntimeError("no answer")
                return super().__call__(pages)

        protected = Failing(())
        before = self.order(pressure)
        victims: Pages | None = None
        try:
            victims = self.policy.evict(count, protected, self.now, pressure)
        except RuntimeError:
            assert len(protected.asked) >= answers
        self.here -= set(() if victims is None else victims.tolist())
        if victims is None:
            assert self.order(pressure) == before

    @invariant()
    def agrees_with_the_model(self) -> None:
        assert len(self.policy) == len(self.here)
        assert {page for page in range(-2, 2 * MOST_PAGES) if page in self.policy} == self.here
        assert "page" not in self.policy
        self.policy.check_integrity()


class PolicyContract:
    """Subclass it as `class TestMine(PolicyContract)` and override `make_policy`.

    Set `exact_score` to False for a policy that only approximates the order of its own `score`, and `scores_depth` to True for one that
    rates depth itself, so that the deepest of equally recent pages need not leave first. Widen `examples` for a longer run.
    """

    exact_score = True
    scores_depth = False
    examples = 150
    steps = 50

    def make_policy(self) -> EvictionPolicy:
        raise NotImplementedError("return a new, empty policy")

    def test_state_machine_agrees_with_the_brute_force_model(self) -> None:
        chosen = settings(max_examples=self.examples, stateful_step_count=self.steps, deadline=None)
        machine: Any = lambda: PolicyMachine(self.make_policy, self.exact_score)  # noqa: E731 - Hypothesis takes any factory, its stubs a class
        run_state_machine_as_test(machine, settings=chosen)

    def test_a_prefix_outlives_its_suffix_when_children_came_first(self) -> None:
        policy = self.make_policy()
        for page in reversed(range(8)):
            insert_one(policy, page, page - 1 if page else ROOT, page, now=1.0)
        policy.touch(np.arange(7), now=1.0)
        assert evicted(policy, 8, nothing_protected, 2.0, 0.95) == list(reversed(range(8)))

    def test_a_protected_leaf_keeps_its_whole_prefix(self) -> None:
        policy = self.make_policy()
        for page in range(8):
            insert_one(policy, page, page - 1 if page else ROOT, page, now=float(page))
        assert policy.evict(1, Asked({7}), 100.0, 0.95) is None
        assert policy.peek(8, Asked({5}), 100.0, 0.95).tolist() == [7, 6]

    def test_equally_recent_branches_lose_their_deepest_page_first(self) -> None:
        if self.scores_depth:
            pytest.skip("this policy rates depth itself")
        policy = self.make_policy()
        insert_one(policy, 0, ROOT, 0, now=1.0)
        insert_one(policy, 1, 0, 1, now=1.0)
        insert_one(policy, 2, ROOT, 0, now=1.0)
        insert_one(policy, 3, 2, 1, now=1.0)
        insert_one(policy, 4, 3, 2, now=1.0)
        assert policy.peek(2, nothing_protected, 1.0, 0.5)[0] == 4

    def test_a_negative_count_is_refused(self) -> None:
        policy = self.make_policy()
        insert_one(policy, 0, ROOT, 0, now=1.0)
        for call in (policy.evict, policy.peek):
            with pytest.raises(ValueError, match="-1"):
                call(-1, nothing_protected, 1.0, 0.5)
        assert len(policy) == 1
