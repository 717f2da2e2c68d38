"""Static balance: which node computes what, so that little crosses between nodes and none has too much (NUMA models document, 16.2.1).

    minimise  sum of the traffic of cut edges  +  balance * the worst node's load

Few parts are assigned exactly; more by METIS, where pymetis is installed (`pip install 'kvtier[numa]'`), and by placing the heaviest first
and then moving and swapping while that helps; the best of what was found counts. Layers in order are a chain of traffic, sequences that
share prefixes a graph. Pure; no state.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

from kvtier.errors import MissingExtra, NumaError

EXACT_STATES = 1 << 18
"""Up to so many assignments are all looked at (those that differ only in names of equal nodes once)."""
_MOST_SWAPPED = 256  # parts of which any two are tried to swap; beyond that the pairs take longer than they are worth
Method = Literal["exact", "metis", "greedy"]
Edges = Mapping[tuple[int, int], float]


@dataclass(frozen=True)
class Assignment:
    """`node_of[i]`: place (0, 1, ...) of the node that part i goes to. `cut`: traffic between nodes; `loads` by node; `objective`: what was
    minimised; `method` that found it."""

    node_of: tuple[int, ...]
    cut: float
    loads: tuple[float, ...]
    objective: float
    method: Method


class _Metis(Protocol):
    def CSRAdjacency(self, *, adj_starts: list[int], adjacent: list[int]) -> object:
        """A graph."""

    def part_graph(self, nparts: int, *, adjacency: object, vweights: list[int], eweights: list[int]) -> tuple[int, list[int]]:
        """Cut weight and the part of each vertex."""


def assign(loads: Sequence[float], traffic: Edges, nodes: int, balance: float = 1.0, method: Method | None = None) -> Assignment:
    """Assign parts of these `loads` (any unit) to `nodes` equal nodes. `traffic[i, j]` passes between parts i and j, in the unit of the
    load times `balance`. `method`: only that one.

    NumaError for what cannot be: no nodes, unknown parts, negative numbers. MissingExtra if METIS is asked for and not installed.
    """
    _check(loads, traffic, nodes, balance)
    edges = _merged(traffic)
    problem = _Problem(tuple(loads), edges, nodes, balance)
    if method == "exact" or (method is None and _states(len(loads), nodes) <= EXACT_STATES):
        return problem.judged(_exact(problem), "exact")
    if method == "greedy":
        return problem.judged(_refined(problem, _greedy(problem)), "greedy")
    metis = _load_metis()
    if metis is None and method == "metis":
        raise MissingExtra("METIS is not installed; `pip install 'kvtier[numa]'` gives pymetis, or leave the method open")
    found = [problem.judged(_refined(problem, _by_metis(problem, metis)), "metis")] if metis is not None else []
    if method is None:
        found.append(problem.judged(_refined(problem, _greedy(problem)), "greedy"))
    return min(found, key=lambda each: each.objective)


def layer_chain(layer_loads: Sequence[float], activation_traffic: float) -> Edges:
    """The traffic of layers that follow each other."""
    return {(layer, layer + 1): activation_traffic for layer in range(len(layer_loads) - 1)}


class _Problem:
    def __init__(self, loads: tuple[float, ...], edges: Edges, nodes: int, balance: float) -> None:
        self.loads, self.edges, self.nodes, self.balance = loads, edges, nodes, balance
        self.near: list[dict[int, float]] = [{} for _ in loads]
        for (one, other), weight in edges.items():
            self.near[one][other] = self.near[other][one] = weight

    def judged(self, node_of: Sequence[int], method: Method) -> Assignment:
        cut = sum(weight for (one, other), weight in self.edges.items() if node_of[one] != node_of[other])
        totals = self.totals(node_of)
        return Assignment(tuple(node_of), cut, tuple(totals), cut + self.balance * max(totals), method)

    def totals(self, node_of: Sequence[int]) -> list[float]:
        totals = [0.0] * self.nodes
        for part, node in enumerate(node_of):
            totals[node] += self.loads[part]
        return totals


def _exact(problem: _Problem) -> list[int]:
    """Branch and bound: parts in order, each on a node in use or on the first that is not (nodes are equal)."""
    best: list[int] = []
    bound = float("inf")
    chosen: list[int] = []
    totals = [0.0] * problem.nodes

    def go(cut: float, used: int) -> None:
        nonlocal best, bound
        part = len(chosen)
        if cut + problem.balance * max(totals) >= bound:
            return
        if part == len(problem.loads):
            best, bound = chosen.copy(), cut + problem.balance * max(totals)
            return
        for node in range(min(used + 1, problem.nodes)):
            more = sum(weight for other, weight in problem.near[part].items() if other < part and chosen[other] != node)
            chosen.append(node)
            totals[node] += problem.loads[part]
            go(cut + more, max(used, node + 1))
            totals[node] -= problem.loads[part]
            chosen.pop()

    go(0.0, 0)
    return best


def _greedy(problem: _Problem) -> list[int]:
    """The heaviest parts first, each where the objective grows least."""
    node_of: dict[int, int] = {}
    totals = [0.0] * problem.nodes
    for part in sorted(range(len(problem.loads)), key=lambda each: (-problem.loads[each], each)):

        def grows(node: int, part: int = part) -> tuple[float, float]:
            cut = sum(weight for other, weight in problem.near[part].items() if node_of.get(other, node) != node)
            after = totals[node] + problem.loads[part]
            return cut + problem.balance * max(0.0, after - max(totals)), after

        node = min(range(problem.nodes), key=grows)
        node_of[part] = node
        totals[node] += problem.loads[part]
    return [node_of[part] for part in range(len(problem.loads))]


def _refined(problem: _Problem, node_of: list[int]) -> list[int]:
    """Move single parts, or swap two, while that makes it better; from contiguous blocks too, which suits chains, and from one node alone,
    which nothing may be worse than."""
    parts = len(node_of)
    blocks = [part * problem.nodes // parts for part in range(parts)]
    starts = (node_of, blocks, [0] * parts)
    return min((_descended(problem, start) for start in starts), key=lambda each: problem.judged(each, "greedy").objective)


def _descended(problem: _Problem, start: Sequence[int]) -> list[int]:
    node_of = list(start)
    now = problem.judged(node_of, "greedy").objective
    totals = problem.totals(node_of)

    def cut_change(part: int, to: int) -> float:
        here = node_of[part]
        return sum(weight * ((node_of[other] != to) - (node_of[other] != here)) for other, weight in problem.near[part].items())

    improved = True
    while improved:
        improved = False
        for part in range(len(node_of)):
            for to in range(problem.nodes):
                here, load = node_of[part], problem.loads[part]
                if to == here:
                    continue
                worst, moved = max(totals), totals.copy()
                moved[here] -= load
                moved[to] += load
                change = cut_change(part, to) + problem.balance * (max(moved) - worst)
                if change < -1e-12 * max(1.0, abs(now)):
                    node_of[part], totals, now, improved = to, moved, now + change, True
        for one in range(len(node_of) if len(node_of) <= _MOST_SWAPPED else 0):
            for other in range(one + 1, len(node_of)):
                here, there = node_of[one], node_of[other]
                if here == there:
                    continue
                worst, moved = max(totals), totals.copy()
                moved[here] += problem.loads[other] - problem.loads[one]
                moved[there] += problem.loads[one] - problem.loads[other]
                change = cut_change(one, there) + cut_change(other, here) + 2 * problem.near[one].get(other, 0.0)
                change += problem.balance * (max(moved) - worst)
                if change < -1e-12 * max(1.0, abs(now)):
                    node_of[one], node_of[other], totals, now, improved = there, here, moved, now + change, True
    return node_of


def _by_metis(problem: _Problem, metis: _Metis) -> list[int]:
    """METIS minimises the cut at balanced loads, in whole numbers: weights are scaled to a million."""
    if problem.nodes == 1 or len(problem.loads) == 1:
        return [0] * len(problem.loads)
    heaviest, busiest = max(problem.loads) or 1.0, max(problem.edges.values(), default=1.0) or 1.0
    starts, neighbours, weights = [0], [], []
    for near in problem.near:
        for other, weight in sorted(near.items()):
            neighbours.append(other)
            weights.append(max(1, round(weight / busiest * 1e6)))
        starts.append(len(neighbours))
    sizes = [max(1, round(load / heaviest * 1e6)) for load in problem.loads]
    graph = metis.CSRAdjacency(adj_starts=starts, adjacent=neighbours)
    _, node_of = metis.part_graph(problem.nodes, adjacency=graph, vweights=sizes, eweights=weights)
    return list(node_of)


def _load_metis() -> _Metis | None:
    try:
        return cast(_Metis, importlib.import_module("pymetis"))
    except ImportError:
        return None


def _states(parts: int, nodes: int) -> int:
    """Assignments of parts to equal nodes at most."""
    count = 1
    for part in range(parts):
        count *= min(part + 1, nodes)
        if count > EXACT_STATES:
            break
    return count


def _merged(traffic: Edges) -> dict[tuple[int, int], float]:
    merged: dict[tuple[int, int], float] = {}
    for (one, other), weight in traffic.items():
        if one != other:
            pair = (min(one, other), max(one, other))
            merged[pair] = merged.get(pair, 0.0) + weight
    return merged


def _check(loads: Sequence[float], traffic: Edges, nodes: int, balance: float) -> None:
    if nodes < 1 or not loads:
        raise NumaError(f"{len(loads)} parts for {nodes} nodes; expected at least one of each")
    if min(loads) < 0 or balance < 0 or any(weight < 0 for weight in traffic.values()):
        raise NumaError("loads, traffic and balance must not be negative")
    for pair in traffic:
        if not all(0 <= part < len(loads) for part in pair):
            raise NumaError(f"traffic between parts {pair[0]} and {pair[1]}, but there are parts 0 to {len(loads) - 1}")
