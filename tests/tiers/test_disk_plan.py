"""The plan of a batch: every copy is carried once, neighbours together, nothing larger than asked."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from kvtier.tiers.disk.plan import LEAST_CHUNK_BYTES, MOST_CHUNK_BYTES, chunk_bytes, plan

SLOT = 8192


@st.composite
def batches(draw):
    """Slots with many neighbours among them, lengths, and the slots of a segment."""
    slots: list[int] = []
    for start, count in draw(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=6)):
        slots += [slot for slot in range(start, start + count) if slot not in slots]
    lengths = draw(st.lists(st.sampled_from([SLOT, SLOT, SLOT, SLOT // 2, 0]), min_size=len(slots), max_size=len(slots)))
    return slots, lengths, draw(st.integers(1, 20))


@given(batch=batches(), most_bytes=st.integers(0, 10 * SLOT))
def test_every_copy_is_carried_once_to_its_own_row(batch, most_bytes):
    slots, lengths, segment_slots = batch
    carried = []
    for run in plan(slots, lengths, SLOT, segment_slots, most_bytes):
        end = run.offset
        for index in range(run.first, run.first + run.count):
            carried.append(index)
            assert run.segment == slots[index] // segment_slots
            assert run.offset + (index - run.first) * SLOT == slots[index] % segment_slots * SLOT == end
            end += lengths[index]
            assert run.alone(index, SLOT, lengths[index]).offset == slots[index] % segment_slots * SLOT
        assert run.length == end - run.offset
        assert run.length <= most_bytes or run.count == 1
    assert carried == [index for index, length in enumerate(lengths) if length]


@given(batch=batches(), most_bytes=st.integers(0, 10 * SLOT))
def test_no_two_neighbouring_ios_could_have_been_one(batch, most_bytes):
    slots, lengths, segment_slots = batch
    runs = plan(slots, lengths, SLOT, segment_slots, most_bytes)
    for one, other in pairwise(runs):
        last = one.first + one.count - 1
        assert (
            other.first != last + 1
            or slots[other.first] != slots[last] + 1
            or slots[other.first] % segment_slots == 0
            or lengths[last] < SLOT
            or one.length + lengths[other.first] > most_bytes
        )


@given(total_bytes=st.integers(0, 1 << 32), depth=st.integers(1, 256))
def test_chunks_keep_the_disk_busy_within_their_bounds(total_bytes, depth):
    chunk = chunk_bytes(total_bytes, depth)
    assert LEAST_CHUNK_BYTES <= chunk <= MOST_CHUNK_BYTES
    assert chunk == LEAST_CHUNK_BYTES or chunk * depth <= total_bytes
