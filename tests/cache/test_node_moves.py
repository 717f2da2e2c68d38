"""Laws checked, on a machine that is only described: pages of the host tier go to the node they are used from, if nobody needs them, whole.

Which node real memory lands on is checked where there are several (tests/numa/test_host_on_nodes.py).
"""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import pytest

from kvtier.numa.binding import this_machine
from kvtier.numa.syscalls import MemoryPolicy, Mode
from kvtier.numa.topology import read_topology
from kvtier.numa.transfers import NodeStream
from kvtier.residency.node_moves import move_between_nodes
from kvtier.tiers import host, host_moves
from kvtier.tiers.host_nodes import HostNodes, Segment
from tests.cache.rig import HOST, LAYOUT, Clock, assert_right, flip_in_host, hold, make_cache, put, run
from tests.numa.machines import TWO_SOCKETS, build

NEAR, FAR = 0, 1
REAL = this_machine().memory_nodes[0]
PAGES = 16


class Described(HostNodes):
    """The first half of the arena is near, the second far; workers run anywhere."""

    worker_nodes = ()

    def place(self, address: int, length: int) -> None:
        self.bound = True


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """Run 1 to 4, four pages each, in host memory alone: 1 and 2 near, 3 and the half of 4 that fits far; all accesses come from NEAR."""
    size = PAGES * LAYOUT.page_bytes
    segments = [Segment(start, size // 2, MemoryPolicy(Mode.PREFERRED, (node,))) for start, node in ((0, NEAR), (size // 2, FAR))]
    machine = read_topology(build(tmp_path, TWO_SOCKETS))
    monkeypatch.setattr(host, "choose_nodes", lambda *_: Described("auto", segments, ""))
    monkeypatch.setattr(host_moves, "this_machine", lambda: machine)
    monkeypatch.setattr(host_moves, "get_current_numa_node", lambda: NEAR)
    monkeypatch.setattr(host_moves, "NodeStream", lambda node, topology: NodeStream(REAL, this_machine(), 3000))
    clock = Clock()
    with make_cache(device_pages=4, host_pages=PAGES, clock=clock) as cache:
        cache.clock = clock  # type: ignore[attr-defined]
        for start in (1, 2, 3, 4):
            put(cache, run(start, 4))
            cache.settle(20)
        put(cache, run(9, 1))
        cache.settle(20)
        yield cache


def tier_of(cache) -> Any:
    return cache._residency.tiers[HOST]


def nodes_of(cache, tokens) -> list[int]:
    table, tier = cache._residency.table, tier_of(cache)
    return [tier.node_of(int(table.slot[HOST, row])) for row in table.find(cache.lookup(tokens).keys).tolist()]


def move(cache, at_rest: bool = True) -> int:
    residency = cache._residency
    moved: int = residency.mover.spawn(move_between_nodes(residency)).result(20)
    if at_rest:
        cache.check_integrity()
    return moved


def counts(cache) -> Any:
    return cache.stats()["tiers"]["host"]["achieved"]["numa_moves"]


def read_far(cache, tokens, times: int = 8) -> None:
    """Accesses to host copies, without bringing them up."""
    tier, table = tier_of(cache), cache._residency.table
    rows = [row for row in table.find(cache.lookup(tokens).keys).tolist() if table.state[HOST, row] == 2]
    for _ in range(times):
        tier.load([int(table.slot[HOST, row]) for row in rows], [table.key[row] for row in rows], None)


def test_some_slots_stay_free_for_moves_and_the_nearest_go_first(cache):
    tier = tier_of(cache)
    assert tier.capacity_slots == PAGES - tier._spares == PAGES - 1
    assert tier.reserve(tier.free_slots + 1) is None
    taken = tier.reserve(tier.free_slots)
    assert (tier.free_slots, tier.reserve(1)) == (0, None)
    assert tier.reserve_on(FAR) is not None
    tier.free([*taken, *[slot for slot in range(PAGES) if tier._reserved[slot] and tier.key_of(slot) is None and slot not in taken]])
    assert nodes_of(cache, run(1, 4)) + nodes_of(cache, run(2, 4)) == [NEAR] * 8
    assert set(nodes_of(cache, run(3, 4))) == {FAR}
    assert tier.report()["numa_moves"]["pages"] == 0


def test_pages_go_where_they_are_used_and_change_places_with_those_nobody_uses(cache):
    read_far(cache, run(3, 4))
    assert move(cache) == 8, "four near, four out of their way"
    assert nodes_of(cache, run(3, 4)) == [NEAR] * 4
    assert sorted(nodes_of(cache, run(1, 4)) + nodes_of(cache, run(2, 4))) == [NEAR] * 4 + [FAR] * 4
    found = counts(cache)
    assert (found["pages"], found["bytes"], found["given_up"], found["local_share"]) == (8, 8 * LAYOUT.page_bytes, 0, 0.0)
    for start in (1, 2, 3):
        lease = hold(cache, run(start, 4))
        assert lease.tokens
        assert_right(lease, run(start, 4))
        lease.release()
        cache.settle(20)
    assert move(cache) == 0, "and then there is rest"


def test_nothing_moves_without_accesses_and_the_rate_is_that_of_the_last_minute(cache):
    assert move(cache) == 0
    read_far(cache, run(3, 1))
    assert move(cache) == 2
    tier = tier_of(cache)
    now = cache._residency.clock()
    assert tier.move_counts(now)["per_s"] == pytest.approx(2 / 60, abs=1e-4)
    assert tier.move_counts(now + 61)["per_s"] == 0


def test_a_leased_page_stays(cache):
    read_far(cache, run(3, 4))
    with cache.acquire_in_place(cache.lookup(run(3, 4))) as lease:
        assert lease.pages_in_place == 4
        assert move(cache, at_rest=False) == 0
        assert set(nodes_of(cache, run(3, 4))) == {FAR}


def test_a_page_that_somebody_wants_meanwhile_stays_and_is_right(cache, monkeypatch):
    read_far(cache, run(3, 4))
    begun, go = threading.Event(), threading.Event()
    tier, inner = tier_of(cache), host_moves.carry

    def slow(*arguments):
        begun.set()
        assert go.wait(20)
        return inner(*arguments)

    monkeypatch.setattr(host, "carry", slow)
    residency = cache._residency
    moving = residency.mover.spawn(move_between_nodes(residency))
    assert begun.wait(20)
    with residency.lock:
        rows = residency.table.ready(HOST)
        residency.table.hold(rows, HOST)
    go.set()
    assert moving.result(20) == 0
    with residency.lock:
        residency.table.unhold(rows, HOST)
    assert tier.move_counts(0)["given_up"] > 0
    cache.check_integrity()
    lease = hold(cache, run(3, 4))
    assert_right(lease, run(3, 4))


def test_a_page_that_does_not_arrive_whole_stays_where_it_is(cache):
    table = cache._residency.table
    row = int(table.find(cache.lookup(run(3, 1)).keys)[0])
    read_far(cache, run(3, 1))
    flip_in_host(cache, row)
    for slot_page in (run(1, 4), run(2, 4)):
        assert set(nodes_of(cache, slot_page)) == {NEAR}
    move(cache)
    assert nodes_of(cache, run(3, 1)) == [FAR]
    assert counts(cache)["given_up"] == 1


def test_a_worker_that_fails_leaves_everything_as_it_was(cache, monkeypatch, caplog):
    read_far(cache, run(3, 4))

    def broken(*_):
        raise OSError("no memory")

    monkeypatch.setattr(host, "carry", broken)
    with caplog.at_level(logging.ERROR), pytest.raises(OSError, match="no memory"):
        move(cache)
    cache.check_integrity()
    assert counts(cache)["pages"] == 0
    monkeypatch.undo()
    assert_right(hold(cache, run(3, 4)), run(3, 4))


def test_house_keeping_moves_pages_by_itself(cache):
    read_far(cache, run(3, 4))

    async def moved() -> None:
        while nodes_of(cache, run(3, 4)) != [NEAR] * 4:
            await asyncio.sleep(0.05)

    cache._residency.mover.spawn(asyncio.wait_for(moved(), 20)).result(30)
