"""Copies between nodes in chunks of cache size, double-buffered: while one chunk is worked on, the next is on its way.

Point-to-point transfers as in the NUMA models document (16.1.2): large pieces are split, small ones travel together in one chunk, and two
buffers let the way and the work overlap, so that both take as long as the slower (`model.pipelined_seconds`). For memory that is looked at
anyway, such as pages that are verified when they move: it then crosses between the nodes once, and is looked at in the near cache.

A stream's two buffers and the thread that fills them are its own; one caller at a time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from kvtier.errors import NumaError
from kvtier.numa.executor import NodeExecutor
from kvtier.numa.memory import NodeMemory
from kvtier.numa.syscalls import MemoryPolicy, Mode
from kvtier.numa.topology import Topology

_USUAL_CHUNK_BYTES = 1 << 20
_CACHE_SHARE = 8  # of a last-level cache: two buffers, what is made of them, and everybody else


@dataclass(frozen=True)
class Piece:
    """`length` bytes at an address of this process; `tag` is the caller's, and stays with each part of a piece that was split."""

    tag: int
    address: int
    length: int


@dataclass(frozen=True)
class Part:
    """`length` bytes of piece `tag` from its byte `offset`, which are now at `address`."""

    tag: int
    offset: int
    address: int
    length: int


def chunk_bytes(topology: Topology, node: int) -> int:
    """How much to send at once to CPUs of a node: a share of their last-level cache."""
    cpus = set(topology.cpus_nearest(node))
    sizes = [cache.size_bytes for cache in topology.caches if cpus & set(cache.cpus)]
    return max(sizes, default=_CACHE_SHARE * _USUAL_CHUNK_BYTES) // _CACHE_SHARE


def chunked(pieces: Sequence[Piece], limit_bytes: int) -> Iterator[list[Piece]]:
    """The pieces in order in chunks of at most `limit_bytes`: large ones split, small ones together. A piece that would fit a chunk of its
    own is not split. Offsets of split parts follow from their addresses."""
    chunk: list[Piece] = []
    room = limit_bytes
    for piece in pieces:
        done = 0
        if chunk and room < piece.length <= limit_bytes:
            yield chunk
            chunk, room = [], limit_bytes
        while done < piece.length:
            length = min(room, piece.length - done)
            chunk.append(Piece(piece.tag, piece.address + done, length))
            done += length
            room -= length
            if not room:
                yield chunk
                chunk, room = [], limit_bytes
    if chunk:
        yield chunk


class NodeStream:
    """Brings memory from anywhere to `node`, for a caller that works there. `limit_bytes`: of a chunk (default: `chunk_bytes`).

    Also a context manager. NumaError for a node without memory or usable CPUs, and for chunks without bytes.
    """

    def __init__(self, node: int, topology: Topology, limit_bytes: int | None = None) -> None:
        self.limit_bytes = chunk_bytes(topology, node) if limit_bytes is None else limit_bytes
        if self.limit_bytes < 1:
            raise NumaError(f"chunks of {limit_bytes} bytes; expected at least 1")
        self.chunks = 0
        self.bytes = 0
        self._buffers = [NodeMemory(self.limit_bytes, MemoryPolicy(Mode.PREFERRED, (node,))) for _ in range(2)]
        self._filler = NodeExecutor({node: 1}, most_queued=2, name="kvtier-stream")

    def carry(self, pieces: Sequence[Piece], work: Callable[[list[Part]], object]) -> None:
        """Call `work` with the parts of each chunk, in order; they are valid until it returns. What it raises ends the transfer."""
        starts = {piece.tag: piece.address for piece in pieces}
        if len(starts) != len(pieces):
            raise NumaError("two pieces have the same tag; give each its own")
        coming: Future[list[Part]] | None = None
        try:
            for number, chunk in enumerate(chunked(pieces, self.limit_bytes)):
                after = self._filler.submit(self._filler.nodes[0], self._fill, self._buffers[number % 2], chunk, starts)
                if coming is not None:
                    parts, coming = coming.result(), after
                    work(parts)
                coming = after
            if coming is not None:
                work(coming.result())
        finally:
            if coming is not None:
                coming.exception()  # whatever happened: nobody writes into a buffer any more

    def close(self) -> None:
        """Give thread and buffers back. Safe to call twice."""
        self._filler.shutdown()
        for buffer in self._buffers:
            buffer.close()
        self._buffers = []

    def __enter__(self) -> NodeStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fill(self, buffer: NodeMemory, chunk: list[Piece], starts: dict[int, int]) -> list[Part]:
        parts, at = [], buffer.address
        for piece in chunk:
            ctypes.memmove(at, piece.address, piece.length)
            parts.append(Part(piece.tag, piece.address - starts[piece.tag], at, piece.length))
            at += piece.length
        self.chunks += 1
        self.bytes += at - buffer.address
        return parts
