"""The page table in any order of calls: its columns agree after each, and nothing is left once all was taken away again."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from kvtier.pages import ABSENT, NO_ROW, READY, WRITING, PageTable
from tests.pages.rig import PATHS, TIERS, chain, key, page


class Slots:
    """Slot numbers nobody else has."""

    def __init__(self) -> None:
        self.next = 0

    def __call__(self) -> int:
        self.next += 1
        return self.next


class TableMachine(RuleBasedStateMachine):
    """Everything the residency does with a table, in any order; `check_integrity` after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.table = PageTable(TIERS, 4)
        self.slots = Slots()
        self.leased: list[int] = []
        self.read: list[tuple[int, int]] = []

    def rows(self, tier: int, state: int) -> list[int]:
        here = self.table.state[tier, : self.table.rows] == state
        return [row for row in np.flatnonzero(here).tolist() if self.table.key[row] is not None]

    @rule(path=PATHS, tier=st.integers(0, TIERS - 1), commit=st.booleans())
    def write(self, path, tier, commit) -> None:
        row = self.table.add(page(path), self.table.row(key(path[:-1])))
        if self.table.state[tier, row] == ABSENT:
            self.table.begin([row], tier, [self.slots()])
        if commit and self.table.state[tier, row] == WRITING:
            self.table.commit([row], tier)

    @rule(data=st.data(), tier=st.integers(0, TIERS - 1), state=st.sampled_from([WRITING, READY]))
    def drop(self, data, tier, state) -> None:
        rows = [row for row in self.rows(tier, state) if not self.table.readers[tier, row]]
        if rows:
            self.table.drop([data.draw(st.sampled_from(rows))], tier)

    @rule(path=PATHS)
    def lease(self, path) -> None:
        rows = self.table.find(chain(path))
        self.table.lease(rows)
        self.leased += rows.tolist()

    @precondition(lambda self: self.leased)
    @rule(data=st.data())
    def release(self, data) -> None:
        row = data.draw(st.sampled_from(self.leased))
        self.leased.remove(row)
        self.table.release([row])

    @rule(path=PATHS, keep=st.booleans())
    def open_and_seal(self, path, keep) -> None:
        parent = self.table.row(key(path[:-1]))
        if len(path) > 1 and parent == NO_ROW:
            return
        row = self.table.open(parent, self.slots(), len(path) - 1)
        self.table.check_integrity()
        there = self.table.row(key(path))
        if keep and not (there != NO_ROW and self.table.state[0, there] == WRITING):
            sealed, _ = self.table.seal(row, page(path))
            self.leased.append(sealed)
        else:
            assert len(self.table.release([row])) == 1

    @rule(data=st.data(), tier=st.integers(0, TIERS - 1))
    def hold(self, data, tier) -> None:
        rows = self.rows(tier, READY)
        if rows:
            row = data.draw(st.sampled_from(rows))
            self.table.hold([row], tier)
            self.read.append((row, tier))

    @precondition(lambda self: self.read)
    @rule()
    def unhold(self) -> None:
        row, tier = self.read.pop()
        self.table.unhold([row], tier)

    @invariant()
    def sound(self) -> None:
        self.table.check_integrity()
        for path_key, row in self.table._row_of.items():
            assert self.table.key[row] == path_key

    def teardown(self) -> None:
        """Everything taken away again leaves nothing."""
        for row, tier in self.read:
            self.table.unhold([row], tier)
        for row in self.leased:
            self.table.release([row])
        for tier in range(TIERS):
            for state in (WRITING, READY):
                for row in self.rows(tier, state):
                    self.table.drop([row], tier)
        self.table.check_integrity()
        assert len(self.table) == 0


def test_the_columns_agree_after_any_sequence_of_calls():
    run_state_machine_as_test(TableMachine, settings=settings(max_examples=60, stateful_step_count=30))
