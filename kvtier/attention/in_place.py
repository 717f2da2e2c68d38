"""Attention over encoded pages where they are: decoded chunk by chunk, in cache, by the cores of the node that their memory is on.

Each chunk's part goes into memory of its own, whole cache lines of it, because torch's kernels write it without the interpreter's lock and
in parallel. State is the pool's; a format and a layout are values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from time import perf_counter

import torch

from kvtier.attention.partial import Partial, attend, merge, nothing
from kvtier.formats.base import Format, Payload
from kvtier.layout import PageLayout
from kvtier.numa.binding import this_machine
from kvtier.numa.executor import NumaThreadPool, Pending
from kvtier.numa.padded import padded_bytes
from kvtier.numa.transfers import chunk_bytes

_FLOAT_BYTES = 4


@dataclass(frozen=True)
class EncodedPage:
    """A verified payload, and the node that the memory of the layer in question is on (-1: not known)."""

    payload: Payload
    node: int


@dataclass(frozen=True)
class _Chunk:
    payloads: list[Payload]
    room: torch.Tensor
    """`[tokens, heads, head_dim + 1]`: out and lse."""


class AttendingInPlace:
    """One step under way; `result` waits for it."""

    def __init__(self, pending: Pending[float], rooms: Sequence[torch.Tensor], queries: torch.Tensor) -> None:
        self._pending, self._rooms, self._queries = pending, rooms, queries
        self.ended_s = 0.0
        """When the threads were done, by `perf_counter`; known after `result`."""

    def result(self) -> Partial:
        """What all pages together give."""
        self.ended_s = max(self._pending.results(), default=0.0)
        return merge([Partial(room[:, :, :-1], room[:, :, -1]) for room in self._rooms]) if self._rooms else nothing(self._queries)


def make_pool(threads_per_node: int) -> NumaThreadPool:
    """Threads for `begin` on every node that this process may use, each with one torch thread."""
    before = torch.get_num_threads()
    pool = NumaThreadPool(threads_per_node, prepare=_use_one_thread)
    torch.set_num_threads(before)
    return pool


def begin(
    pool: NumaThreadPool,
    format: Format,
    layout: PageLayout,
    layer: int,
    queries: torch.Tensor,
    pages: Sequence[EncodedPage],
    scaling: float | None = None,
) -> AttendingInPlace:
    """Start attending from `queries` `[tokens, heads, head_dim]` to `layer` of these pages, which are full and stand before the queries.

    No gradients flow. The caller may be in torch's inference mode.
    """
    queries = queries.detach().float().cpu()
    tokens, heads, head_dim = queries.shape
    anywhere = cycle(pool.nodes)
    by_node: dict[int, list[Payload]] = {}
    unknown: list[Payload] = []
    for page in pages:
        (unknown if page.node < 0 else by_node.setdefault(page.node, [])).append(page.payload)
    threads = max(1, pool.executor.threads // len(pool.nodes))
    pieces: list[tuple[int, list[Payload]]] = []
    for node, payloads in by_node.items():
        at_once = _pages_at_once(layout, node, -(-len(payloads) // threads))
        pieces += [(node, payloads[start : start + at_once]) for start in range(0, len(payloads), at_once)]
    at_once = _pages_at_once(layout, pool.nodes[0], -(-len(unknown) // pool.executor.threads))
    pieces += [(next(anywhere), unknown[start : start + at_once]) for start in range(0, len(unknown), at_once)]

    stride = padded_bytes(tokens * heads * (head_dim + 1) * _FLOAT_BYTES) // _FLOAT_BYTES
    with torch.inference_mode(mode=False):  # the threads are in no such mode and may not write to tensors that were made in it
        memory = torch.empty(len(pieces), stride)
        rooms = [row[: tokens * heads * (head_dim + 1)].view(tokens, heads, head_dim + 1) for row in memory]
    chunks = [_Chunk(payloads, room) for (_, payloads), room in zip(pieces, rooms, strict=True)]

    def work(chunk: _Chunk) -> float:
        pages_of = format.decode(chunk.payloads, layout, slice(layer, layer + 1))[:, 0]
        keys, values = pages_of[:, 0].flatten(0, 1), pages_of[:, -1].flatten(0, 1)
        part = attend(queries, keys, values, scaling)
        chunk.room[:, :, :-1], chunk.room[:, :, -1] = part.out, part.lse
        return perf_counter()

    return AttendingInPlace(pool.start(work, chunks, [node for node, _ in pieces]), rooms, queries)


def _pages_at_once(layout: PageLayout, node: int, share: int) -> int:
    """As many as fit the node's cache decoded, but no more than one thread's share of them."""
    decoded = layout.planes * layout.page_tokens * layout.kv_heads * layout.head_dim * 2 * _FLOAT_BYTES
    return max(1, min(share, chunk_bytes(this_machine(), node) // decoded))


def _use_one_thread() -> None:
    torch.get_num_threads()  # a first use: without it the default would replace the 1 later
    torch.set_num_threads(1)
