"""Laws checked: copies go by what was measured to be faster for their number and size, and by the copy engines where nothing was."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.mover.crossover import COPIES, MARGIN, SIZES_BYTES, Crossover, measured

COUNTS, SIZES = st.integers(1, 4096), st.integers(16, 1 << 22)
ROOM = 1 << 25


def machine(engine_copy_s=4e-6, engine_bytes_per_s=5e10, kernel_launch_s=2e-5, kernel_bytes_per_s=4e10):
    def seconds(way, by_kernel, copies, size):
        if by_kernel:
            return kernel_launch_s + copies * size / kernel_bytes_per_s
        return copies * max(engine_copy_s, size / engine_bytes_per_s) * (2 if way == "h2d" else 1)

    return seconds


@given(COUNTS, SIZES)
def test_what_was_not_measured_goes_by_the_copy_engines(copies, size):
    crossover = Crossover(why="no kernels here")
    assert not crossover.by_kernel("d2h", copies, size)
    assert crossover.as_json() == {"kernel_below_bytes": None, "why_copies_only": "no kernels here"}
    assert crossover.bytes_below("h2d", copies) == 0


@pytest.mark.parametrize("way", ["d2h", "h2d"])
@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize("size", SIZES_BYTES)
def test_at_the_points_that_were_measured_the_faster_one_is_taken(way, copies, size):
    seconds = machine()
    faster = seconds(way, True, copies, size) <= MARGIN * seconds(way, False, copies, size)
    assert measured(seconds, ROOM).by_kernel(way, copies, size) == faster


@given(COUNTS, SIZES)
def test_a_kernel_that_is_only_a_little_faster_is_not_worth_the_processors(copies, size):
    def seconds(way, by_kernel, copies, size):
        return copies * size / 1e10 * ((0.89 if way == "h2d" else 0.91) if by_kernel else 1)

    crossover = measured(seconds, ROOM)
    assert not crossover.by_kernel("d2h", copies, size)
    assert crossover.by_kernel("h2d", copies, size)


@given(COUNTS, SIZES)
def test_between_and_beyond_the_points_the_ratio_lies_between_those_of_its_neighbours(copies, size):
    crossover = measured(machine(), ROOM)
    ratios = [crossover.ratio("d2h", count, each) for count in COPIES for each in SIZES_BYTES]
    assert min(ratios) - 1e-9 <= crossover.ratio("d2h", copies, size) <= max(ratios) + 1e-9
    beyond = crossover.ratio("d2h", 10 * COPIES[-1], 10 * SIZES_BYTES[-1])
    assert math.isclose(beyond, crossover.ratio("d2h", COPIES[-1], SIZES_BYTES[-1]))


def test_many_small_copies_go_by_the_kernel_and_large_ones_do_not_and_the_border_is_told():
    crossover = measured(machine(), ROOM)
    assert crossover.by_kernel("d2h", 64, 4096)
    assert not crossover.by_kernel("d2h", 64, 1 << 20)
    below = crossover.bytes_below("d2h", 64)
    assert crossover.by_kernel("d2h", 64, below)
    assert not crossover.by_kernel("d2h", 64, 2 * below)
    said: Any = crossover.as_json()
    assert said["kernel_below_bytes"]["d2h"]["64"] == below
    assert len(said["measured"]) == 2 * len(COPIES) * len(SIZES_BYTES)
    assert all(point["copies_us"] > 0 and point["kernel_us"] > 0 for point in said["measured"])


@pytest.mark.parametrize("room", [0, 1 << 15, 1 << 17, 1 << 20, ROOM])
def test_nothing_is_measured_that_does_not_fit_the_room(room):
    asked = []

    def seconds(way, by_kernel, copies, size):
        asked.append(copies * size)
        return 1e-5

    crossover = measured(seconds, room)
    assert max(asked, default=0) <= room
    assert bool(asked) == (room >= COPIES[0] * SIZES_BYTES[0])
    assert crossover.by_kernel("d2h", 8, 4096) is False
    assert bool(crossover.why) == (not asked)
