"""Host memory of a model that spans sockets: of every page, each node has a range of layers (`host.numa: layers`).

A slot stays one piece of memory, which is what codecs and readers want; only its 4 KiB pages are on different nodes, cut where a page
of memory begins next to where a layer ends. Formats write layer by layer, so that a layer's keys and values are on one node but for the two
pages of memory at its ends. Heads are not apart within a layer's block: a split by heads is a cache per rank (`kvtier numa layout`).

Pages are placed by who touches them first, not by policies: a policy per slot would take more mappings than the kernel allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from kvtier.errors import ConfigError, NumaError
from kvtier.numa.ids import format_ids
from kvtier.numa.kv_layout import balanced_layers
from kvtier.numa.memory import check_nodes, first_touch_parts
from kvtier.numa.placement import PAGE_BYTES, placement
from kvtier.numa.topology import read_topology

_SAMPLED_SLOTS = 64


@dataclass(frozen=True)
class LayerPart:
    """Layers `[first, stop)` of every page, `length` bytes of every slot from byte `start`, on `node`."""

    node: int
    first: int
    stop: int
    start: int
    length: int


class LayerNodes:
    """The parts of `slots` slots of `slot_bytes`, a multiple of the system's page size. `place` is what `Arena` calls before
    memory is touched.

    ConfigError for nodes that cannot be used, formats whose layers are not apart, fewer layers than nodes, and pages of KV so small that a
    node would get no page of memory.
    """

    def __init__(self, nodes: Sequence[int], layer_bytes: Sequence[int], slot_bytes: int, slots: int) -> None:
        topology = read_topology()
        try:
            check_nodes(nodes, topology)
            ranges = balanced_layers(layer_bytes, len(nodes))
        except NumaError as error:
            raise ConfigError(f"host.numa is layers, but {error}; correct host.numa_nodes") from None
        ends = list(accumulate(layer_bytes, initial=0))
        cuts = [0, *(round(ends[stop] / PAGE_BYTES) * PAGE_BYTES for _, stop in ranges[:-1]), slot_bytes]
        if any(low >= high for low, high in pairwise(cuts)):
            raise ConfigError(
                f"host.numa is layers, but a page of KV takes {slot_bytes} bytes, too few to give each of {len(nodes)} nodes a page of "
                f"{PAGE_BYTES}; name fewer nodes, raise pages.page_tokens, or set host.numa to explicit"
            )
        self.parts = tuple(
            LayerPart(node, first, stop, low, high - low)
            for node, (first, stop), (low, high) in zip(nodes, ranges, pairwise(cuts), strict=True)
        )
        for part in self.parts:
            # A node that memory is bound to strictly, and that is full, gets somebody killed.
            if part.length * slots > (room := topology.node(part.node).available_bytes):
                raise ConfigError(
                    f"host.numa is layers, but node {part.node} has {room} bytes left, not {part.length * slots}; lower host.capacity_bytes"
                )
        self._slot_bytes = slot_bytes
        self._slots = 0

    @property
    def worker_nodes(self) -> tuple[int, ...]:
        """Where threads that work on this memory should run."""
        return tuple(part.node for part in self.parts)

    def node_of_layer(self, layer: int) -> int:
        """The node that has a layer of every page."""
        return next(part.node for part in self.parts if part.first <= layer < part.stop)

    def place(self, address: int, length: int) -> None:
        """Take the pages of all slots in `[address, address + length)`. ConfigError if the kernel refuses."""
        self._slots = length // self._slot_bytes
        starts = range(address, address + self._slots * self._slot_bytes, self._slot_bytes)
        try:
            first_touch_parts({part.node: [(start + part.start, part.length) for start in starts] for part in self.parts})
        except (OSError, NumaError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise ConfigError(f"host.numa is layers, but memory cannot be had there: {why}; lower host.capacity_bytes") from None

    def report(self, address: int, length: int) -> dict[str, object]:
        """As `HostNodes.report`; each segment also says which `layers` it has."""
        slots = min(self._slots, length // self._slot_bytes)
        segments = [
            {
                "bytes": part.length * slots,
                "nodes": [part.node],
                "layers": [part.first, part.stop],
                "share_there": self._share_there(part, address, slots),
            }
            for part in self.parts
            if slots
        ]
        words = [f"layers {part.first}-{part.stop - 1} on {format_ids([part.node])}" for part in self.parts]
        return {"numa": "; ".join(words), "numa_segments": segments}

    def _share_there(self, part: LayerPart, address: int, slots: int) -> float | None:
        seen = [slots * index // _SAMPLED_SLOTS for index in range(_SAMPLED_SLOTS)] if slots > _SAMPLED_SLOTS else range(slots)
        try:
            found = [placement(address + slot * self._slot_bytes + part.start, part.length, None) for slot in seen]
        except OSError:  # containers may allow binding, but not looking
            return None
        there = sum(each.on.get(part.node, 0) for each in found)
        return round(there / max(1, sum(each.pages for each in found)), 4)
