"""The page table's compiled loops: bit for bit what NumPy does beside them, and no way out of the columns' memory."""

from __future__ import annotations

from collections import UserList
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test

from kvtier import columns
from kvtier.errors import IntegrityError
from kvtier.pages import ABSENT, NO_ROW, READY, WRITING, PageTable
from kvtier.pages.columns import SIZE, UNUSED
from tests.columns.rig import PlainTable, Twins, needs_loops, table_state
from tests.pages.rig import PATHS, ROOT, TIERS, chain, key
from tests.pages.test_any_order import TableMachine

ROWS = 8


def twins(tiers: int = TIERS) -> Any:
    return Twins(PageTable(tiers, 4), PlainTable(tiers, 4), table_state)


class TwinMachine(TableMachine):
    """What a table is used for, one row at a time and by the request."""

    def __init__(self) -> None:
        super().__init__()
        self.table = twins()

    def some(self, data: Any, rows: list[int]) -> list[int]:
        chosen: list[int] = data.draw(st.lists(st.sampled_from(rows), unique=True, max_size=ROWS)) if rows else []
        return chosen

    @rule(path=PATHS, tier=st.integers(0, TIERS - 1), settle=st.booleans(), before=st.integers(0, 4), tail=st.integers(0, 30))
    def write_a_chain(self, path, tier, settle, before, tail) -> None:
        keys = chain((*path, *[3] * tail))
        before = min(before, len(path) - 1)
        rows = self.table.add_chain(tuple(keys[before:]), keys[before - 1] if before else ROOT, before, self.table.row(key(path[:before])))
        rows = rows[self.table.state[tier][rows] == ABSENT]
        slots = [self.slots() for _ in rows]
        if settle:
            self.table.settle(rows, tier, slots)
            self.leased += rows.tolist()
        else:
            self.table.begin(rows[::-1], tier, slots)
        self.table.links(rows)

    @rule(data=st.data(), tier=st.integers(0, TIERS - 1))
    def commit_many(self, data, tier) -> None:
        self.table.commit(self.some(data, self.rows(tier, WRITING)), tier)

    @rule(data=st.data(), tier=st.integers(0, TIERS - 1), state=st.sampled_from([WRITING, READY]))
    def drop_many(self, data, tier, state) -> None:
        self.table.drop(self.some(data, [row for row in self.rows(tier, state) if not self.table.readers[tier, row]]), tier)

    @rule(path=PATHS)
    def claim(self, path) -> None:
        rows = self.table.find(chain(path))
        self.table.lease(rows)
        self.table.use(rows)
        self.leased += rows.tolist()

    @rule(path=PATHS)
    def claim_at_once(self, path) -> None:
        self.leased += self.table.claim(chain(path)).tolist()

    @rule(path=PATHS, tier=st.integers(0, TIERS - 1), tail=st.integers(1, 30))
    def settle_a_chain_at_once(self, path, tier, tail) -> None:
        keys = chain((*path, *[3] * tail))
        row = self.table.row
        before = next(
            (index for index, each in enumerate(keys) if row(each) == NO_ROW or self.table.state[tier][row(each)] == ABSENT), len(keys)
        )
        keys, ahead, parent = keys[before:], keys[before - 1] if before else ROOT, row(keys[before - 1]) if before else NO_ROW
        if keys and all(row(each) == NO_ROW or self.table.state[tier][row(each)] == ABSENT for each in keys):
            rows, _ = self.table.settle_chain(keys, ahead, before, parent, tier, [self.slots() for _ in keys])
            self.leased += rows.tolist()

    @precondition(lambda self: self.leased)
    @rule(data=st.data())
    def release_many(self, data) -> None:
        rows = self.some(data, sorted(set(self.leased)))
        for row in rows:
            self.leased.remove(row)
        self.table.release(np.array(rows, np.int64))

    @rule(data=st.data(), tier=st.integers(0, TIERS - 1))
    def ask_who_is_held(self, data, tier) -> None:
        self.table.held(np.array(self.some(data, list(range(self.table.rows))), np.int64), tier)

    @rule(data=st.data())
    def ask_where_they_are(self, data) -> None:
        self.table.warmest(np.array(self.some(data, [*range(self.table.rows), NO_ROW]), np.int64))

    @rule(data=st.data(), tier=st.integers(0, TIERS - 1), call=st.sampled_from(["begin", "commit", "drop", "release", "settle"]))
    def anything_goes_for_all_rows_or_none(self, data, tier, call) -> None:
        rows = np.array(
            self.some(data, [row for row in range(self.table.rows) if self.table._used[row] and row not in self.leased]), np.int64
        )
        before = table_state(self.table)
        more = {"begin": (tier, [self.slots() for _ in rows]), "commit": (tier,), "drop": (tier,), "release": ()}
        try:
            getattr(self.table, call)(rows, *more.get(call, more["begin"]))
        except IntegrityError:
            assert table_state(self.table) == before
        else:
            self.leased += rows.tolist() if call == "settle" else []


@needs_loops
def test_a_table_with_loops_and_one_without_stay_the_same_through_any_history():
    run_state_machine_as_test(TwinMachine, settings=settings(max_examples=120, stateful_step_count=40))


def test_a_table_without_loops_keeps_its_laws(monkeypatch):
    monkeypatch.setattr(columns, "loops", lambda: None)
    run_state_machine_as_test(TableMachine, settings=settings(max_examples=40, stateful_step_count=30))


@needs_loops
def test_tables_stay_the_same_while_they_grow():
    table = twins()
    before, parent = ROOT, NO_ROW
    for depth in range(0, 6000, 500):
        keys = [number.to_bytes(32, "big") for number in range(depth, depth + 500)]
        rows = table.add_chain(keys, before, depth, parent)
        table.settle(rows, 0, rows.tolist())
        before, parent = keys[-1], int(rows[-1])
    table.release(np.arange(6000))
    table.drop(np.arange(5999, 2999, -1), 0)
    assert len(table) == 3000
    table.check_integrity()


@needs_loops
def test_rows_that_do_not_exist_are_refused_like_without_loops():
    table = twins()
    table.settle(table.add_chain(chain((1, 2)), ROOT, 0), 0, [0, 1])
    for row in (5000, 2**62, -(2**62)):
        rows = np.array([0, row])
        for call in (
            lambda rows=rows: table.lease(rows),
            lambda rows=rows: table.use(rows),
            lambda rows=rows: table.release(rows),
            lambda rows=rows: table.begin(rows, 1, [1, 2]),
            lambda rows=rows: table.commit(rows, 0),
            lambda rows=rows: table.drop(rows, 0),
            lambda rows=rows: table.held(rows, 0),
            lambda rows=rows: table.links(rows),
            lambda rows=rows: table.warmest(rows),
        ):
            with pytest.raises(IndexError):
                call()
    for tier in (-9, 9, 2**62):
        with pytest.raises((IndexError, OverflowError)):
            table.commit([0], tier)


@needs_loops
@pytest.mark.parametrize("kind", [list, tuple, UserList])
def test_keys_and_slots_are_any_sequence(kind):
    table, keys = twins(), chain((1, 2, 3, 4))
    first, _ = table.settle_chain(kind(keys[:2]), ROOT, 0, NO_ROW, 0, kind([7, 8]))
    rows = table.add_chain(kind(keys), ROOT, 0)
    table.begin(rows[2:], 0, kind([9, 5]))
    table.commit(rows[2:], 0)
    table.settle(rows, 1, kind(range(4)))
    assert rows[:2].tolist() == first.tolist()
    assert table.find(kind(keys)).tolist() == table.claim(kind(keys)).tolist() == rows.tolist()
    table.check_integrity()


@needs_loops
def test_loops_refuse_what_is_no_column_and_no_rows():
    loops = columns.loops()
    assert loops is not None
    table = PageTable(TIERS, 4)
    with pytest.raises(TypeError, match="19"):
        loops.Table(table.parent)
    links: list[Any] = [table.parent, table.slot, table.readers, *[table.leases] * 10]
    good = [*links, *[table._used] * 2, table.key, table.key, table._free, table.counts]
    loops.Table(*good)
    for place, wrong in enumerate(
        (table._used, table._free, table.parent, *[table._free] * 12, table.leases[1:], table._free, table.leases, table.leases)
    ):
        for column_ in (wrong, np.zeros(5, "V0")):
            with pytest.raises(ValueError, match="column|cell"):
                loops.Table(*[column_ if place == index else column for index, column in enumerate(good)])
    with pytest.raises((TypeError, BufferError, ValueError)):
        loops.Table(np.arange(8)[::2], *good[1:])
    native = table.loops
    assert native is not None
    for rows in (np.zeros(3), np.zeros(3, np.int32), np.zeros((1, 3), np.int64), b"123", None):
        with pytest.raises((TypeError, BufferError)):
            native.lease(rows)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="room"):
        native.find(loops.Index(), [b"", b""], np.zeros(1, np.int64))
    with pytest.raises(TypeError, match="iterable"):
        native.find(loops.Index(), 7, np.zeros(1, np.int64))  # type: ignore[arg-type]
    for size, free_count in ((10**6, 0), (-1, 0), (0, 10**6), (0, -1)):
        table.counts[SIZE], table.counts[UNUSED] = size, free_count
        assert native.add_chain(loops.Index(), [b"k"], b"", 0, NO_ROW, np.zeros(1, np.int64)) == -1
        assert not native.release(np.zeros(0, np.int64), loops.Index())
        assert native.drop(np.zeros(0, np.int64), 0, loops.Index()) is None
    table.counts[SIZE] = table.counts[UNUSED] = 0
    assert native.add_chain(loops.Index(), [b"k"], b"", 1, NO_ROW, np.zeros(1, np.int64)) == -1, "the page before has no row"
    with pytest.raises(ValueError, match="room"):
        native.add_chain(loops.Index(), [b"k", b"l"], b"", 0, NO_ROW, np.zeros(1, np.int64))
    for strange in (np.array([-1]), np.array([10**9]), np.array([0])):
        assert not native.names(strange, np.zeros(1, np.int64)), "no such row, or one without a key"
    assert len(table) == 0


@needs_loops
def test_a_column_that_went_wrong_leads_nowhere():
    table = PageTable(TIERS, 4)
    rows = table.add_chain(chain((1, 2)), ROOT, 0)
    table.settle(rows, 0, [0, 1])
    table.parent[rows] = 2**60
    table._free[:] = -(2**60)
    table._row_of[key((9,))] = 2**32 - 1
    assert table.find([key((9,))]).tolist() == []
    table.release(rows)
    assert table.drop(rows[::-1], 0) == [1, 0]
    table.counts[UNUSED] = 1
    table._free[0] = 2**60
    with pytest.raises(ValueError, match="free"):
        table.add_chain([key((3,))], ROOT, 0)
