"""A²CR's compiled loops: bit for bit what NumPy does beside them, and no way out of the columns' memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvtier import columns
from kvtier.pages import PageTable
from kvtier.policy import A2CR, ROOT, hazards, nothing_protected
from kvtier.policy import spells as spells_module
from kvtier.policy.ages import AGES
from kvtier.policy.ranking import Ranking
from kvtier.policy.reuse import ReuseModel
from kvtier.testing.policy import PolicyContract
from tests.columns.rig import PlainA2CR, PlainRanking, Twins, a2cr_state, needs_loops


def twins() -> Any:
    return Twins(A2CR(), PlainA2CR(), a2cr_state)


@needs_loops
class TestTwins(PolicyContract):
    exact_score = False

    @pytest.fixture(autouse=True)
    def often(self, hasty):
        pass

    def make_policy(self) -> Any:
        return twins()


class TestContractWithoutLoops(PolicyContract):
    exact_score = False

    def make_policy(self) -> A2CR:
        return PlainA2CR()


@needs_loops
def test_policies_stay_the_same_through_a_long_stream_of_requests(hasty):
    chance = np.random.default_rng(5)
    policy = twins()
    chains: list[list[int]] = []
    fresh_id, now, room = 0, 0.0, 400
    here: set[int] = set()
    for _ in range(400):
        now += float(chance.exponential(3.0))
        chain = list(chains[int(chance.integers(max(0, len(chains) - 60), len(chains)))]) if chains and chance.random() < 0.7 else []
        chain = chain[: int(chance.integers(0, len(chain) + 1))]
        grown = int(chance.integers(0, 30))
        chain += range(fresh_id, fresh_id + grown)
        fresh_id += grown
        if not chain:
            continue
        chains.append(chain)
        found = next((place for place, page in enumerate(chain) if page not in here), len(chain))
        if found:
            policy.touch(np.array(chain[:found]), now)
        need = len(here) + len(chain) - found - room
        if need > 0:
            running = np.array(chain)
            victims = policy.evict(need, lambda pages, running=running: np.isin(pages, running), now, 0.9)
            here -= set(victims.tolist())
        if found < len(chain):
            coming = np.array(chain[found:])
            policy.insert(coming, np.array([ROOT, *chain])[found : len(chain)], np.arange(found, len(chain)), now)
            here.update(chain[found:])
        if chance.random() < 0.2:
            policy.record_attention(int(chance.choice(sorted(here))), float(chance.random()))
        if chance.random() < 0.05:
            leaf = policy.peek(3, nothing_protected, now, 0.9)
            policy.remove(leaf)
            here -= set(leaf.tolist())
    policy.check_integrity()


@needs_loops
def test_pages_that_are_refused_leave_the_loops_on_the_columns_of_now():
    """Columns that grew for them were not those of the loops: what was used next was noted in columns that nobody looked at any more."""
    policy = twins()
    pages = np.arange(3)
    policy.insert(pages, np.full(3, ROOT), np.zeros(3, np.int64), 1.0)
    policy.touch(pages[:1], 2.0)  # so that the kind of a page used twice is known: meeting a kind fits the loops anew
    for fresh in (25, 10_000):
        with pytest.raises(ValueError, match="page 1 is already"):
            policy.insert(np.array([fresh, 1]), np.full(2, ROOT), np.zeros(2, np.int64), 3.0)
    policy.touch(pages[1:2], 4.0)
    policy.insert(np.array([3]), np.array([1]), np.array([1]), 5.0)
    assert policy.peek(4, nothing_protected, 6.0, 0.9).tolist() == [2, 0, 3, 1]
    policy.check_integrity()


@needs_loops
def test_loops_refuse_columns_that_do_not_fit_and_rows_that_are_not_there():
    loops = columns.loops()
    assert loops is not None
    ranking = Ranking()
    for seats, heap, told in ((ranking._seats, 7, "cells"), (ranking._seats[:0], 1, "records"), (ranking._heap, 1, "records")):
        with pytest.raises(ValueError, match=told):
            loops.Ranking(seats, np.zeros(heap, np.int64), ranking._numbers)
    with pytest.raises(TypeError, match="arguments"):
        loops.Spells(np.zeros(1, np.bool_))  # type: ignore[arg-type, call-arg]
    policy = A2CR()
    policy.insert(np.array([0, 1]), np.array([ROOT, 0]), np.array([0, 1]), 1.0)
    spells, ranked = policy.attach(), policy._ranking.attach()
    assert spells is not None
    assert ranked is not None
    for strange in (np.array([-1]), np.array([10**9])):
        assert spells.touch(strange, 1.0) == -1
        assert not spells.remember(strange)
        assert spells.insert(strange, np.array([0]), np.array([0]), strange, 1.0) == -1
        assert spells.insert(np.array([0]), strange - 1, np.array([0]), np.array([0]), 1.0) == -1
        assert not ranked.arrive(strange, np.array([0]), np.array([0]))
        for call in (ranked.leave, ranked.restore, ranked.rescored, ranked.withdraw):
            assert not call(strange)
    policy._facts[:] = 10**9
    assert spells.touch(np.array([0]), 1.0) == -1
    spells.score_all()
    policy._ranking._numbers[0] = 10**9
    spells.score_all()
    exit = PageTable(1, 1).exit(0, 1.0)
    assert exit is not None
    assert spells.give_way(*exit[:2], 1, 1.0, None, False, np.zeros(1, np.int64), 1.0) is None, "the table has no such tier"
    with pytest.raises(TypeError, match="table's loops"):
        spells.give_way(ranked, *exit[1:], np.zeros(1, np.int64), 1.0)  # type: ignore[arg-type]
    assert spells.give_way(*exit, np.zeros(4, np.int64), 1.0) is None
    ranked.pop(np.zeros(4, np.int64))
    ranked.rescored(np.array([1]))


@needs_loops
def test_counts_that_cannot_be_are_refused():
    """Sums of them would be no numbers."""
    policy, page = A2CR(), np.array([0])
    policy.insert(np.array([0, 5]), np.array([ROOT, ROOT]), np.array([0, 0]), 1.0)
    policy.touch(page, 2.0)
    loops = policy._loops
    assert loops is not None
    for column in (policy._guard.state, policy._model.period, policy._counts):
        for cell, held in enumerate(column.tolist()):
            for strange in (2**63 - 1, 2**61 + 1, -(2**63)):
                column[cell] = strange
                state = a2cr_state(policy)
                assert loops.touch(page, 3.0) == -1
                assert loops.insert(page + 1, page, page + 1, page, 3.0) == -1
                assert a2cr_state(policy) == state
            column[cell] = held
    policy._recent[int(policy._counts[0]) - 1] = [0]  # type: ignore[assignment]
    with pytest.raises(TypeError, match="bytes"):
        loops.insert(page + 1, page, page + 1, page, 3.0)
    policy._recent.clear()
    policy.touch(page, 3.0)
    policy.check_integrity()


@needs_loops
def test_what_is_learned_is_what_numpy_learns(monkeypatch):
    learned = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(columns, "loops", lambda: None)
        model, chance = ReuseModel((4, 8, 3)), np.random.default_rng(3)
        for now in range(3000):
            kinds = model.kinds_of(chance.integers(0, 96, 200))
            model.begin(kinds)
            model.end(kinds, np.full(200, model.cohort), chance.integers(0, 40, 200))
            if model.count(200):
                model.turn(float(now))
        assert model.fits > 20
        learned.append(
            [getattr(model, name).tobytes() for name in ("worth", "chance", "_factors", "_hits", "_exposed", "change", "counted")]
        )
    assert learned[0] == learned[1]


def test_logarithms_are_right_to_the_last_bits():
    numbers = np.concatenate((np.exp(np.random.default_rng(4).uniform(-28.0, 28.0, 10_000)), [0.5, np.sqrt(0.5), 1.0, np.sqrt(2.0), 2.0]))
    assert np.all(np.abs(hazards._log(numbers) - np.log(numbers)) <= 2 * np.spacing(np.maximum(np.abs(np.log(numbers)), 0.35)))


@needs_loops
def test_nothing_is_fitted_to_arrays_that_do_not_fit():
    loops = columns.loops()
    assert loops is not None
    kinds, values = 5, 7
    by_kind, by_value, change = np.zeros((kinds, AGES)), np.ones((values, AGES)), np.zeros((kinds, AGES + 1), np.int64)
    hits, alive, features = np.zeros((kinds, AGES), np.int64), np.zeros((4, kinds), np.int64), np.zeros((kinds, 2), np.int64)
    level, firsts, rest = np.full(AGES, 0.1), np.array([0, 3, values]), (0.9, 1.0, 0.1, 1e-9, 0.9)
    room, cohorts, smoothing = (np.zeros((kinds, AGES)), by_value + 0, by_value + 0), np.zeros(4, np.int64), np.ones(7)
    fitting: list[tuple[str, tuple[Any, ...]]] = [
        ("expose", (level[:4].copy(), cohorts, alive, change, hits, by_kind, by_kind.copy(), 3, 9.0)),
        ("learn", (by_kind, by_kind.copy(), room[0], features, firsts, by_value, smoothing, level, *room[1:], *rest)),
        ("appraise", (level, features, by_value, level, by_kind, by_kind.copy(), 9, 0.9, 1e-9, 1e-9)),
    ]
    for name, given in fitting:
        call = getattr(loops, name)
        call(*given)
        wrong: list[tuple[int, Any]] = [
            (place, array.astype(np.float32)) for place, array in enumerate(given) if isinstance(array, np.ndarray)
        ]
        for place, array in enumerate(given):
            if array is features:
                wrong += [(place, other) for other in (features[:-1], features + values, features - 1)]
            elif array is firsts:
                wrong += [(place, other) for other in (firsts[:-1], firsts + values, firsts - 1)]
            elif array is smoothing:
                wrong += [(place, np.ones(count)) for count in (0, AGES + 1)]
            elif isinstance(array, np.ndarray):
                wrong.append((place, array[..., :-1].copy()))
            elif isinstance(array, int):
                wrong += [(place, np.int64(other)) for other in (-1, 2**62)]
        for place, other in wrong:
            with pytest.raises(ValueError, match="fit"):
                call(*given[:place], other, *given[place + 1 :])


@needs_loops
def test_loops_refuse_factors_without_one_for_the_generation_of_a_page_that_continues_none(monkeypatch):
    policy = A2CR()
    monkeypatch.setattr(spells_module, "GENERATION_OF", np.zeros(1, np.int64))
    with pytest.raises(ValueError, match="fit"):
        policy.attach()


@pytest.mark.parametrize("kind", [Ranking, PlainRanking])
def test_many_leaves_that_change_at_once_are_in_order_afterwards(kind):
    """One after the other they would be compared with pages that have not found their place yet."""
    chance = np.random.default_rng(1)
    ranking = kind()
    pages = np.arange(60)
    ranking.arrive(pages, np.full(60, ROOT), np.zeros(60, np.int64))
    ranking.rescored(pages)
    for _ in range(200):
        changed = np.flatnonzero(chance.random(60) < 0.5)
        ranking.withdraw(changed)
        ranking.score[changed] = chance.random(len(changed))
        ranking.rescored(changed)
        ranking.check_integrity()
        assert ranking.first(60, nothing_protected).tolist() == np.lexsort((pages, ranking.score[:60])).tolist()
