"""The compiled index: what a dict says, through any history, also where keys share their first places."""

from __future__ import annotations

import gc
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier import columns
from kvtier.pages import NO_ROW, PageTable
from tests.columns.rig import needs_loops
from tests.pages.rig import ROOT

KEYS = [number.to_bytes(size, "big") for size in (1, 4, 32) for number in range(40)]
"""Short and long ones, and some that begin alike."""


def index() -> columns.RowIndex:
    loops = columns.loops()
    assert loops is not None
    return loops.Index()


@needs_loops
@given(st.lists(st.tuples(st.sampled_from(KEYS), st.one_of(st.none(), st.integers(0, 2**32 - 1))), max_size=200))
def test_it_is_a_dict(history):
    ours, plain = index(), dict[bytes, int]()
    for key, row in history:
        if row is not None:
            ours[bytes(bytearray(key))] = plain[key] = row  # an equal key, not the same
        elif key in plain:
            del ours[key]
            del plain[key]
        else:
            with pytest.raises(KeyError):
                del ours[key]
        assert (len(ours), ours.get(key), ours.get(key, NO_ROW)) == (len(plain), plain.get(key), plain.get(key, NO_ROW))
        assert (key in ours) == (key in plain)
    assert dict(ours.items()) == plain
    assert len(list(ours.items())) == len(plain)


@needs_loops
def test_it_stays_a_dict_while_it_fills_and_grows_and_empties():
    """Two thirds full, most keys are not in their first place, and every one that goes leaves a gap behind."""
    chance, ours, plain = np.random.default_rng(3), index(), dict[bytes, int]()
    for target in (680, 20, 5000, 0, 5200):
        while len(plain) != target:
            key = int(chance.integers(0, 6000)).to_bytes(32, "big")
            if len(plain) < target:
                ours[key] = plain[key] = int(chance.integers(0, 2**32))
            elif key in plain:
                del ours[key]
                del plain[key]
        assert dict(ours.items()) == plain
        for number in range(6000):
            key = number.to_bytes(32, "big")
            assert ours.get(key) == plain.get(key)


@needs_loops
def test_keys_are_held_as_long_as_they_have_a_row():
    ours, key = index(), bytes(range(32))
    before = sys.getrefcount(key)
    ours[key] = 1
    assert sys.getrefcount(key) == before + 1
    ours[bytes(bytearray(key))] = 2
    assert sys.getrefcount(key) == before + 1
    del ours[key]
    assert sys.getrefcount(key) == before
    ours[key] = 3
    del ours
    assert sys.getrefcount(key) == before


@needs_loops
def test_its_items_can_be_asked_for_while_the_garbage_collector_empties_and_fills_it():
    """New pairs may set it off, and that run anything: of a key that was gone by then whatever had its place was given."""
    ours, other = index(), b"\xff" * 32
    others: list[bytes] = []
    for row in range(600):
        ours[row.to_bytes(32, "big")] = row

    def change(phase: str, _: object) -> None:
        if phase == "stop" and not others:
            for row in range(600):
                del ours[row.to_bytes(32, "big")]
            others.extend(bytes(bytearray(other)) for _ in range(2000))
            for row in range(1000, 5000):
                ours[row.to_bytes(32, "big")] = row

    often = gc.get_threshold()
    gc.callbacks.append(change)
    gc.set_threshold(5)
    try:
        found = list(ours.items())
    finally:
        gc.set_threshold(*often)
        gc.callbacks.remove(change)
    assert others, "the garbage collector ran"
    assert all(key == row.to_bytes(32, "big") for key, row in found)
    assert dict(ours.items()) == {row.to_bytes(32, "big"): row for row in range(1000, 5000)}


@needs_loops
def test_what_is_no_key_and_no_row_is_refused():
    ours = index()
    for strange in ("key", 7, None, bytearray(32)):
        for call in (
            lambda key=strange: ours.get(key),
            lambda key=strange: ours.__setitem__(key, 1),
            lambda key=strange: ours.__delitem__(key),
            lambda key=strange: key in ours,
        ):
            with pytest.raises(TypeError, match="bytes"):
                call()
    for row in (-1, 2**32, 2**80):
        with pytest.raises(OverflowError):
            ours[b"key"] = row
    with pytest.raises(TypeError):
        ours[b"key"] = "1"  # type: ignore[assignment]
    with pytest.raises(TypeError, match="arguments"):
        ours.get()  # type: ignore[call-overload]
    assert len(ours) == 0
    table = PageTable(1, 1)
    assert table.loops is not None
    with pytest.raises(TypeError, match="index"):
        table.loops.find({}, [b"key"], np.zeros(1, np.int64))


@needs_loops
def test_a_chain_that_names_a_page_twice_or_a_known_one_leaves_nothing_behind():
    table = PageTable(1, 1)
    known = [bytes([9]) * 32, *[bytes([number]) * 32 for number in range(60)]]
    table.settle_chain(known[:1], ROOT, 0, NO_ROW, 0, [0])
    loops = table.loops
    assert loops is not None
    for keys in ([*known[1:], known[0]], [*known[1:], known[30]]):
        out = [np.zeros(len(keys), np.int64) for _ in range(3)]
        arguments = (table._row_of, keys, ROOT, 0, NO_ROW, 0, list(range(len(keys))))
        assert not loops.settle_chain(*arguments, *out)
        assert dict(table._row_of.items()) == {known[0]: 0}
    with pytest.raises(TypeError, match="bytes"):
        loops.settle_chain(table._row_of, [known[1], "2"], ROOT, 0, NO_ROW, 0, [1, 2], *[np.zeros(2, np.int64)] * 3)  # type: ignore[list-item]
    assert dict(table._row_of.items()) == {known[0]: 0}
    table.check_integrity()
