"""The disk tier across restarts: clean ones, torn and damaged records, changed capacities."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.testing.tiers import get, holds, page_id, payload, put
from kvtier.tiers.base import Refused
from tests.tiers.disk import CAPACITY, SLOT, VARIABLE, disk_bytes, flip, image_of, open_disk, recovered, segment
from tests.tiers.faults import FaultyEngine, GatedEngine, NoHolesEngine


def test_a_clean_reopen_finds_all_parents_first(tmp_path):
    tier = open_disk(tmp_path)
    for number in (5, 0, 9, 2):
        put(tier, [number])
    tier.close()
    again = open_disk(tmp_path)
    pages = [(slot, page.depth) for slot, page in again.recover()]
    assert [depth for _, depth in pages] == [0, 2, 5, 9]
    assert all(holds(again, slot, depth) for slot, depth in pages)
    assert list(again.recover()) == []
    assert again.counters["recovered"] == 4
    assert again.free_slots == 12
    put(again, range(20, 32))
    again.check_integrity()
    again.close()
    third = open_disk(tmp_path)
    assert len(recovered(third)) == 16
    third.close()


def test_a_store_that_was_not_read_gives_no_slots_and_loses_nothing(tmp_path):
    tier = open_disk(tmp_path)
    put(tier, [1, 2])
    tier.close()
    unread = open_disk(tmp_path)
    assert unread.reserve(1) is None
    assert unread.free_slots == 0
    unread.close()
    again = open_disk(tmp_path)
    assert sorted(recovered(again)) == [1, 2]
    again.close()


def test_law_2_what_a_dead_process_wrote_by_halves_is_not_found(tmp_path_factory):
    """Every way a write can be cut short, at each block and around the header's end."""
    for cut in (1, 100, 255, 256, 257, 4095, 4096, 4097, 4351):
        path = tmp_path_factory.mktemp("torn") / "store"
        engine = FaultyEngine()
        tier = open_disk(path, engine=engine)
        put(tier, [1])
        slots = tier.reserve(1)
        engine.write_budget, engine.punch_errno = cut, 5
        assert slots is not None
        tier.store(slots, [page_id(2)], [payload(tier, 2)])
        again = open_disk(image_of(path, path.with_name("image")))
        found = recovered(again)
        assert list(found) == [1]
        assert holds(again, found[1], 1)
        discarded = {what: count for what, count in again.counters.items() if what.startswith("discarded")}
        assert sum(discarded.values()) == 1, discarded
        assert disk_bytes(path.with_name("image")) == SLOT, "the debris is punched"
        again.close()
        tier.close()


@pytest.mark.parametrize("offset", [0, 60, 255, 256, 3000])
def test_a_damaged_record_is_dropped_after_a_crash_and_counted(tmp_path, offset):
    tier = open_disk(tmp_path / "store")
    put(tier, [1, 2, 3])
    image = image_of(tmp_path / "store", tmp_path / "image")
    tier.close()
    flip(segment(image), SLOT + offset)
    again = open_disk(image)
    assert sorted(recovered(again)) == [1, 3]
    assert again.counters["discarded: header" if offset < 256 else "discarded: checksum"] == 1
    assert again.bytes_used == 2 * SLOT
    again.close()


def test_records_synced_before_the_crash_are_not_read_again_but_never_given_out_wrong(tmp_path):
    tier = open_disk(tmp_path / "store")
    (slot,) = put(tier, [1])
    assert tier.checkpoint() is True
    image = image_of(tmp_path / "store", tmp_path / "image")
    tier.close()
    flip(segment(image), 3000)
    again = open_disk(image)
    assert recovered(again) == {1: slot}
    assert get(again, slot, page_id(1).key) == Refused("checksum")
    again.close()


def test_a_record_cut_off_by_the_end_of_the_file_is_dropped(tmp_path):
    tier = open_disk(tmp_path)
    put(tier, [1, 2])
    tier.close()
    os.truncate(segment(tmp_path), SLOT + 4096)
    again = open_disk(tmp_path)
    assert list(recovered(again)) == [1]
    assert again.counters["discarded: truncated"] == 1
    put(again, range(10, 25))
    again.close()


@settings(max_examples=30)
@given(garbage=st.binary(min_size=1, max_size=3 * SLOT), offset=st.integers(0, 4 * SLOT))
def test_law_1_any_garbage_in_a_segment_file_is_survived(tmp_path_factory, garbage, offset):
    path = tmp_path_factory.mktemp("garbage") / "store"
    tier = open_disk(path)
    put(tier, range(4))
    image = image_of(path, path.with_name("image"))
    tier.close()
    with segment(image).open("r+b") as file:
        file.seek(offset)
        file.write(garbage)
    again = open_disk(image)
    for number, slot in recovered(again).items():
        assert holds(again, slot, number)
    put(again, range(10, 10 + again.free_slots))
    again.check_integrity()
    again.close()


def test_of_two_records_of_one_key_the_newest_wins(tmp_path):
    tier = open_disk(tmp_path)
    first = put(tier, [1])[0]
    second = put(tier, [1])[0]
    assert first != second
    tier.close()
    again = open_disk(tmp_path)
    assert recovered(again) == {1: second}
    assert again.counters["discarded: duplicate"] == 1
    assert disk_bytes(tmp_path) == SLOT
    again.close()


def test_freed_copies_do_not_come_back_after_a_close(tmp_path):
    tier = open_disk(tmp_path)
    slots = put(tier, range(6))
    tier.free(slots[::2])
    tier.close()
    again = open_disk(tmp_path)
    assert sorted(recovered(again)) == [1, 3, 5]
    again.close()


@pytest.mark.parametrize("engine", [FaultyEngine, NoHolesEngine])
def test_freed_copies_do_not_come_back_after_a_crash_once_tidied(tmp_path, engine):
    tier = open_disk(tmp_path / "store", engine=engine())
    slots = put(tier, range(6))
    assert tier.checkpoint()
    tier.free(slots[::2])
    tier.tidy()
    image = image_of(tmp_path / "store", tmp_path / "image")
    tier.close()
    again = open_disk(image, engine=engine())
    assert sorted(recovered(again)) == [1, 3, 5]
    again.close()


def test_sequences_go_on_after_a_crash_so_that_newest_stays_newest(tmp_path):
    tier = open_disk(tmp_path / "store")
    put(tier, range(5))
    second = open_disk(image_of(tmp_path / "store", tmp_path / "second"))
    tier.close()
    held = recovered(second)
    newest = put(second, [3])[0]
    third = open_disk(image_of(tmp_path / "second", tmp_path / "third"))
    second.close()
    assert recovered(third) == held | {3: newest}
    third.close()


def test_what_a_crash_left_unsynced_is_synced_by_the_next_checkpoint(tmp_path):
    tier = open_disk(tmp_path / "store")
    put(tier, range(3))
    engine = GatedEngine()
    again = open_disk(image_of(tmp_path / "store", tmp_path / "image"), engine=engine)
    tier.close()
    assert len(recovered(again)) == 3
    assert again.checkpoint()
    assert engine.syncs == 1
    assert again.report()["synced_sequence"] == 3
    again.close()


def test_a_clean_start_reads_one_block_per_record(tmp_path):
    tier = open_disk(tmp_path)
    put(tier, range(16))
    tier.close()

    class Counting(FaultyEngine):
        read_bytes = 0

        def _pread(self, file, offset, buffer):
            Counting.read_bytes += buffer.nbytes
            return super()._pread(file, offset, buffer)

    engine = Counting()
    again = open_disk(tmp_path, engine=engine)
    assert len(recovered(again)) == 16
    assert Counting.read_bytes == 16 * 4096 + 4 * 4096  # and the probe for holes
    again.close()


# -- capacity ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [FaultyEngine, NoHolesEngine])
def test_a_larger_capacity_is_simply_used(tmp_path, engine):
    tier = open_disk(tmp_path, engine=engine())
    put(tier, range(16))
    tier.close()
    again = open_disk(tmp_path, capacity=2 * CAPACITY, engine=engine())
    assert len(recovered(again)) == 16
    put(again, range(20, 36))
    assert again.reserve(1) is None
    again.check_integrity()
    again.close()


def test_a_smaller_capacity_keeps_the_newest_and_gives_the_rest_back(tmp_path):
    tier = open_disk(tmp_path)
    put(tier, range(16))
    tier.close()
    again = open_disk(tmp_path, capacity=5 * SLOT + 1)
    found = recovered(again)
    assert sorted(found) == [11, 12, 13, 14, 15]
    assert all(holds(again, slot, n) for n, slot in found.items())
    assert again.counters["discarded: capacity"] == 11
    assert disk_bytes(tmp_path) == 5 * SLOT
    assert again.reserve(1) is None
    again.close()


def test_a_smaller_capacity_without_holes_cuts_the_files(tmp_path):
    tier = open_disk(tmp_path, engine=NoHolesEngine())
    put(tier, range(16))
    tier.close()
    again = open_disk(tmp_path, capacity=5 * SLOT, engine=NoHolesEngine())
    found = recovered(again)
    assert len(found) == 5
    assert all(holds(again, slot, n) for n, slot in found.items())
    assert disk_bytes(tmp_path) <= 5 * SLOT
    assert again.counters["discarded: capacity"] == 11
    again.free([found.popitem()[1]])
    put(again, [40])
    assert again.reserve(1) is None
    again.check_integrity()
    again.close()


def test_variable_sizes_are_charged_the_same_after_a_restart(tmp_path):
    tier = open_disk(tmp_path, format=VARIABLE)
    put(tier, range(16))
    used = tier.bytes_used
    tier.close()
    again = open_disk(tmp_path, format=VARIABLE)
    found = recovered(again)
    assert all(holds(again, slot, n) for n, slot in found.items())
    assert (len(found), again.bytes_used) == (16, used)
    assert used == disk_bytes(tmp_path)
    again.close()
