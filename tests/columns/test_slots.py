"""Free lists: the compiled loops take and give what Python does, in the same order, and nothing if one slot is wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier import columns
from kvtier.errors import IntegrityError
from kvtier.layout import PageLayout
from kvtier.tiers.device import DevicePool
from tests.columns.rig import needs_loops

SLOTS = 12
LAYOUT = PageLayout(layers=1, planes=1, page_tokens=1, kv_heads=1, head_dim=1)


def pool(native: bool) -> DevicePool:
    made = DevicePool(LAYOUT, SLOTS * LAYOUT.page_bytes)
    assert made._loops is not None
    made._loops = made._loops if native else None
    return made


@needs_loops
@given(st.lists(st.one_of(st.integers(0, SLOTS), st.lists(st.integers(-1, SLOTS), max_size=5)), max_size=30))
def test_pools_with_and_without_loops_stay_the_same_through_any_history(calls):
    ours, plain = pool(native=True), pool(native=False)
    for call in calls:
        if isinstance(call, int):
            assert ours.reserve(call) == plain.reserve(call)
        else:
            errors = []
            for each in (ours, plain):
                try:
                    each.free(call)
                except IntegrityError as error:
                    errors.append(str(error))
            assert len(errors) in (0, 2)
            assert len(set(errors)) < 2
        assert (ours._free, ours._taken) == (plain._free, plain._taken)
        ours.check_integrity()


@needs_loops
def test_loops_refuse_what_is_no_free_list():
    loops = columns.loops()
    assert loops is not None
    for free, taken, count in (([1], bytearray(2), 2), ([1], bytearray(2), -1), ((1,), bytearray(2), 1)):
        with pytest.raises(ValueError, match="slots"):
            loops.take_slots(free, taken, count)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="bytearray"):
        loops.take_slots([1], b"12", 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="list"):
        loops.give_slots([1], bytearray(2), {1})  # type: ignore[arg-type]
    taken = bytearray(b"\1\1\1")
    with pytest.raises(TypeError):
        loops.give_slots([], taken, [0, "1"])  # type: ignore[list-item]
    with pytest.raises(OverflowError):
        loops.give_slots([], taken, [0, 2**70])
    assert not loops.give_slots([], taken, [0, 0])
    assert taken == b"\1\1\1"
    assert loops.take_slots([2, 2**40], taken, 2) == [2**40, 2]
