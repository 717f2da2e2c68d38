"""The disk tier after the power failed, and after kill -9: what was promised is there, and nothing that never was."""

from __future__ import annotations

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
from kvtier.testing.tiers import get, holds, page_id, put
from kvtier.tiers.base import Refused
from tests.tiers.disk import CAPACITY, VARIABLE, disk_bytes, image_of, open_disk, recovered, segment
from tests.tiers.faults import VolatileEngine

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
