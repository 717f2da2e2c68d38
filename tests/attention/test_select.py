"""Laws checked: shares of attention are shares, and the best pages are the best of those that may be chosen."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.attention.select import best_pages, page_mass


def test_mass_is_each_pages_share_of_exponentials_averaged_over_heads():
    logits = torch.tensor([[[1.0, 3.0, 0.0], [0.0, 0.0, 9.0]]]).log()
    torch.testing.assert_close(page_mass(logits), torch.tensor([[0.125, 0.375, 0.5]]))
    counted = torch.tensor([[True, True, False]])
    assert page_mass(logits, counted)[0, 2] == 0
    assert page_mass(logits, ~counted.logical_or(~counted)).tolist() == [[0.0, 0.0, 0.0]]


@given(st.integers(1, 4), st.integers(0, 12), st.integers(0, 14), st.data())
def test_the_best_candidates_are_chosen(queries, pages, count, data):
    mass = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=queries * pages, max_size=queries * pages)), dtype=torch.float32)
    may = torch.tensor(data.draw(st.lists(st.booleans(), min_size=queries * pages, max_size=queries * pages)), dtype=torch.bool)
    mass, may = mass.view(queries, pages), may.view(queries, pages)
    chosen = best_pages(mass, may, count)
    for query in range(queries):
        best = sorted(mass[query][may[query]].tolist(), reverse=True)
        assert sorted(mass[query][chosen[query]].tolist(), reverse=True) == best[:count]
        assert not (chosen[query] & ~may[query]).any()
