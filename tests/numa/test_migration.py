"""Laws checked: pages go where they are used, by the score of the source; nothing ping-pongs, moves find room, and cost what they must."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import NumaError
from kvtier.numa.migration import AccessHistory, MigrationRule, farness
from kvtier.numa.topology import read_topology
from tests.numa.machines import A3, build

RULE = MigrationRule()
NO_IDLE: dict[int, list[int]] = {}


def near(source, target):
    return 10 if source == target else 20


def planned(rule, history, where, room, now=0.0, idle=NO_IDLE, distance=near):
    moves = rule.plan(history, where.get, room, idle, distance, now)
    free = dict(room)
    for move in moves:  # whoever carries them out in this order finds a place each time
        assert where[move.page] == move.source
        assert free[move.target] > 0
        free[move.target] -= 1
        free[move.source] += 1
        where[move.page] = move.target
    return [(move.page, move.source, move.target) for move in moves]


def test_the_score_is_that_of_the_source():
    rule = MigrationRule(local_weight=2, remote_weight=3, cost_weight=5)
    accesses = {0: 7.0, 1: 11.0}
    assert rule.score(accesses, 0, 0, near) == 2 * 7 - 3 * 11
    assert rule.score(accesses, 1, 0, near) == 2 * 11 - 3 * 7 - 5 * 2
    assert (farness(10), farness(20), farness(35)) == (0, 1, 2.5)


def test_a_page_goes_where_it_is_used_if_it_gains_more_than_theta():
    for accesses, moves in ((2, []), (3, [(5, 0, 1)])):  # twice the accesses, less 2 for the way, against 2
        history = AccessHistory(RULE)
        history.record(5, 1, 0.0, accesses)
        assert planned(RULE, history, {5: 0}, {0: 4, 1: 4}) == moves


def test_of_two_remote_nodes_the_nearer_one_may_do(tmp_path):
    topology = read_topology(build(tmp_path, A3))
    history = AccessHistory(RULE)
    history.record(5, 0, 0.0, 10)
    assert planned(RULE, history, {5: 7}, {1: 1, 7: 0}, distance=topology.distance) == [(5, 7, 1)]


def test_a_full_node_exchanges_with_who_needs_it_least_and_only_if_the_pair_gains():
    history = AccessHistory(RULE)
    history.record(1, 1, 0.0, 20)
    history.record(2, 1, 0.0, 19)
    history.record(3, 1, 0.0, 5)
    assert planned(RULE, history, {1: 0, 2: 1, 3: 1}, {0: 1, 1: 0}) == [(3, 1, 0), (1, 0, 1)]
    assert planned(RULE, history, {1: 0, 2: 1}, {0: 1, 1: 0}) == []
    assert planned(RULE, history, {1: 0, 2: 1, 9: 1}, {0: 1, 1: 0}, idle={1: [9]}) == [(9, 1, 0), (1, 0, 1)]
    assert planned(RULE, history, {1: 0, 9: 1}, {0: 0, 1: 0}, idle={1: [9]}) == [], "an exchange takes one free place"


def test_a_batch_is_bounded_and_takes_the_largest_gains():
    rule = MigrationRule(batch_pages=2)
    history = AccessHistory(rule)
    for page in range(5):
        history.record(page, 1, 0.0, 10 + page)
    assert planned(rule, history, dict.fromkeys(range(5), 0), {0: 0, 1: 9}) == [(4, 0, 1), (3, 0, 1)]


@given(st.lists(st.tuples(st.floats(0.01, 5), st.integers(1, 40)), min_size=4, max_size=300))
def test_nothing_ping_pongs_when_two_nodes_take_turns(turns):
    """Each turn, one of two nodes accesses the page a number of times, then the other: the moves are bounded by the doubling rests."""
    history, where, now, moves = AccessHistory(RULE), {1: 0}, 0.0, 0
    for turn, (pause, accesses) in enumerate(turns):
        now += pause
        history.record(1, turn % 2, now, accesses)
        done = planned(RULE, history, where, {0: 1, 1: 1}, now)
        for page, _, _ in done:
            history.moved(page, now)
        moves += len(done)
    assert moves <= 1 + math.log2(now / RULE.rest_s + 1)


def test_nodes_that_take_long_turns_are_followed_less_and_less():
    history, where, moves = AccessHistory(RULE), {1: 0}, 0
    for turn in range(64):
        now = (turn + 1) * (RULE.rest_s + 1)
        history.record(1, turn % 2, now, 1000 * 2**turn)
        for page, _, _ in planned(RULE, history, where, {0: 1, 1: 1}, now):
            history.moved(page, now)
            moves += 1
    assert 1 < moves <= 1 + math.log2(now / RULE.rest_s + 1)


@given(st.floats(0.001, 10), st.integers(2, 400))
def test_strictly_alternating_accesses_never_move_anything(pause, turns):
    history = AccessHistory(RULE)
    for turn in range(turns):
        history.record(1, turn % 2, turn * pause)
        assert planned(RULE, history, {1: 0}, {0: 1, 1: 1}, turn * pause) == []


@given(st.data())
def test_any_plan_finds_room_and_moves_no_page_twice(data):
    nodes = data.draw(st.integers(2, 4))
    pages = data.draw(st.integers(1, 20))
    where = {page: data.draw(st.integers(0, nodes - 1)) for page in range(pages)}
    history = AccessHistory(RULE)
    for page in range(0, pages, 2):
        history.record(page, data.draw(st.integers(0, nodes - 1)), 0.0, data.draw(st.integers(0, 20)))
    room = {node: data.draw(st.integers(0, 2)) for node in range(nodes)}
    idle = {node: [page for page in range(1, pages, 2) if where[page] == node] for node in range(nodes)}
    moves = planned(RULE, history, where, room, idle=idle)
    assert len({page for page, _, _ in moves}) == len(moves) <= RULE.batch_pages


def test_accesses_fade_and_what_faded_is_forgotten():
    history = AccessHistory(RULE, most_pages=2)
    history.record(1, 0, 0.0, 8)
    assert history.accesses(1, RULE.half_life_s) == {0: 4.0}
    history.record(1, 0, RULE.half_life_s, 1)
    assert history.accesses(1, RULE.half_life_s) == {0: 5.0}
    history.record(2, 0, 100.0)
    history.record(3, 0, 100.0)
    assert history.pages() == [2, 3]
    history.fade(100 + 20 * RULE.half_life_s)
    assert len(history) == 0
    history.record(4, 0, 0.0)
    history.moved(4, 0.0, to_page=5)
    assert history.rests(5, 1.0)
    assert 4 not in history
    history.forget(5)
    assert 5 not in history


def test_rules_that_would_never_rest_are_refused():
    with pytest.raises(NumaError, match="must not be negative"):
        MigrationRule(remote_weight=-1)
    for wrong in ({"threshold": 0}, {"half_life_s": 0}, {"rest_s": 0}, {"batch_pages": 0}):
        with pytest.raises(NumaError, match="must be above 0"):
            MigrationRule(**wrong)
