"""Which layers and heads of a model's KV belong to which node when the model spans sockets (NUMA models document, 16.3.3).

`layers`: each node has a range of layers, whole pages are cut where one layer ends; for pipelines, and for models whose layers run on the
cores of several sockets. `heads`: each node has a range of heads of all layers, for tensor parallelism: one rank per node, each with a
cache of its own heads. `both`: sockets share the layers, the nodes of a socket the heads. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kvtier.errors import NumaError
from kvtier.numa.partition import assign

Split = Literal["layers", "heads", "both"]


@dataclass(frozen=True)
class KvPart:
    """What `node` has: layers and KV heads, each from the first up to and without the last."""

    node: int
    layers: tuple[int, int]
    heads: tuple[int, int]

    def share(self, layers: int, heads: int) -> float:
        """Of the model's KV."""
        return (self.layers[1] - self.layers[0]) * (self.heads[1] - self.heads[0]) / (layers * heads)


def plan_kv(layers: int, kv_heads: int, sockets: Mapping[int, Sequence[int]], split: Split = "layers") -> tuple[KvPart, ...]:
    """The parts of a model of `layers` layers with `kv_heads` KV heads each, over the nodes of these sockets, in their order.

    NumaError if there are fewer layers or heads than nodes that share them.
    """
    nodes = [node for members in sockets.values() for node in members]
    if not nodes or len(set(nodes)) != len(nodes):
        raise NumaError(f"nodes {nodes}: expected at least one, none twice")
    whole_layers, whole_heads = (0, layers), (0, kv_heads)
    if split == "layers":
        return tuple(KvPart(node, part, whole_heads) for node, part in zip(nodes, ranges(layers, len(nodes), "layers"), strict=True))
    if split == "heads":
        return tuple(KvPart(node, whole_layers, part) for node, part in zip(nodes, ranges(kv_heads, len(nodes), "KV heads"), strict=True))
    parts = []
    for members, part in zip(sockets.values(), ranges(layers, len(sockets), "layers"), strict=True):
        parts += [KvPart(node, part, heads) for node, heads in zip(members, ranges(kv_heads, len(members), "KV heads"), strict=True)]
    return tuple(parts)


def ranges(count: int, shares: int, what: str = "things") -> list[tuple[int, int]]:
    """0 to `count` in `shares` ranges whose sizes differ by at most one. NumaError if there are fewer than shares."""
    if count < shares:
        raise NumaError(f"{count} {what} for {shares} nodes; name fewer nodes")
    return [(count * share // shares, count * (share + 1) // shares) for share in range(shares)]


def balanced_layers(layer_bytes: Sequence[float], nodes: int) -> list[tuple[int, int]]:
    """Contiguous ranges of layers of different sizes, one per node, none larger than it must be. NumaError for fewer layers than nodes."""
    if len(layer_bytes) < nodes:
        raise NumaError(f"{len(layer_bytes)} layers for {nodes} nodes; name fewer nodes")
    # Least limit that `nodes` ranges can keep; sums of neighbouring layers are the only candidates.
    sums = [0.0]
    for size in layer_bytes:
        sums.append(sums[-1] + size)
    low, high = max(layer_bytes), sums[-1]
    candidates = sorted({sums[b] - sums[a] for a in range(len(sums)) for b in range(a + 1, len(sums)) if low <= sums[b] - sums[a] <= high})
    for limit in candidates:
        found = _within(sums, limit, nodes)
        if found is not None:
            return found
    raise NumaError(f"no {nodes} ranges of {len(layer_bytes)} layers")


def _within(sums: Sequence[float], limit: float, nodes: int) -> list[tuple[int, int]] | None:
    """Ranges of at most `limit` each, at least one layer in every one; None if that takes more than `nodes`."""
    found, start, layers = [], 0, len(sums) - 1
    for node in range(nodes):
        most = layers - (nodes - node - 1)
        stop = start + 1
        while stop < most and sums[stop + 1] - sums[start] <= limit:
            stop += 1
        found.append((start, stop))
        start = stop
    return found if start == layers and all(sums[stop] - sums[first] <= limit for first, stop in found) else None


def sequences_to_nodes(tokens: Sequence[int], shared_tokens: Mapping[tuple[int, int], int], nodes: int) -> tuple[int, ...]:
    """Which node each sequence's KV should be on: `tokens` of each are its load, `shared_tokens[i, j]` a common prefix that would be read
    across, or kept twice, if i and j are apart."""
    return assign([float(count) for count in tokens], {pair: float(count) for pair, count in shared_tokens.items()}, nodes).node_of
