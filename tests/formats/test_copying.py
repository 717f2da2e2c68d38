"""Laws checked: both ways of copying raw pages move the same bytes; the one that measured costs say is faster is taken."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import LayoutError
from kvtier.formats.copying import CopyCosts, copies_are_faster, copy_pages, runs_of
from kvtier.layout import PageLayout

LAYOUT = PageLayout(2, 2, 4, 1, 8, "bf16")
COSTS = CopyCosts(copy_start_s=5e-6, copy_bytes_per_s=50e9, kernel_start_s=2e-5, kernel_bytes_per_s=40e9)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_runs_are_the_rows_in_order_and_cannot_be_longer(pairs):
    sources, targets = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    runs = list(runs_of(sources, targets))
    assert [(source + i, target + i) for source, target, count in runs for i in range(count)] == pairs
    for (source, target, count), (next_source, next_target, _) in pairwise(runs):
        assert (source + count, target + count) != (next_source, next_target)


def test_costs_are_found_again_from_what_copies_took():
    def seconds_of(way, pages):
        start, speed = (COSTS.copy_start_s, COSTS.copy_bytes_per_s) if way == "copy" else (COSTS.kernel_start_s, COSTS.kernel_bytes_per_s)
        return start + pages * 65536 / speed

    found = CopyCosts.measured(seconds_of, 65536, 256)
    assert found.copy_start_s == pytest.approx(COSTS.copy_start_s)
    assert found.copy_bytes_per_s == pytest.approx(COSTS.copy_bytes_per_s)
    assert found.kernel_start_s == pytest.approx(COSTS.kernel_start_s)
    assert found.kernel_bytes_per_s == pytest.approx(COSTS.kernel_bytes_per_s)
    with pytest.raises(ValueError, match="measure more pages"):
        CopyCosts.measured(lambda way, pages: 1.0, 65536, 256)
    with pytest.raises(ValueError, match="at least 2"):
        CopyCosts.measured(seconds_of, 65536, 1)


def test_one_long_run_is_copied_and_many_scattered_pages_go_through_a_kernel():
    assert copies_are_faster(COSTS, 65536, 256, runs=1)
    assert not copies_are_faster(COSTS, 65536, 256, runs=256)
    turns = [copies_are_faster(COSTS, 65536, 256, runs) for runs in range(1, 257)]
    assert turns == sorted(turns, reverse=True), "more runs never make copies faster"


@pytest.mark.parametrize("way", ["copy", "kernel"])
def test_both_ways_move_the_same_bytes_and_nothing_else(way):
    pool = torch.randn((5, *LAYOUT.shape)).to(torch.bfloat16)
    out = torch.full((6, LAYOUT.page_bytes), 7, dtype=torch.uint8)
    costs = COSTS if way == "copy" else replace(COSTS, kernel_start_s=0.0, copy_start_s=1.0)
    assert copy_pages(pool, LAYOUT, [3, 4, 0], out, [1, 2, 5], replace(costs, copy_start_s=0.0) if way == "copy" else costs) == way
    assert torch.equal(out[[1, 2, 5]], pool[[3, 4, 0]].flatten(1).view(torch.uint8))
    assert bool((out[[0, 3, 4]] == 7).all())


def test_what_does_not_fit_is_refused():
    pool, out = torch.zeros((2, *LAYOUT.shape), dtype=torch.bfloat16), torch.zeros((2, LAYOUT.page_bytes), dtype=torch.uint8)
    with pytest.raises(LayoutError, match="rows from 0 to 2; there are 2"):
        copy_pages(pool, LAYOUT, [0, 2], out, [0, 1], COSTS)
    with pytest.raises(LayoutError, match="contiguous uint8"):
        copy_pages(pool, LAYOUT, [0], out[:, 1:], [0], COSTS)
    with pytest.raises(LayoutError, match="expected as many"):
        copy_pages(pool, LAYOUT, [0], out, [0, 1], COSTS)
