"""The disk tier across restarts: clean ones, killed processes, power failures and changed capacities."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.errors import StoreLocked
from kvtier.testing.tiers import get, holds, page_id, payload, put
from kvtier.tiers.base import Refused
from tests.tiers.disk import CAPACITY, SLOT, VARIABLE, disk_bytes, flip, image_of, open_disk, segment
from tests.tiers.faults import FaultyEngine, GatedEngine, NoHolesEngine, VolatileEngine


def recovered(tier) -> dict[int, int]:
    """Slot by page number; every id must be whole."""
    found = {}
    for slot, page in tier.recover():
        assert page == page_id(page.depth)
        assert page.depth not in found
        found[page.depth] = slot
    tier.check_integrity()
    return found


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


# -- power ------------------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    steps=st.lists(st.sampled_from(["store", "store", "free", "tidy", "checkpoint"]), max_size=25),
    durability=st.sampled_from(["process", "power"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_law_2_a_power_failure_loses_nothing_promised_and_invents_nothing(tmp_path_factory, steps, durability, seed):
    path = tmp_path_factory.mktemp("power") / "store"
    engine, rng = VolatileEngine(), random.Random(seed)
    tier = open_disk(path, format=VARIABLE, engine=engine, durability=durability)
    held: dict[int, int] = {}
    promised: set[int] = set()
    for number, step in enumerate(steps):
        if step == "store" and tier.free_slots >= 2:
            pair = (2 * number, 2 * number + 1)
            held |= zip(pair, put(tier, pair), strict=True)
            promised |= set(pair) if durability == "power" else set()
        elif step == "free" and held:
            gone = rng.choice(sorted(held))
            tier.free([held.pop(gone)])
            promised.discard(gone)
        elif step == "tidy":
            tier.tidy()
        elif step == "checkpoint":
            assert tier.checkpoint()
            promised = set(held)
    image = path.with_name("image")
    engine.cut_power(path, image, rng)
    tier.close()

    again = open_disk(image, format=VARIABLE)
    found = recovered(again)
    right = {n for n, slot in found.items() if holds(again, slot, n)}
    assert promised <= right
    assert all(isinstance(get(again, found[n], page_id(n).key), Refused) for n in found.keys() - right)
    assert disk_bytes(image) <= again.bytes_used, "no blocks are lost to records nobody can find"
    again.close()


def test_what_a_power_failure_brings_back_behind_a_shorter_record_is_punched(tmp_path):
    tier = open_disk(tmp_path / "store", format=VARIABLE)
    slots = tier.reserve(1)
    assert slots is not None
    assert tier.store(slots, [page_id(1)], [np.ones(100, dtype=np.uint8)]) == [None]
    image = image_of(tmp_path / "store", tmp_path / "image")
    tier.close()
    with segment(image).open("r+b") as file:
        file.seek(4096)
        file.write(b"x" * 4096)
    again = open_disk(image, format=VARIABLE)
    assert recovered(again) == {1: slots[0]}
    assert disk_bytes(image) == again.bytes_used == 4096
    again.close()


# -- kill -9 ----------------------------------------------------------------------------------------------------------------

CHILD = """
import sys
from collections import deque
from itertools import count
from pathlib import Path
from kvtier.testing.tiers import page_id, payload
from tests.tiers.disk import VARIABLE, open_disk

def say(what, numbers):
    sys.stdout.write(" ".join([what, *map(str, numbers)]) + chr(10))
    sys.stdout.flush()

tier = open_disk(Path(sys.argv[1]), format=VARIABLE)
held = deque((page.depth, slot) for slot, page in tier.recover())
say("opened", [])
for start in count(int(sys.argv[2]), 3):
    while (slots := tier.reserve(3)) is None:
        victims = [held.popleft() for _ in range(2)]
        say("freeing", [number for number, _ in victims])
        tier.free([slot for _, slot in victims])
        tier.tidy()
        say("freed", [number for number, _ in victims])
    numbers = range(start, start + 3)
    assert tier.store(slots, [page_id(n) for n in numbers], [payload(tier, n) for n in numbers]) == [None] * 3
    held.extend(zip(numbers, slots))
    say("stored", numbers)
    if start % 20 == 0:
        tier.checkpoint()
"""


class Reported:
    """What a child process said it did."""

    def __init__(self, held: set[int]) -> None:
        self.held = set(held)
        self.undecided: set[int] = set()
        self.freed: set[int] = set()
        self.stored = 0

    def hear(self, line: str) -> None:
        what, *numbers = line.split()
        pages = set(map(int, numbers))
        if what == "stored":
            self.held |= pages
            self.stored += 3
        elif what == "freeing":
            self.held -= pages
            self.undecided |= pages
        elif what == "freed":
            self.undecided -= pages
            self.freed |= pages


@pytest.mark.slow
def test_law_2_kill_9_keeps_every_committed_page_and_no_other(tmp_path):
    root = Path(__file__).parents[2]
    held: set[int] = set()
    rng = random.Random(0)
    for turn in range(4):
        command = [sys.executable, "-c", CHILD, str(tmp_path / "store"), str(1000_000 * turn)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as child:
            assert child.stdout is not None
            reported = Reported(held)
            assert child.stdout.readline() == "opened\n"
            if turn == 0:
                with pytest.raises(StoreLocked, match=f"in use by process {child.pid};"):
                    open_disk(tmp_path / "store", format=VARIABLE)
            stop_at = rng.randrange(30, 600)
            while reported.stored < stop_at:
                reported.hear(child.stdout.readline())
            child.send_signal(signal.SIGKILL)
            rest = child.stdout.read()
        for line in rest.splitlines(keepends=True):
            if line.endswith("\n"):
                reported.hear(line)

        tier = open_disk(tmp_path / "store", format=VARIABLE)
        found = recovered(tier)
        assert reported.held <= found.keys(), "a committed page is missing"
        assert all(holds(tier, slot, n) for n, slot in found.items()), "a page that was never whole came back"
        assert not found.keys() & reported.freed, "a freed page came back"
        unreported = found.keys() - reported.held - reported.undecided
        assert len(unreported) <= 3, "at most the store in progress was not reported"
        assert disk_bytes(tmp_path / "store") <= CAPACITY
        held = set(found)
        tier.close()


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
