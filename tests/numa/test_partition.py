"""Laws checked: assignments are as good as brute force finds where that is possible, and near it where it is not."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvtier.errors import MissingExtra, NumaError
from kvtier.numa import partition
from kvtier.numa.kv_layout import KvPart, Split, balanced_layers, plan_kv, ranges, sequences_to_nodes
from kvtier.numa.partition import Method, assign, layer_chain

try:
    import pymetis  # noqa: F401

    METHODS: tuple[Method, ...] = ("greedy", "metis")
except ImportError:
    METHODS = ("greedy",)


def brute_force(loads, traffic, nodes, balance):
    def objective(node_of):
        cut = sum(weight for (a, b), weight in traffic.items() if node_of[a] != node_of[b])
        return cut + balance * max(sum(load for load, node in zip(loads, node_of, strict=True) if node == n) for n in range(nodes))

    return min(map(objective, product(range(nodes), repeat=len(loads))))


@st.composite
def problems(draw):
    parts = draw(st.integers(1, 6))
    loads = draw(st.lists(st.integers(0, 20), min_size=parts, max_size=parts))
    pairs = [(a, b) for a in range(parts) for b in range(a + 1, parts)]
    traffic = {pair: draw(st.integers(0, 10)) for pair in pairs if draw(st.booleans())}
    return loads, traffic, draw(st.integers(1, 3)), draw(st.sampled_from([0.0, 0.5, 1.0, 3.0]))


@given(problems())
@example(
    ([0] * 5, {(0, 2): 3, (0, 3): 3, (1, 3): 4, (1, 4): 1, (2, 3): 2, (2, 4): 6, (3, 4): 5}, 3, 0.0)
)  # METIS balances what weighs nothing
def test_small_problems_are_solved_as_brute_force_does(problem):
    loads, traffic, nodes, balance = problem
    best = brute_force(loads, traffic, nodes, balance)
    found = assign(loads, traffic, nodes, balance)
    assert found.method == "exact"
    assert found.objective == pytest.approx(best)
    assert found.objective == pytest.approx(found.cut + balance * max(found.loads))
    for method in METHODS:
        other = assign(loads, traffic, nodes, balance, method)
        assert best - 1e-9 <= other.objective <= balance * sum(loads) + 1e-9, "never worse than all on one node"


@pytest.mark.parametrize("method", [None, *METHODS])
def test_a_chain_of_layers_is_cut_as_seldom_as_there_are_nodes(method):
    loads = [1.0] * 64
    found = assign(loads, layer_chain(loads, 0.25), 4, 1.0, method)
    assert found.loads == (16.0,) * 4
    assert found.cut == 3 * 0.25


def test_communities_stay_together():
    traffic = {(a, b): 8.0 if a // 10 == b // 10 else 0.01 for a in range(40) for b in range(a)}
    found = assign([1.0] * 40, traffic, 4)
    assert [len(set(found.node_of[start : start + 10])) for start in range(0, 40, 10)] == [1] * 4
    assert len(set(found.node_of)) == 4


def test_sequences_with_a_common_prefix_go_together():
    assert sequences_to_nodes([100, 100, 100, 100], {(0, 3): 80, (1, 2): 80}, 2) in ((0, 1, 1, 0), (1, 0, 0, 1))


def test_without_metis_the_fallback_serves_and_asking_for_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(partition, "_load_metis", lambda: None)
    loads = [1.0] * 64
    assert assign(loads, layer_chain(loads, 1), 4).method == "greedy"
    with pytest.raises(MissingExtra, match=r"kvtier\[numa\]"):
        assign(loads, {}, 4, method="metis")


def test_what_cannot_be_assigned_is_refused():
    for loads, traffic, nodes, message in (
        ([], {}, 1, "0 parts"),
        ([1], {}, 0, "0 nodes"),
        ([-1], {}, 1, "negative"),
        ([1], {(0, 0): -1}, 1, "negative"),
        ([1, 1], {(0, 2): 1}, 2, "parts 0 to 1"),
    ):
        with pytest.raises(NumaError, match=message):
            assign(loads, traffic, nodes)


def test_kv_is_laid_out_by_layers_heads_or_both():
    sockets = {0: (0, 1), 1: (2, 3)}
    assert plan_kv(32, 8, sockets)[1] == KvPart(1, (8, 16), (0, 8))
    assert plan_kv(32, 8, sockets, "heads")[3] == KvPart(3, (0, 32), (6, 8))
    assert plan_kv(32, 8, sockets, "both") == (
        *(KvPart(node, (0, 16), heads) for node, heads in ((0, (0, 4)), (1, (4, 8)))),
        *(KvPart(node, (16, 32), heads) for node, heads in ((2, (0, 4)), (3, (4, 8)))),
    )
    splits: tuple[Split, ...] = ("layers", "heads", "both")
    for split in splits:
        parts = plan_kv(13, 5, sockets, split)
        cells = [(layer, head) for part in parts for layer in range(*part.layers) for head in range(*part.heads)]
        assert sorted(cells) == [(layer, head) for layer in range(13) for head in range(5)]
        assert sum(part.share(13, 5) for part in parts) == pytest.approx(1)
    with pytest.raises(NumaError, match="3 layers for 4 nodes"):
        plan_kv(3, 8, sockets)
    with pytest.raises(NumaError, match="1 KV heads for 2 nodes"):
        plan_kv(8, 1, sockets, "both")
    with pytest.raises(NumaError, match="none twice"):
        plan_kv(8, 8, {0: (1, 1)})
    assert ranges(7, 3) == [(0, 2), (2, 4), (4, 7)]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 4))
def test_layers_of_different_sizes_are_cut_where_the_largest_range_is_least(sizes, nodes):
    if len(sizes) < nodes:
        with pytest.raises(NumaError):
            balanced_layers(sizes, nodes)
        return
    found = balanced_layers(sizes, nodes)
    assert [layer for first, stop in found for layer in range(first, stop)] == list(range(len(sizes)))
    assert all(first < stop for first, stop in found)
    from itertools import combinations

    best = min(
        max(sum(sizes[a:b]) for a, b in zip((0, *cuts), (*cuts, len(sizes)), strict=True))
        for cuts in combinations(range(1, len(sizes)), nodes - 1)
    )
    assert max(sum(sizes[first:stop]) for first, stop in found) == best
