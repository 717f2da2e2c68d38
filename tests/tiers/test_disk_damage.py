"""Damaged records of the disk tier: refused, whatever was done to them."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.testing.tiers import LAYOUT, get, holds, page_id, payload, put
from kvtier.tiers.base import Refused
from kvtier.tiers.disk.record import HEADER_BYTES
from tests.tiers.disk import RAW, SLOT, flip, open_disk, segment


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A tier with page 1 in slot 0, as (tier, path of its segment)."""
    path = tmp_path_factory.mktemp("damage")
    tier = open_disk(path)
    assert put(tier, [1]) == [0]
    yield tier, segment(path)
    tier.close()


@settings(max_examples=300)
@given(offset=st.one_of(st.integers(0, HEADER_BYTES - 1), st.integers(0, SLOT - 1)), bit=st.integers(0, 7))
def test_law_1_a_flipped_bit_is_refused_and_padding_means_nothing(damaged, offset, bit):
    tier, path = damaged
    flip(path, offset, bit)
    try:
        found = get(tier, 0, page_id(1).key)
        assert isinstance(found, Refused) == (offset < HEADER_BYTES + RAW.payload_bytes(LAYOUT))
        if not isinstance(found, Refused):
            np.testing.assert_array_equal(found, payload(tier, 1))
    finally:
        flip(path, offset, bit)
    assert holds(tier, 0, 1)


@settings(max_examples=60)
@given(length=st.integers(0, SLOT))
def test_law_1_a_truncated_file_is_refused(damaged, length):
    tier, path = damaged
    whole = path.read_bytes()
    os.truncate(path, length)
    try:
        found = get(tier, 0, page_id(1).key)
        assert found == Refused("truncated") if length < SLOT else not isinstance(found, Refused)
    finally:
        path.write_bytes(whole)
    assert holds(tier, 0, 1)


def test_law_1_a_record_moved_to_another_slot_is_refused(tmp_path):
    tier = open_disk(tmp_path)
    first, second = put(tier, [1, 2])
    data = bytearray(segment(tmp_path).read_bytes())
    data[second * SLOT : (second + 1) * SLOT] = data[first * SLOT : (first + 1) * SLOT]
    segment(tmp_path).write_bytes(data)
    assert get(tier, second, page_id(2).key) == Refused("key")
    tier.close()


def test_law_1_a_record_of_another_layout_or_format_is_refused(tmp_path):
    theirs = open_disk(tmp_path / "theirs", layout=replace(LAYOUT, dtype="fp16"))
    ours = open_disk(tmp_path / "ours")
    put(theirs, [1])
    put(ours, [1])
    segment(tmp_path / "ours").write_bytes(segment(tmp_path / "theirs").read_bytes())
    assert get(ours, 0, page_id(1).key) == Refused("format")
    theirs.close()
    ours.close()


def test_deleted_files_give_right_bytes_or_none_and_are_not_found_again(tmp_path):
    tier = open_disk(tmp_path)
    slots = put(tier, [1, 2])
    segment(tmp_path).unlink()
    for number, slot in enumerate(slots, 1):
        assert holds(tier, slot, number) or isinstance(get(tier, slot, page_id(number).key), Refused)
    tier.close()
    again = open_disk(tmp_path)
    assert list(again.recover()) == []
    assert again.bytes_used == 0
    again.close()


def test_refusals_are_counted_by_reason(tmp_path):
    tier = open_disk(tmp_path)
    slots = put(tier, [1])
    get(tier, slots[0], page_id(2).key)
    flip(segment(tmp_path), HEADER_BYTES)
    get(tier, slots[0], page_id(1).key)
    assert tier.counters["refused: key"] == 1
    assert tier.counters["refused: checksum"] == 1
    tier.close()
