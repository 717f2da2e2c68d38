"""Which pages may leave a tier: compiled loops (`give_way`) choose those that the questions of `kvtier.residency` lead to, over all states
that pages can be in."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from kvtier.pages import DEVICE, NO_ROW, PageTable, Rows
from kvtier.residency.protection import Protected
from tests.columns.rig import ORDERS, Order, PlainTable, needs_loops, table_state
from tests.pages.rig import key, page

pytestmark = needs_loops
NOW = 5.0


def fill(table: PageTable, tiers: int, chance: np.random.Generator) -> None:
    """Trees of pages, each with copies in some tiers, of which some are held, read, pinned, hinted at or only on their way."""
    taken = [0] * tiers
    paths: list[tuple[int, ...]] = [()]
    for number in range(int(chance.integers(4, 40))):
        path = (*paths[int(chance.integers(len(paths)))], number + 1)
        row = table.add(page(path))
        places = [tier for tier in range(tiers) if chance.random() < 0.6]
        for tier in places or [int(chance.integers(tiers))]:
            table.begin([row], tier, [taken[tier]])
            taken[tier] += 1
            if chance.random() < 0.93:
                table.commit([row], tier)
                if chance.random() < 0.05:
                    table.hold([row], tier)
        one = np.array([row])
        if chance.random() < 0.08:
            table.lease(one)
        if chance.random() < 0.1:
            table.pin(one, int(chance.integers(tiers)), float(chance.choice([1.0, 9.0, math.inf])))
        if chance.random() < 0.1:
            table.prefetched_from[row] = tiers
        paths.append(path)


def in_steps(table: PageTable, policy: Any, tier: int, count: int, hinted: bool) -> Rows | None:
    """The pages that may leave without bytes being moved, by `Protected` and by where their colder copies are."""
    with Protected(table, tier, NOW, hinted) as protected:
        victims: Rows | None = policy.evict(count, protected, NOW, 1.0)
    for row in () if victims is None or tier == table.tiers - 1 else victims.tolist():
        floor = table.pinned(row, NOW)
        if not table.has_copy_below(np.array([row]), tier, floor if floor > tier else None)[0]:
            return None
    return victims


def insert(policy: Any, table: PageTable, tier: int, chance: np.random.Generator) -> int:
    """All pages that are READY in `tier` come, used at several times; how many."""
    policy.names = lambda rows: rows
    rows = table.ready(tier)
    for row in rows[np.argsort(chance.random(len(rows)))] if chance.random() < 0.5 else rows:
        one = np.array([row])
        policy.insert(one, table.parent[one], table.depth[one], float(chance.integers(1, 4)))
    return len(rows)


def peek(table: PageTable, policy: Any, tier: int, count: int, hinted: bool) -> list[int]:
    """The pages that would leave, whether bytes are to be moved first or not."""
    with Protected(table, tier, NOW, hinted) as protected:
        pages: list[int] = policy.peek(count, protected, NOW, 1.0).tolist()
    policy.check_integrity()
    assert not table.leaving.any()
    return pages


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
@pytest.mark.parametrize("tiers", [1, 2, 3])
def test_pages_leave_in_one_step_as_in_many(order: Order, tiers: int):
    left, stayed = 0, 0
    for seed in range(400):
        table, twin, policy, likewise = PageTable(tiers, 1), PlainTable(tiers, 1), order.native(), order.plain()
        for some, judge in ((table, policy), (twin, likewise)):
            chance = np.random.default_rng([tiers, seed])
            fill(some, tiers, chance)
            tier = int(chance.integers(tiers))
            held = insert(judge, some, tier, chance)
            count, hinted = int(chance.integers(1, max(2, held))), bool(chance.random() < 0.5)
        for asked in (count, 2 * held):
            looked = [peek(some, judge, tier, asked, hinted) for some, judge in ((table, policy), (twin, likewise))]
            assert looked[0] == looked[1]
        told: list[bytes] = []
        exit = table.exit(tier, NOW, told, hinted)
        assert exit is not None
        gone = policy.give_way(count, exit, NOW)
        policy.check_integrity()
        table.check_integrity()
        assert not table.leaving.any()
        wanted = in_steps(twin, likewise, tier, count, hinted)
        if wanted is None:
            stayed += 1
            assert gone is None
            assert table_state(table) == table_state(twin)
            assert len(policy) == held
            continue
        left += 1
        assert gone is not None
        assert gone[0].tolist() == wanted.tolist()
        assert told == twin.key[wanted].tolist()
        assert gone[1] == twin.drop(wanted, tier)[::-1]
        assert table_state(table) == table_state(twin)
    assert left > 50
    assert stayed > 50


def test_a_key_is_told_of_a_page_whose_row_is_gone():
    table, policy = PageTable(1, 1), ORDERS[0].native()
    rows, (parents, depths, _) = table.settle_chain([key((1,))], bytes(32), 0, NO_ROW, DEVICE, [0])
    policy.insert(rows, parents, depths, 1.0)
    table.release(rows)
    told: list[bytes] = []
    exit = table.exit(DEVICE, NOW, told)
    assert exit is not None
    assert policy.give_way(1, exit, NOW) is not None
    assert told == [key((1,))]
    assert table.row(key((1,))) == NO_ROW
