"""Leaves that somebody holds when it is their turn to leave: compiled loops set them aside, out of A²CR's queue, until nobody does."""

from __future__ import annotations

import numpy as np

from kvtier.pages import DEVICE, NO_ROW, PageTable
from kvtier.policy import A2CR, ROOT, nothing_protected
from kvtier.policy.ranking import _ASIDE
from tests.columns.rig import needs_loops


@needs_loops
def test_pages_that_somebody_holds_wait_beside_the_queue_until_nobody_does():
    """However many they are, and wherever the columns are meanwhile."""
    table, policy = PageTable(1, 4), A2CR()
    policy.names = lambda pages: pages
    rows = [table.settle_chain([bytes([place]) * 32], bytes(32), 0, NO_ROW, DEVICE, [place])[0] for place in range(40)]
    for time, row in enumerate(rows):
        policy.insert(row, np.array([ROOT]), np.array([0]), float(time))
    table.release(np.concatenate(rows[30:]))
    now, ranking, exit = 50.0, policy._ranking, table.exit(DEVICE, 0.0)
    assert exit is not None

    def leaves(count: int) -> list[int] | None:
        left = policy.give_way(count, exit, now)
        policy.check_integrity()
        return None if left is None else left[0].tolist()

    order = [int(page) for page in policy.peek(40, nothing_protected, now, 1.0)]
    free = [page for page in order if page in np.concatenate(rows[30:])]
    assert leaves(2) == free[:2]
    assert ranking._numbers[_ASIDE] > 0, "some that are held were first"
    assert leaves(9) is None, "eight are left"
    assert ranking._numbers[_ASIDE] == 30
    policy.insert(np.array([5000]), np.array([ROOT]), np.array([0]), now)
    policy.check_integrity()
    assert ranking._numbers[_ASIDE] == 30, "columns grew"
    policy.remove(rows[0])
    policy.touch(rows[1], now)
    policy.check_integrity()
    assert ranking._numbers[_ASIDE] == 28
    freed = [page for page in order if page in (int(rows[7][0]), int(rows[20][0]))]
    table.release(np.array(freed))
    order = [page for page in order if page not in free[:2]]
    allowed = [page for page in order if page in freed or page in free]
    assert leaves(3) == allowed[:3]
    assert len(policy.peek(50, nothing_protected, now, 1.0)) == len(policy) == 35
    policy.check_integrity()
    assert ranking._numbers[_ASIDE] == 0, "who asks otherwise is told of all"
