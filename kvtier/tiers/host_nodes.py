"""Which NUMA nodes the host tier's memory is on: chosen, bound before anybody touches it, touched by threads of the right node, looked at.

The arena stays one piece; parts of it are bound to different nodes. `auto` puts it on the node of the device that pages come from and go
to, and what does not fit there on the next nearest; it changes nothing where there is one node, or no device whose node is known.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from kvtier.errors import ConfigError, NumaError
from kvtier.numa.allowed import Allowed, read_allowed
from kvtier.numa.devices import choose_device, find_devices
from kvtier.numa.ids import format_ids
from kvtier.numa.memory import bind_memory, check_nodes, first_touch
from kvtier.numa.placement import placement
from kvtier.numa.syscalls import MemoryPolicy, Mode
from kvtier.numa.topology import UNKNOWN_NODE, Topology, read_topology

NumaMode = Literal["off", "auto", "interleave", "explicit", "layers"]
_STEP_BYTES = 2 << 20  # a huge page is on one node
_SHARE = 0.9  # of a node's free memory: the rest is for everybody else there
_SAMPLES = 512
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Segment:
    """`length` bytes of the arena from `start`, bound by `policy`."""

    start: int
    length: int
    policy: MemoryPolicy


@dataclass
class HostNodes:
    """The segments of one arena, or `why` there are none. `place` is what `Arena` calls before memory is touched."""

    mode: NumaMode
    segments: list[Segment]
    why: str
    bound: bool = field(default=False, init=False)

    @property
    def worker_nodes(self) -> tuple[int, ...]:
        """Where threads that work on this memory should run: the nearest node, or all that were named; none where nothing is bound."""
        if not self.bound or self.mode == "interleave":
            return ()
        nodes = tuple(dict.fromkeys(segment.policy.nodes[0] for segment in self.segments))
        return nodes[:1] if self.mode == "auto" else nodes

    def node_at(self, offset: int) -> int:
        """The node that byte `offset` is bound to; -1 where that is not one node."""
        if not self.bound or self.mode == "interleave":
            return UNKNOWN_NODE
        index = bisect_right([segment.start for segment in self.segments], offset) - 1
        return self.segments[index].policy.nodes[0]

    def place(self, address: int, length: int) -> None:
        """Bind the segments and take their pages. ConfigError for explicit nodes that refuse; otherwise done without, with a log line."""
        self.bound = False
        for segment in self.segments:
            try:
                bind_memory(address + segment.start, self._size(segment, length), segment.policy)
            except (OSError, NumaError) as error:
                why = error.strerror if isinstance(error, OSError) else str(error)
                if self.mode != "auto":
                    raise ConfigError(
                        f"host.numa is {self.mode}, but memory cannot be bound to nodes {format_ids(segment.policy.nodes)}: {why}; "
                        "allow mbind (CAP_SYS_NICE in containers), or set host.numa to auto or off"
                    ) from None
                self.why = f"memory cannot be bound: {why}"
                _log.warning("host tier: %s; it is where it is touched first", self.why)
                return
        self.bound = bool(self.segments)
        for segment in self.segments:
            try:
                first_touch(address + segment.start, self._size(segment, length), segment.policy.nodes)
            except NumaError as error:  # no CPU near it is in the cpuset: others touch it, it lands where it is bound all the same
                _log.info("host tier: %s", error)

    def report(self, address: int, length: int) -> dict[str, object]:
        """`numa` in words, and `numa_segments`: bytes, nodes wanted, share of the pages looked at that is there (None: not told)."""
        if not self.bound:
            return {"numa": f"not bound: {self.why}", "numa_segments": []}
        parts = [
            {
                "bytes": segment.length,
                "nodes": list(segment.policy.nodes),
                "share_there": _share_there(address + segment.start, min(segment.length, length - segment.start), segment.policy.nodes),
            }
            for segment in self.segments
            if length
        ]
        words = [f"{segment.length} bytes on {format_ids(segment.policy.nodes)}" for segment in self.segments]
        return {"numa": "; ".join(words), "numa_segments": parts}

    def _size(self, segment: Segment, length: int) -> int:
        """Bytes of a segment in a mapping of `length`, which is rounded up to whole pages: the last segment takes those."""
        return length - segment.start if segment is self.segments[-1] else segment.length


def choose_nodes(mode: NumaMode, nodes: Sequence[int], device: str, size_bytes: int) -> HostNodes:
    """Nodes for `size_bytes` of host memory on this machine. `nodes` belong to explicit, which splits evenly between them. `device` is a
    torch device such as "cuda:0" or "cpu". ConfigError for explicit nodes that cannot be used."""
    if mode == "off":
        return HostNodes(mode, [], "host.numa is off")
    try:
        topology = read_topology()
        allowed = read_allowed(topology)
        if mode == "explicit":
            check_nodes(nodes, topology)
            _check_room(nodes, size_bytes, topology)
    except NumaError as error:
        if mode == "auto":
            return HostNodes(mode, [], str(error))
        raise ConfigError(f"host.numa is {mode}, but {error}; correct host.numa_nodes, or set host.numa to auto") from None
    segments, why = plan_segments(mode, nodes, _node_of(device, topology), size_bytes, topology, allowed)
    return HostNodes(mode, segments, why)


def plan_segments(
    mode: NumaMode, nodes: Sequence[int], near: int, size_bytes: int, topology: Topology, allowed: Allowed
) -> tuple[list[Segment], str]:
    """The segments, or why there are none. `near`: the device's node, -1 if unknown."""
    usable = sorted(allowed.nodes)
    if mode == "explicit":
        each = -(-size_bytes // len(nodes) // _STEP_BYTES) * _STEP_BYTES
        return _segments([(node, each) for node in nodes], size_bytes, Mode.BIND), ""
    if len(usable) < 2:
        return [], "there is one node only"
    if mode == "interleave":
        return [Segment(0, size_bytes, MemoryPolicy(Mode.INTERLEAVE, tuple(usable)))], ""
    if near == UNKNOWN_NODE:
        return [], "there is no device whose node is known"
    by_distance = topology.nearest(near, usable)
    # A preferred node that is full of file caches keeps them, and the kernel goes on to the next nearest: free memory is what counts.
    room = [(node, int(topology.node(node).free_bytes * _SHARE) // _STEP_BYTES * _STEP_BYTES) for node in by_distance]
    return _segments(room, size_bytes, Mode.PREFERRED), ""


def _segments(room: Sequence[tuple[int, int]], size_bytes: int, mode: Mode) -> list[Segment]:
    """The nodes in turn, each with at most its room; what no node has room for stays with the first, whose policy says what happens."""
    segments: list[Segment] = []
    start = 0
    for node, most in room:
        length = min(most, size_bytes - start)
        if length > 0:
            segments.append(Segment(start, length, MemoryPolicy(mode, (node,))))
            start += length
    if start < size_bytes:
        segments.append(Segment(start, size_bytes - start, MemoryPolicy(mode, (room[0][0],))))
    return segments


def _share_there(address: int, length: int, nodes: Sequence[int]) -> float | None:
    try:
        return round(placement(address, length, _SAMPLES).share_on(nodes), 4)
    except OSError:  # containers may allow binding, but not looking
        return None


def _check_room(nodes: Sequence[int], size_bytes: int, topology: Topology) -> None:
    """A node that memory is bound to strictly, and that is full, gets somebody killed."""
    for node in set(nodes):
        wanted = size_bytes * list(nodes).count(node) // len(nodes)
        room = topology.node(node).available_bytes
        if wanted > room:
            raise NumaError(f"node {node} has {room} bytes left, not {wanted}")


def _node_of(device: str, topology: Topology) -> int:
    if device.partition(":")[0] == "cpu":
        return UNKNOWN_NODE
    try:
        return choose_device(find_devices(topology), device if ":" in device else f"{device}:0").node
    except NumaError as error:
        _log.info("host tier: %s", error)
        return UNKNOWN_NODE
