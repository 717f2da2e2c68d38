"""Laws checked: what is carried in chunks arrives whole and in order, whatever the sizes; failures leave nobody writing into a buffer."""

from __future__ import annotations

import ctypes
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import NumaError
from kvtier.numa.binding import this_machine
from kvtier.numa.executor import usable_nodes
from kvtier.numa.transfers import NodeStream, Piece, chunk_bytes, chunked

NODE = usable_nodes(this_machine())[0]


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 40))
def test_chunks_hold_everything_once_and_split_only_what_must_be(lengths, limit):
    pieces = [Piece(tag, 1000 * tag, length) for tag, length in enumerate(lengths)]
    chunks = list(chunked(pieces, limit))
    assert all(0 < sum(part.length for part in chunk) <= limit for chunk in chunks)
    seen = [(part.tag, part.address + offset) for chunk in chunks for part in chunk for offset in range(part.length)]
    assert seen == [(piece.tag, piece.address + offset) for piece in pieces for offset in range(piece.length)]
    for piece in pieces:
        if 0 < piece.length <= limit:
            assert sum(part.tag == piece.tag for chunk in chunks for part in chunk) == 1, "small ones travel whole"
    assert len(chunks) <= 2 * sum(lengths) / limit + 1, "and together"


@pytest.mark.parametrize("limit", [7, 64, 1 << 20])
def test_everything_arrives_in_order(limit):
    sources = [
        ctypes.create_string_buffer(bytes((tag * 31 + place) % 251 for place in range(size))) for tag, size in enumerate((5, 300, 1, 64))
    ]
    pieces = [Piece(tag, ctypes.addressof(source), len(source)) for tag, source in enumerate(sources)]
    got = {tag: bytearray(len(source)) for tag, source in enumerate(sources)}

    def work(parts) -> None:
        for part in parts:
            got[part.tag][part.offset : part.offset + part.length] = ctypes.string_at(part.address, part.length)

    with NodeStream(NODE, this_machine(), limit) as stream:
        stream.carry(pieces, work)
        assert {tag: bytes(data) for tag, data in got.items()} == {tag: source.raw for tag, source in enumerate(sources)}
        assert stream.bytes == sum(map(len, sources))
        stream.carry([], work)


def test_a_failing_worker_ends_the_transfer_and_the_next_one_works():
    source = ctypes.create_string_buffer(1000)
    pieces = [Piece(0, ctypes.addressof(source), 1000)]

    def broken(parts) -> None:
        raise ValueError("bad page")

    with NodeStream(NODE, this_machine(), 100) as stream:
        with pytest.raises(ValueError, match="bad page"):
            stream.carry(pieces, broken)
        seen: list[int] = []
        stream.carry(pieces, lambda parts: seen.extend(part.length for part in parts))
        assert sum(seen) == 1000
    stream.close()


def test_after_a_failure_nobody_reads_the_source_any_more(monkeypatch):
    source = ctypes.create_string_buffer(1000)
    ended: list[bool] = []

    def broken(parts) -> None:
        raise ValueError("bad page")

    with NodeStream(NODE, this_machine(), 100) as stream:
        inner = stream._fill

        def slow(*arguments):
            parts = inner(*arguments)
            time.sleep(0.2)
            ended.append(True)
            return parts

        monkeypatch.setattr(stream, "_fill", slow)
        with pytest.raises(ValueError, match="bad page"):
            stream.carry([Piece(0, ctypes.addressof(source), 1000)], broken)
        assert len(ended) == 2, "the chunk that was under way has ended"


def test_bad_pieces_and_nodes_are_refused():
    with pytest.raises(NumaError, match="no NUMA node 777"):
        NodeStream(777, this_machine())
    with pytest.raises(NumaError, match="chunks of 0 bytes"):
        NodeStream(NODE, this_machine(), 0)
    with NodeStream(NODE, this_machine(), 64) as stream, pytest.raises(NumaError, match="same tag"):
        stream.carry([Piece(1, 0, 0), Piece(1, 0, 0)], len)
    assert chunk_bytes(this_machine(), NODE) > 0
