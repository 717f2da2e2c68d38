"""Storing ahead: records are written while the caller makes the next ones, in memory that is bounded, and each is said for itself."""

from __future__ import annotations

import errno
import os
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import IntegrityError
from kvtier.testing.tiers import holds, page_id, payload, put
from kvtier.tiers.base import Refused
from kvtier.tiers.disk.plan import records_at_once
from tests.tiers.disk import SLOT, image_of, open_disk
from tests.tiers.faults import FaultyEngine, GatedEngine


@pytest.fixture
def gated(tmp_path, monkeypatch):
    """A store of two records a half, whose engine waits before each write."""
    monkeypatch.setattr("kvtier.tiers.disk.writer._SCRATCH_BYTES", 4 * SLOT)
    engine = GatedEngine()
    tier = open_disk(tmp_path / "store", engine=engine)
    yield tier, engine
    engine.gate.set()
    tier.close()


def begin(tier, numbers, slots=None):
    """Begin to store pages in memory that is then overwritten; (slots, what waits for the end)."""
    slots = slots or tier.reserve(len(numbers))
    payloads = [payload(tier, number).copy() for number in numbers]
    finish = tier.begin_store(slots, [page_id(number) for number in numbers], payloads)
    for data in payloads:
        data[:] = 0xEE
    return slots, finish


@given(slot=st.integers(1, 1 << 32), scratch=st.integers(0, 1 << 32))
def test_two_halves_are_never_more_than_the_scratch_unless_it_holds_no_two_records(slot, scratch):
    count = records_at_once(slot, scratch)
    assert count >= 1
    assert count == 1 or 2 * count * slot <= scratch
    assert 2 * (count + 1) * slot > scratch


def test_the_next_records_are_composed_while_the_first_are_written_and_no_more(gated):
    tier, engine = gated
    engine.gate.clear()
    begun = [begin(tier, [0, 1]), begin(tier, [2, 3])]
    assert engine.waiting.wait(20), "the first are being written"
    assert not any(holds(tier, slot, number) for number, slot in enumerate(begun[0][0])), "nothing is visible before its end"
    stored: list[list[Refused | None]] = []

    def over_and_over():
        finishes = [begin(tier, [number])[1] for number in (4, 5, 6)]
        stored.extend(finish() for finish in finishes)

    crowding = threading.Thread(target=over_and_over)
    crowding.start()
    crowding.join(0.2)
    assert crowding.is_alive(), "both halves of its thread's memory are being written"
    engine.gate.set()
    crowding.join(20)
    assert stored == [[None]] * 3
    assert [finish() for _, finish in reversed(begun)] == [[None, None]] * 2
    assert [holds(tier, slot, number) for number, slot in enumerate(begun[0][0] + begun[1][0])] == [True] * 4
    tier.check_integrity()


def test_law_2_each_record_that_does_not_fit_is_refused_for_itself_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("kvtier.tiers.disk.writer._SCRATCH_BYTES", 4 * SLOT)
    engine = FaultyEngine()
    tier = open_disk(tmp_path / "store", engine=engine)
    engine.write_budget = 3 * SLOT + 5000
    slots = [tier.reserve(2) for _ in range(3)]  # a full disk, which is found out meanwhile, has none
    begun = [begin(tier, [2 * pair, 2 * pair + 1], slots[pair]) for pair in range(3)]
    assert [finish() for _, finish in begun] == [[None, None], [None, Refused("disk full")], [Refused("disk full")] * 2]
    tier.check_integrity()
    again = open_disk(image_of(tmp_path / "store", tmp_path / "image"))
    assert sorted(page.depth for _, page in again.recover()) == [0, 1, 2]
    again.close()
    assert [holds(tier, slot, number) for number, slot in enumerate(begun[0][0] + begun[1][0])] == [True, True, True, False]
    tier.close()


def test_records_of_other_sizes_or_that_the_medium_fails_are_refused_among_the_others(tmp_path):
    engine = FaultyEngine()
    tier = open_disk(tmp_path, engine=engine, durability="power")
    slots = tier.reserve(3)
    assert slots is not None
    short = payload(tier, 1)[:-1]
    finish = tier.begin_store(slots, [page_id(n) for n in range(3)], [payload(tier, 0), short, payload(tier, 2)])
    assert finish() == [None, Refused("format"), None]
    engine.sync_errno = errno.EIO
    _, finish = begin(tier, [3])
    assert finish() == [Refused(f"io: {os.strerror(errno.EIO)}")]
    engine.sync_errno = 0
    tier.close()


def test_what_is_begun_on_a_slot_that_holds_a_copy_is_an_error_and_what_was_begun_before_goes_on(gated):
    tier, engine = gated
    held = put(tier, [0])
    engine.gate.clear()
    slots, finish = begin(tier, [1])
    with pytest.raises(IntegrityError, match="already holds a copy"):
        tier.begin_store(held, [page_id(2)], [payload(tier, 2)])
    engine.gate.set()
    assert finish() == [None]
    assert holds(tier, held[0], 0)
    assert holds(tier, slots[0], 1)
    tier.check_integrity()


def test_a_checkpoint_says_nothing_of_what_is_still_being_written(gated):
    tier, engine = gated
    put(tier, [0])
    engine.gate.clear()
    _, finish = begin(tier, [1])
    engine.waiting.wait(20)
    assert tier.checkpoint()
    before = tier.report()["synced_sequence"]
    engine.gate.set()
    assert finish() == [None]
    assert tier.checkpoint()
    assert tier.report()["synced_sequence"] == before + 1


def test_close_waits_for_what_was_begun_and_refuses_what_comes_after(gated):
    tier, engine = gated
    slots = tier.reserve(1)
    engine.gate.clear()
    _, finish = begin(tier, [1])
    closing = threading.Thread(target=tier.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    engine.gate.set()
    assert finish() == [None]
    closing.join(20)
    assert not closing.is_alive()
    assert tier.begin_store(slots, [page_id(2)], [np.zeros(4096, np.uint8)])() == [Refused("closed")]
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("kvtier-disk-write")] == []
