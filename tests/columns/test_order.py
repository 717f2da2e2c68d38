"""The LRU order's compiled loops: bit for bit what NumPy does beside them, and no way out of the columns' memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvtier import columns
from kvtier.pages import PageTable
from kvtier.policy import LRU, ROOT, nothing_protected
from kvtier.policy import recency as recency_module
from kvtier.residency.protection import Protected
from kvtier.testing.policy import PolicyContract, pages_of
from tests.columns.rig import PlainLRU, Twins, needs_loops, order_state


def twins() -> Any:
    return Twins(LRU(), PlainLRU(), order_state)


@needs_loops
class TestTwins(PolicyContract):
    def make_policy(self) -> Any:
        return twins()


@needs_loops
class TestTwinsWithAJournalThatIsCompactedAllTheTime(PolicyContract):
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        monkeypatch.setattr(recency_module, "SPARE_ENTRIES", 2)

    def make_policy(self) -> Any:
        return twins()


class TestContractWithoutLoops(PolicyContract):
    def make_policy(self) -> LRU:
        return PlainLRU()


@needs_loops
@pytest.mark.parametrize("tick", [0.0, 1e-6])
def test_orders_stay_the_same_through_a_long_stream_of_requests(tick):
    """Chats over shared prefixes: what the state machine's few pages do not give, long chains in long moments."""
    chance = np.random.default_rng(3)
    policy = twins()
    ends: list[tuple[int, int]] = []
    unused = list(range(2_000, -1, -1))
    chains: dict[int, list[int]] = {}
    now = 0.0
    for request in range(300):
        now += float(chance.integers(0, 2)) + tick
        held = chains[int(chance.integers(max(0, request - 40), request))] if request and chance.random() < 0.7 else []
        held = held[: int(chance.integers(0, len(held) + 1))]
        held = held[: next((place for place, page in enumerate(held) if page not in policy), len(held))]
        if held:
            policy.touch(np.array(held), now)
        now += tick
        fresh = int(chance.integers(1, 40))
        if len(unused) < fresh + 900:
            victims = policy.evict(fresh, lambda pages, kept=frozenset(held): np.array([page in kept for page in pages.tolist()]), now, 0.9)
            unused += [] if victims is None else victims.tolist()
        pages = [unused.pop() for _ in range(fresh)]
        policy.insert(np.array(pages), np.array([held[-1] if held else ROOT, *pages[:-1]]), np.arange(len(held), len(held) + fresh), now)
        chains[request] = held + pages
        ends.append((len(held), fresh))
    assert policy.evict(len(policy), nothing_protected, now, 0.9) is not None
    policy.check_integrity()
    assert len(policy) == 0


@needs_loops
def test_a_parent_that_waits_for_a_second_child_does_not_leave_with_the_first():
    policy = twins()
    for page, parent, depth, now in ((0, ROOT, 0, 1.0), (1, 0, 1, 2.0), (3, 1, 2, 5.0), (2, 0, 1, 9.0)):
        policy.insert(pages_of(page), pages_of(parent), pages_of(depth), now)
    assert policy.peek(3, nothing_protected, 9.0, 0.5).tolist() == [3, 1, 2]
    assert policy.evict(5, nothing_protected, 9.0, 0.5) is None
    assert policy.evict(4, nothing_protected, 9.0, 0.5).tolist() == [3, 1, 2, 0]


@needs_loops
def test_parents_that_wait_leave_after_each_other_up_to_a_protected_or_later_one():
    policy = twins()
    for page in range(8):
        policy.insert(pages_of(page), pages_of(page - 1), pages_of(page), now=1.0 + page)
    policy.insert(pages_of(8), pages_of(ROOT), pages_of(0), now=9.5)
    assert policy.peek(9, lambda pages: pages == 3, 9.5, 0.5).tolist() == [7, 6, 5, 4, 8]
    assert policy.evict(6, lambda pages: pages == 3, 9.5, 0.5) is None
    policy.touch(pages_of(2), 20.0)
    assert policy.evict(9, nothing_protected, 20.0, 0.5).tolist() == [7, 6, 5, 4, 3, 8, 2, 1, 0]


@needs_loops
def test_loops_refuse_what_is_no_column_no_pages_and_no_place():
    loops = columns.loops()
    assert loops is not None
    policy = LRU()
    policy.insert(pages_of(0, 1), pages_of(ROOT, 0), pages_of(0, 1), 1.0)
    good = [policy._key, policy._parent, policy._children, policy._last, policy._unqueued, policy._keys, policy._times]
    loops.Order(*good)
    with pytest.raises(TypeError, match="7"):
        loops.Order(*good[:6])
    for place in range(7):
        with pytest.raises(ValueError, match="column|cell"):
            loops.Order(*[np.zeros(7, np.int16) if place == index else column for index, column in enumerate(good)])
    native = policy._loops
    assert native is not None
    room, one = len(policy._keys), np.zeros(1, np.int64)
    pages = PageTable(1, 1)
    exit, chain = pages.exit(0, 1.0), pages.new_chain([bytes(32)], bytes(32), 0, ROOT, 0, [0])
    assert exit is not None
    assert chain is not None
    for start, stop in ((-1, 1), (0, room + 1), (2**62, 2**62), (-(2**62), 1)):
        for call in (
            lambda a, b: native.moment(a, b),
            lambda a, b: native.leaving(a, b, 1.0, one, one),
            lambda a, b: native.give_way(*exit, one, a, a, b, 0.0, []),
            lambda a, b: native.settle(*chain, one, b if a >= 0 else a, 1.0),
        ):
            with pytest.raises(ValueError, match="place"):
                call(start, stop)
    with pytest.raises(ValueError, match="moment"):
        native.moment(2, 2)
    for bounds in ((1, 0, 2), (0, 2, 1)):
        assert native.give_way(*exit, one, *bounds, 0.0, []) is None
    assert native.give_way(*exit[:2], 1, 1.0, None, False, one, 0, 0, 2, 0.0, []) is None, "the table has no such tier"
    strange: list[Any] = [[0], [()], [(1.0,)], [("1", 1)], [(1.0, 1.5)], ()]
    for heap in strange:
        with pytest.raises(TypeError):
            native.give_way(*exit, one, 0, 0, 2, 0.0, heap)
    for entry in ((1.0, 2**62), (1.0, -2), (2.0, int(policy._key[1])), (1.0, int(policy._key[0])), (1.0, int(policy._key[1]) + 1)):
        late = [entry]
        assert native.give_way(*exit, one, 0, 0, 0, 0.0, late) is None, "no entry of a page, or one that has children"
        assert late == [entry]
    with pytest.raises(TypeError, match="table's loops"):
        native.give_way(native, *exit[1:], one, 0, 0, 2, 0.0, [])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="room"):
        native.leaving(0, 2, 1.0, one, np.zeros(2, np.int64))
    with pytest.raises(TypeError):
        native.queue(np.zeros(1), 0, 1.0)  # type: ignore[arg-type]
    assert not native.queue(pages_of(0, 1), room - 1, 1.0)
    assert not native.queue(pages_of(0, 2**60), 0, 1.0)
    with pytest.raises(ValueError, match="room"):
        native.leave(pages_of(0, 2**60))
    assert native.chain(2**60, 1.0, 0, one, np.zeros(1)) == 0
    with pytest.raises(ValueError, match="column"):
        native.chain(0, 1.0, 0, one, np.zeros(2))
    assert native.step_over(np.array([2**40 - 1])) == 0
    assert not native.arrive(pages_of(5), pages_of(2**60), pages_of(0))
    policy.check_integrity()


@needs_loops
def test_a_journal_that_went_wrong_leads_nowhere():
    policy = LRU()
    policy.insert(pages_of(0, 1), pages_of(ROOT, 0), pages_of(0, 1), 1.0)
    policy._keys[:2] = 2**62, -(2**62)
    policy._parent[:] = 2**60
    assert policy.evict(2, nothing_protected, 2.0, 0.5) is None
    table = PageTable(1, 1)
    table.settle_chain([bytes([place]) * 32 for place in range(2)], bytes(32), 0, ROOT, 0, range(2))
    table.leases[:] = 0
    policy._keys[:2] = 2**40 - 1, 1
    exit = table.exit(0, 1.0)
    assert exit is not None
    assert policy.give_way(2, exit, 2.0) is None
    assert policy.evict(2, Protected(table, 0, 2.0), 2.0, 0.5) is None
