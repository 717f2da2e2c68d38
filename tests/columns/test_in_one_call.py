"""What compiled loops do with page table and policy in one call: pages that give way, and pages that a request wrote settling. The twins do
it in several."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvtier.pages import DEVICE, NO_ROW, PageTable, Rows
from kvtier.policy import ROOT, EvictionPolicy, nothing_protected
from kvtier.residency.protection import Protected
from tests.columns.rig import ORDERS, Order, PlainTable, needs_loops, table_state

pytestmark = [needs_loops, pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name), pytest.mark.usefixtures("hasty")]
TICKS = (0.0, 1.0)
"""Seconds between a request's calls."""


@pytest.mark.parametrize("tick", TICKS)
def test_pages_give_way_in_table_and_policy_at_once_as_in_two_steps(order: Order, tick: float):
    """Those that are held are few at first, and in the end most: then there are fewer to take than are wanted."""
    tables, policies, chance = (PageTable(1, 4), PlainTable(1, 4)), (order.native(), order.plain()), np.random.default_rng(3)
    for table, policy in zip(tables, policies, strict=True):
        policy.names = table.names
    held: list[np.ndarray[Any, Any]] = []
    chains: list[list[bytes]] = []
    taken: list[bool] = []
    in_one, now = 0, 0.0
    for call in range(300):
        now += 1.0
        keys = list(chains[int(chance.integers(max(0, len(chains) - 30), len(chains)))]) if chains and chance.random() < 0.6 else []
        keys = keys[: int(chance.integers(0, len(keys) + 1))]
        found = tables[0].claim(keys)
        keys = keys[: len(found)] + [bytes([call % 256, call // 256, place]) * 11 for place in range(int(chance.integers(1, 9)))]
        chains.append(keys)
        if count := len(found):
            tables[1].claim(keys[:count])
            for policy in policies:
                policy.touch(found, now)
        before, parent = (keys[count - 1], int(found[-1])) if count else (bytes(32), NO_ROW)
        now += tick
        for table, policy in zip(tables, policies, strict=True):
            rows, (parents, depths, _) = table.settle_chain(keys[count:], before, count, parent, DEVICE, range(len(keys) - count))
            policy.insert(rows, parents, depths, now)
        if chance.random() < call / 300:
            held.append(np.concatenate((found, rows)))
        else:
            for table in tables:
                table.release(np.concatenate((found, rows)))
        if call < 20:
            continue
        wanted = int(chance.integers(1, 16))
        left = give_way(tables[0], policies[0], wanted, now)
        in_one += left is not None
        again = two_steps(tables[1], policies[1], wanted, now)
        if left is None:
            left = two_steps(tables[0], policies[0], wanted, now)
        assert order.state(policies[0]) == order.state(policies[1])
        assert table_state(tables[0]) == table_state(tables[1])
        assert (left is None) == (again is None)
        if left is not None and again is not None:
            assert left[0].tolist() == again[0].tolist()
            assert left[1] == again[1]
        taken.append(left is not None)
        policies[0].check_integrity()
    assert held
    assert 0 < sum(taken) < len(taken)
    assert in_one > 25


def give_way(table: PageTable, policy: EvictionPolicy, count: int, now: float) -> tuple[Rows, list[int]] | None:
    """Pages leave in one call, if they can; else None."""
    exit = table.exit(DEVICE, 1.0)
    return None if exit is None else policy.give_way(count, exit, now)


def two_steps(table: PageTable, policy: EvictionPolicy, count: int, now: float) -> tuple[Rows, list[int]] | None:
    """What `give_way` does, in two calls."""
    with Protected(table, DEVICE, now) as protected:
        victims = policy.evict(count, protected, now, 1.0)
    if victims is None:
        return None
    return victims, table.drop(victims, DEVICE)[::-1]


def settle(table: PageTable, policy: EvictionPolicy, where: tuple[Any, ...], now: float) -> tuple[np.ndarray[Any, Any], bool]:
    """Pages settle in one call, else in two: their rows, and whether it was one."""
    chain = table.new_chain(*where)
    rows = None if chain is None else policy.settle(chain, now)
    if rows is not None:
        return rows, True
    rows, (parents, depths, _) = table.settle_chain(*where)
    policy.insert(rows, parents, depths, now)
    return rows, False


@pytest.mark.parametrize("tick", TICKS)
def test_pages_that_settle_in_table_and_policy_at_once_are_where_two_steps_put_them(order: Order, tick: float):
    """In the plain twins nothing has loops. Chains go on after others, come back after they left, and are held for a while or not."""
    tables, policies, chance = (PageTable(1, 4), PlainTable(1, 4)), (order.native(), order.plain()), np.random.default_rng(7)
    for table, policy in zip(tables, policies, strict=True):
        policy.names = table.names
    chains: list[list[bytes]] = []
    at_once, now = 0, 0.0
    for call in range(500):
        now += 1.0
        keys = list(chains[int(chance.integers(len(chains)))]) if chains and chance.random() < 0.7 else []
        keys = keys[: int(chance.integers(0, len(keys) + 1))]
        keys += [bytes([call % 256, call // 256, place]) * 11 for place in range(int(chance.integers(1, 9)))]
        chains.append(keys)
        found = [table.claim(keys) for table in tables]
        assert found[0].tolist() == found[1].tolist()
        count = len(found[0])
        if count:
            for policy in policies:
                policy.touch(found[0], now)
        now += tick
        before, parent = (keys[count - 1], int(found[0][-1])) if count else (bytes(32), NO_ROW)
        where = (keys[count:], before, count, parent, DEVICE, range(100 * call, 100 * call + len(keys) - count))
        rows, in_one = settle(tables[0], policies[0], where, now)
        at_once += in_one
        again, in_one = settle(tables[1], policies[1], where, now)
        assert not in_one
        assert rows.tolist() == again.tolist()
        assert table_state(tables[0]) == table_state(tables[1])
        assert order.state(policies[0]) == order.state(policies[1])
        for table in tables:
            table.release(np.concatenate((found[0], rows)))
        if len(tables[0]) > 300:
            victims, likewise = [policy.evict(len(rows), nothing_protected, now, 1.0) for policy in policies]
            assert victims is not None
            assert likewise is not None
            assert victims.tolist() == likewise.tolist()
            for table in tables:
                table.drop(victims, DEVICE)
    assert at_once > 400
    assert order.name != "a2cr" or policies[0]._model.fits > 5, "it learned meanwhile"
    for part in (*tables, *policies):
        part.check_integrity()


def test_pages_that_cannot_settle_in_both_settle_in_neither(order: Order):
    table, policy = PageTable(1, 4), order.native()
    policy.insert(np.array([5]), np.array([ROOT]), np.array([0]), 1.0)
    policy.names = table.names
    keys = [bytes([place]) * 32 for place in range(6)]
    rows, (parents, depths, _) = table.settle_chain(keys[:2], bytes(32), 0, NO_ROW, DEVICE, [0, 1])
    policy.insert(rows, parents, depths, 1.0)
    held = (table_state(table), order.state(policy))
    after = (keys[1], 2, int(rows[1]), DEVICE)
    strange: dict[str, Any] = {
        "a page that has a row": ([keys[2], keys[0]], *after, [2, 3]),
        "the same page twice": ([keys[2], keys[2]], *after, [2, 3]),
        "more slots than pages": (keys[2:3], *after, [2, 3]),
        "no pages": ([], *after, []),
        "no such tier": (keys[2:3], *after[:3], 1, [2]),
        "a row that is a page of the policy already": (keys[2:6], *after, [2, 3, 4, 5]),
        "no page before": (keys[2:3], keys[1], 2, NO_ROW, DEVICE, [2]),
    }
    no_key: Any = ([keys[2], "a key of as many as 32 letters..."], *after, [2, 3])
    wrong: list[Any] = [(keys[2:3], *after, ["2"])]
    if order.name == "a2cr":
        strange |= {"a page without a name": ([b"short"], *after, [2]), "a key that is none": no_key}
    else:
        wrong.append(no_key)
    for what, where in strange.items():
        chain = table.new_chain(*where)
        assert chain is not None
        assert policy.settle(chain, 2.0) is None, what
        assert (table_state(table), order.state(policy)) == held, what
    for where in wrong:
        chain = table.new_chain(*where)
        assert chain is not None
        with pytest.raises(TypeError):
            policy.settle(chain, 2.0)
        assert (table_state(table), order.state(policy)) == held
    chain = table.new_chain(keys[2:4], *after, [2, 3])
    assert chain is not None
    settled = policy.settle(chain, 2.0)
    assert settled is not None
    assert settled.tolist() == [2, 3]
    table.check_integrity()
    policy.check_integrity()


def everything(order: Order, table: PageTable, policy: EvictionPolicy) -> list[Any]:
    """What both hold, but for how far LRU's journal is sorted, which may change at any time."""
    state = order.state(policy)
    state.pop("journal", None)
    return [table_state(table), state, policy.peek(9, nothing_protected, 2.0, 1.0).tolist()]


def test_pages_without_the_colder_copy_that_they_need_stay_in_both(order: Order):
    """The last that would leave has one on its way only; then it is there."""
    table, policy = PageTable(2, 4), order.native()
    policy.names = table.names
    rows, (parents, depths, _) = table.settle_chain([bytes([place]) * 32 for place in range(4)], bytes(32), 0, NO_ROW, DEVICE, [4, 5, 6, 7])
    policy.insert(rows, parents, depths, 1.0)
    table.release(rows)
    for row in rows[1:].tolist():
        table.begin([row], 1, [row])
    table.commit(rows[2:], 1)
    assert give_way(table, policy, 3, 2.0) is None  # the room was noted
    held = everything(order, table, policy)
    assert give_way(table, policy, 3, 2.0) is None
    assert everything(order, table, policy) == held
    table.commit(rows[1:2], 1)
    left = give_way(table, policy, 3, 2.0)
    assert left is not None
    assert (left[0].tolist(), left[1]) == (rows[:0:-1].tolist(), [5, 6, 7])
    assert table.row(bytes([3]) * 32) == rows[3], "its colder copy keeps the row"
    assert not table.state[DEVICE][rows[1:]].any()
    assert len(policy) == 1
    assert give_way(table, policy, 1, 2.0) is None
    table.check_integrity()
    policy.check_integrity()


def test_pages_that_cannot_give_way_in_both_stay_in_both(order: Order):
    table, policy = PageTable(1, 4), order.native()
    rows, (parents, depths, _) = table.settle_chain([bytes([place]) * 32 for place in range(4)], bytes(32), 0, NO_ROW, DEVICE, range(4))
    policy.insert(rows, parents, depths, 1.0)
    table.release(rows)
    policy.insert(np.array([rows[-1] + 1]), np.array([rows[-1]]), np.array([4]), 1.0)  # of which the table knows nothing
    exit = table.exit(DEVICE, 1.0)
    assert exit is not None
    with Protected(table, DEVICE, 2.0) as protected:
        assert policy.evict(9, protected, 2.0, 1.0) is None  # the room was noted
    held = everything(order, table, policy)
    for what, count, where in (
        ("a page that the table does not know", 2, exit),
        ("more pages than there are", 6, exit),
        ("no pages", 0, exit),
        ("no such tier", 1, (*exit[:2], 1, *exit[3:])),
        ("a tier below none", 1, (*exit[:2], -1, *exit[3:])),
    ):
        assert policy.give_way(count, where, 2.0) is None, what
        assert everything(order, table, policy) == held, what
    wrong: Any
    for wrong in (
        ("no table", *exit[1:]),
        (exit[0], {}, *exit[2:]),
        (*exit[:2], "0", *exit[3:]),
        (*exit[:3], "now", *exit[4:]),
        (*exit[:4], ()),
    ):
        with pytest.raises(TypeError):
            policy.give_way(1, wrong, 2.0)
        assert everything(order, table, policy) == held


def test_a_page_that_somebody_holds_queues_no_more_when_its_child_comes_back(order: Order):
    """The child may leave, its parent may not, and there is no third page: neither leaves, now or before the other."""
    table, policy = PageTable(1, 4), order.native()
    rows, (parents, depths, _) = table.settle_chain([bytes([place]) * 32 for place in range(2)], bytes(32), 0, NO_ROW, DEVICE, range(2))
    policy.insert(rows, parents, depths, 1.0)
    table.release(rows[1:])
    assert give_way(table, policy, 2, 2.0) is None
    policy.check_integrity()
    table.release(rows[:1])
    table.lease(rows[1:])
    assert give_way(table, policy, 1, 3.0) is None
    policy.check_integrity()
    table.check_integrity()


def test_pages_give_way_however_many_are_held_before_them(order: Order):
    """More than there is room for at first, each time, in LRU's heap as well as in its journal."""
    table, policy = PageTable(1, 4), order.native()
    policy.names = lambda pages: pages
    keys = [place.to_bytes(4, "little") * 8 for place in range(3000)]
    rows = np.concatenate([table.settle_chain([key], bytes(32), 0, NO_ROW, DEVICE, [place])[0] for place, key in enumerate(keys)])
    policy.insert(rows, np.full(len(rows), ROOT), np.zeros(len(rows), np.int64), 1.0)
    table.release(rows[-4:])
    for first in (4, 2):
        left = give_way(table, policy, 2, 2.0)
        assert left is not None
        assert sorted(left[0].tolist()) == sorted(rows[len(rows) - first :][:2].tolist())
        policy.check_integrity()
    assert give_way(table, policy, 1, 2.0) is None
    table.release(rows[7:8])
    left = give_way(table, policy, 1, 2.0)
    assert left is not None
    assert left[0].tolist() == rows[7:8].tolist()
    policy.check_integrity()
    table.check_integrity()
