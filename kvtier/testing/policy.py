"""The proof an eviction policy gives: subclass `PolicyContract`, return a policy from `make_policy`, and let pytest collect it.

A Hypothesis state machine drives the policy beside a brute-force model: a tree of pages that come and go in any order, and victims chosen
by looking at everything. The model takes `score` as given; that the score is the intended one is for the policy's own tests.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from kvtier.policy.base import ROOT, EvictionPolicy

SCORE_TOLERANCE = 1e-9
MOST_PAGES = 24

pressures = st.sampled_from([0.0, 0.5, 0.68, 0.72, 0.86, 0.88, 0.92, 1.0])
"""Of a tier, 0 to 1; around the bounds that policies use."""
time_steps = st.sampled_from([0.0, 0.0, 0.25, 1.0, 17.0, 300.0, -5.0])
"""Seconds; the negative one is a clock that ran backwards."""


class Asked(Container[int]):
    """A set of protected pages that remembers about which pages it was asked."""

    def __init__(self, pages: Iterable[int]) -> None:
        self.pages = frozenset(pages)
        self.asked: list[int] = []

    def __contains__(self, page: object) -> bool:
        assert isinstance(page, int)
        self.asked.append(page)
        return page in self.pages


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

    def check_order(self, chosen: list[int], protected: Asked, scores: dict[int, float]) -> None:
        """`chosen` leave one by one: always a leaf, never protected, none with a lower score left behind; only leaves were asked about."""
        here = set(self.here)
        askable = set(self.leaves(here))
        for page in chosen:
            candidates = self.leaves(here) - protected.pages
            assert page in candidates, f"page {page} left; it is protected, absent or has a child (candidates {candidates})"
            if self.exact_score:
                lowest = min(scores[other] for other in candidates)
                assert scores[page] <= lowest + SCORE_TOLERANCE, f"page {page} left at {scores[page]} while {lowest} stayed"
            here.remove(page)
            askable |= self.leaves(here)
        assert askable >= set(protected.asked), "pages that are no candidates were looked at"
        assert len(set(protected.asked)) == len(protected.asked), "a candidate was looked at twice in one call"

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
        page = data.draw(st.sampled_from(sorted(set(self.rows) - self.here)))
        self.policy.insert(page, *self.rows[page], self.now)
        self.here.add(page)

    @precondition(lambda self: self.here)
    @rule(data=st.data())
    def insert_again(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.here)))
        with pytest.raises(ValueError, match=str(page)):
            self.policy.insert(page, *self.rows[page], self.now)

    @precondition(lambda self: self.here)
    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        for page in data.draw(st.lists(st.sampled_from(sorted(self.here)), min_size=1, max_size=12)):
            self.policy.touch(page, self.now)

    @precondition(lambda self: self.here)
    @rule(data=st.data(), mass=st.floats(0, 1))
    def record_attention(self, data: st.DataObject, mass: float) -> None:
        self.policy.record_attention(data.draw(st.sampled_from(sorted(self.here))), mass)

    @precondition(lambda self: self.here)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.here)))
        self.policy.remove(page)
        self.here.remove(page)

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
            lambda: self.policy.touch(page, self.now),
            lambda: self.policy.remove(page),
            lambda: self.policy.score(page, self.now, 0.5),
        ):
            with pytest.raises(KeyError):
                call()

    @rule(data=st.data(), count=st.integers(0, MOST_PAGES), pressure=pressures)
    def evict(self, data: st.DataObject, count: int, pressure: float) -> None:
        protected = Asked(data.draw(st.sets(st.sampled_from(range(MOST_PAGES)), max_size=MOST_PAGES // 3)))
        scores = self.scores(pressure)
        expected = self.policy.peek(count, Asked(protected.pages), self.now, pressure)
        before = self.policy.peek(MOST_PAGES, frozenset(), self.now, pressure)
        victims = self.policy.evict(count, protected, self.now, pressure)
        if self.can_leave(protected.pages) < count:
            assert victims is None, "fewer pages could leave than were asked for"
            assert self.policy.peek(MOST_PAGES, frozenset(), self.now, pressure) == before
            assert self.scores(pressure) == scores
            return
        assert victims == expected, "peek promised other victims"
        assert len(victims) == count
        self.check_order(victims, protected, scores)
        self.here -= set(victims)

    @rule(data=st.data(), count=st.integers(0, MOST_PAGES), pressure=pressures)
    def peek(self, data: st.DataObject, count: int, pressure: float) -> None:
        protected = Asked(data.draw(st.sets(st.sampled_from(range(MOST_PAGES)), max_size=MOST_PAGES // 3)))
        scores = self.scores(pressure)
        chosen = self.policy.peek(count, protected, self.now, pressure)
        assert len(chosen) == min(count, self.can_leave(protected.pages))
        self.check_order(chosen, protected, scores)
        assert self.policy.peek(count, Asked(protected.pages), self.now, pressure) == chosen
        assert self.scores(pressure) == scores

    @rule(data=st.data(), count=st.integers(0, MOST_PAGES), pressure=pressures)
    def expired(self, data: st.DataObject, count: int, pressure: float) -> None:
        protected = Asked(data.draw(st.sets(st.sampled_from(range(MOST_PAGES)), max_size=MOST_PAGES // 3)))
        chosen = self.policy.expired(count, protected, self.now, pressure)
        assert len(chosen) <= count
        self.check_order(chosen, protected, self.scores(pressure))
        assert chosen == self.policy.peek(len(chosen), Asked(protected.pages), self.now, pressure)

    @precondition(lambda self: self.here)
    @rule(count=st.integers(1, MOST_PAGES), answers=st.integers(0, 6), pressure=pressures)
    def evict_with_a_question_that_fails(self, count: int, answers: int, pressure: float) -> None:
        class Failing(Asked):
            def __contains__(self, page: object) -> bool:
                if len(self.asked) == answers:
                    raise RuntimeError("no answer")
                return super().__contains__(page)

        protected = Failing(())
        before = self.policy.peek(MOST_PAGES, frozenset(), self.now, pressure)
        victims: list[int] | None = None
        try:
            victims = self.policy.evict(count, protected, self.now, pressure)
        except RuntimeError:
            assert len(protected.asked) == answers
        self.here -= set(victims or ())
        if victims is None:
            assert self.policy.peek(MOST_PAGES, frozenset(), self.now, pressure) == before

    @invariant()
    def agrees_with_the_model(self) -> None:
        assert len(self.policy) == len(self.here)
        assert {page for page in range(-2, 2 * MOST_PAGES) if page in self.policy} == self.here
        assert "page" not in self.policy
        self.policy.check_integrity()


class PolicyContract:
    """Subclass it as `class TestMine(PolicyContract)` and override `make_policy`.

    Set `exact_score` to False for a policy that only approximates the order of its own `score`. Widen `examples` for a longer run.
    """

    exact_score = True
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
            policy.insert(page, page - 1 if page else ROOT, page, now=1.0)
        for page in range(7):
            policy.touch(page, now=1.0)
        assert policy.evict(8, frozenset(), 2.0, 0.95) == list(reversed(range(8)))

    def test_a_protected_leaf_keeps_its_whole_prefix(self) -> None:
        policy = self.make_policy()
        for page in range(8):
            policy.insert(page, page - 1 if page else ROOT, page, now=float(page))
        assert policy.evict(1, {7}, 100.0, 0.95) is None
        assert policy.peek(8, {5}, 100.0, 0.95) == [7, 6]

    def test_equally_recent_branches_lose_their_deepest_page_first(self) -> None:
        policy = self.make_policy()
        policy.insert(0, ROOT, 0, now=1.0)
        policy.insert(1, 0, 1, now=1.0)
        policy.insert(2, ROOT, 0, now=1.0)
        policy.insert(3, 2, 1, now=1.0)
        policy.insert(4, 3, 2, now=1.0)
        assert policy.peek(2, frozenset(), 1.0, 0.5)[0] == 4

    def test_a_negative_count_is_refused(self) -> None:
        policy = self.make_policy()
        policy.insert(0, ROOT, 0, now=1.0)
        for call in (policy.evict, policy.peek):
            with pytest.raises(ValueError, match="-1"):
                call(-1, frozenset(), 1.0, 0.5)
        assert len(policy) == 1
