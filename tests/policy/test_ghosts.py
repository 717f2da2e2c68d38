"""Ghosts: bounded, oldest forgotten first; by name, so that an id used again is no old acquaintance."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvtier.policy import Ghosts
from kvtier.policy.ghosts import GHOSTS_PER_PAGE


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=60), st.integers(0, 6))
def test_the_last_that_left_are_remembered_each_once(steps, pages):
    ghosts: Ghosts[int] = Ghosts(per_page=1)
    model: list[tuple[int, int]] = []
    for when, (leaves, name) in enumerate(steps):
        known = dict(model)
        model = [(other, fact) for other, fact in model if other != name]
        if leaves:
            ghosts.leave([(name, when)], pages)
            model = [*model, (name, when)][-pages:] if pages else []
        else:
            assert ghosts.recall(name) == known.get(name)
        assert len(ghosts) == len(model)
        assert all(other in ghosts for other, _ in model)


def test_a_scan_leaves_a_bounded_number_of_ghosts():
    ghosts: Ghosts[bool] = Ghosts()
    for name in range(100_000):
        ghosts.leave([(name, True)], pages=10)
    assert len(ghosts) == 10 * GHOSTS_PER_PAGE
    assert 99_999 in ghosts
