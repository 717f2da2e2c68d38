"""The cuts of a transfer: nothing lost, nothing larger than allowed, pieces that are worth their calls."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvtier.mover.plan import (
    ARRIVAL_BYTES,
    SMALLEST_PIECE_BYTES,
    STRETCH_BYTES,
    layers_per_step,
    pages_per_arrival,
    pages_per_piece,
    pieces,
)

sizes = st.integers(1, 1 << 30)


@given(st.integers(0, 5000), st.integers(1, 300))
def test_pieces_cover_everything_once_in_order_and_evenly(pages, at_once):
    cut = list(pieces(pages, at_once))
    assert [index for piece in cut for index in range(piece.start, piece.stop)] == list(range(pages))
    lengths = [piece.stop - piece.start for piece in cut]
    assert max(lengths, default=0) <= at_once
    assert max(lengths, default=0) - min(lengths, default=0) <= 1


@given(encoded=sizes, page=sizes, cache=sizes, most=st.integers(1, 4096))
def test_a_piece_fits_half_of_the_cache_unless_it_would_not_be_worth_its_calls(encoded, page, cache, most):
    count = pages_per_piece(encoded, page, cache, most)
    assert 1 <= count <= most
    assert count == 1 or 2 * count * (encoded + page) <= cache or (count - 1) * page < SMALLEST_PIECE_BYTES


@given(pages=st.integers(1, 4096), layers=st.integers(1, 200), layer=st.integers(1, 1 << 24))
def test_a_step_is_of_as_few_layers_as_make_a_long_stretch_of_each_page_and_a_piece_worth_its_call(pages, layers, layer):
    count = layers_per_step(pages, layers, layers * layer)

    worthwhile = max(STRETCH_BYTES, SMALLEST_PIECE_BYTES // pages)
    assert 1 <= count <= layers
    assert count == layers or count * layer >= worthwhile
    assert count == 1 or (count - 1) * layer < worthwhile


@given(page=sizes, most=st.integers(1, 4096))
def test_pages_that_arrive_are_decoded_as_soon_as_they_are_worth_a_call(page, most):
    count = pages_per_arrival(page, most)
    assert 1 <= count <= most
    assert count == 1 or (count - 1) * page < ARRIVAL_BYTES
