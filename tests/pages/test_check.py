"""The check of the page table finds every contradiction that tests put into its columns."""

from __future__ import annotations

import numpy as np
import pytest

from kvtier.errors import IntegrityError
from kvtier.pages import ABSENT, NO_ROW, READY, PageTable
from kvtier.pages.columns import UNUSED
from tests.pages.rig import TIERS, key, ready


def corruptible() -> tuple[PageTable, dict[str, int]]:
    """A sound table with a chain of two pages, an orphan and an open page, and their rows."""
    table = PageTable(TIERS, 4)
    rows = {"first": ready(table, (1,), slot=1), "second": ready(table, (1, 2), slot=2)}
    rows["orphan"] = ready(table, (7, 7), tier=2, slot=1)
    rows["hollow"] = table.row(key((7,)))
    rows["open"] = table.open(rows["second"], 3, 2)
    table.lease(np.array([rows["first"]]))
    table.check_integrity()
    return table, rows


def give_up(table: PageTable, *rows: int) -> None:
    """Put rows on the free list and nowhere else."""
    table._free[: len(rows)] = rows
    table.counts[UNUSED] = len(rows)


CORRUPTIONS = {
    "child count": lambda table, rows: table.children.__setitem__(rows["first"], 2),
    "depth": lambda table, rows: table.depth.__setitem__(rows["second"], 5),
    "parent": lambda table, rows: table.parent.__setitem__(rows["second"], rows["hollow"]),
    "parent gone": lambda table, rows: table.parent.__setitem__(rows["second"], NO_ROW),
    "parent key": lambda table, rows: table.parent_key.__setitem__(rows["second"], key((7,))),
    "key": lambda table, rows: table.key.__setitem__(rows["first"], key((9,))),
    "key lost": lambda table, rows: table.key.__setitem__(rows["second"], None),
    "index": lambda table, rows: table._row_of.__setitem__(key((9,)), rows["first"]),
    "free list": lambda table, rows: give_up(table, rows["first"]),
    "free twice": lambda table, rows: give_up(table, 900, 900),
    "leases": lambda table, rows: table.leases.__setitem__(rows["first"], -1),
    "open page not held": lambda table, rows: table.leases.__setitem__(rows["open"], 0),
    "open page elsewhere": lambda table, rows: table.state.__setitem__((1, rows["open"]), READY),
    "readers": lambda table, rows: table.readers.__setitem__((0, rows["first"]), -1),
    "reading what is not there": lambda table, rows: table.readers.__setitem__((1, rows["first"]), 1),
    "empty row": lambda table, rows: table.state.__setitem__((2, rows["orphan"]), ABSENT),
    "slot": lambda table, rows: table.slot.__setitem__((0, rows["second"]), 1),
}


@pytest.mark.parametrize("what", CORRUPTIONS)
def test_the_check_finds_a_corrupted(what):
    table, rows = corruptible()
    CORRUPTIONS[what](table, rows)
    with pytest.raises(IntegrityError):
        table.check_integrity()


def test_the_tier_check_finds_strangers_and_missing_ones():
    table, rows = corruptible()
    both = {rows["first"], rows["second"]}
    table.check_tier(0, both)
    for wrong in ({rows["first"]}, both | {rows["orphan"]}, both | {rows["open"]}):
        with pytest.raises(IntegrityError):
            table.check_tier(0, wrong)
