"""Who may not leave: holders, readers, pins, and pages that others build on."""

from __future__ import annotations

import math

import numpy as np

from kvtier.pages import PageTable
from kvtier.residency.protection import Protected
from tests.pages.rig import key, page, ready

DEVICE, HOST, LAST = 0, 1, 2


def kept(table: PageTable, tier: int, *questions: list[int], now: float = 0.0) -> list[list[bool]]:
    """The answers to some questions asked one after the other."""
    with Protected(table, tier, now) as protected:
        return [protected(np.array(rows)).tolist() for rows in questions]


def test_a_lease_keeps_the_device_copy_or_what_it_will_be_made_from():
    table = PageTable(3, 4)
    both, cold = ready(table, (1,)), ready(table, (2,), tier=HOST)
    ready(table, (1,), tier=HOST)
    table.lease(np.array([both, cold]))
    assert kept(table, DEVICE, [both]) == [[True]]
    assert kept(table, HOST, [both, cold]) == [[False, True]]


def test_a_reader_keeps_a_copy_in_its_tier_only():
    table = PageTable(3, 4)
    row = ready(table, (1,))
    ready(table, (1,), tier=HOST)
    table.hold([row], HOST)
    assert (kept(table, DEVICE, [row]), kept(table, HOST, [row])) == ([[False]], [[True]])


def test_a_pin_keeps_the_last_copy_that_is_warm_enough_while_it_lasts():
    table = PageTable(3, 4)
    row = ready(table, (1,), tier=HOST)
    table.pin(np.array([row]), HOST, 10.0)
    ready(table, (1,), tier=LAST)
    assert kept(table, HOST, [row], now=9.0) == [[True]]
    assert kept(table, HOST, [row], now=10.0) == [[False]]
    ready(table, (1,), tier=DEVICE)
    assert kept(table, HOST, [row], now=9.0) == [[False]], "the device copy is warm enough, too"
    assert kept(table, DEVICE, [row], now=9.0) == [[False]]
    table.pin(np.array([row]), DEVICE, 10.0)
    assert kept(table, DEVICE, [row], now=9.0) == [[True]]


def test_the_last_copy_of_a_page_that_others_build_on_stays_until_they_leave_with_it():
    table = PageTable(3, 4)
    first, second, third = (ready(table, (1, 2, 3)[:end], tier=LAST) for end in (1, 2, 3))
    assert kept(table, LAST, [first]) == [[True]]
    assert kept(table, LAST, [third, second, first]) == [[False, False, False]]
    assert kept(table, LAST, [third], [second], [first]) == [[False], [False], [False]]
    table.check_integrity()
    ready(table, (1, 2, 3), tier=DEVICE)
    assert kept(table, LAST, [third, second, first]) == [[False, True, False]], "the leaf lives on above, so its parent is needed"
    ready(table, (1, 2), tier=HOST)
    assert kept(table, LAST, [third, second]) == [[False, False]]


def test_with_one_tier_a_parent_follows_its_children_and_a_hollow_child_keeps_it():
    table = PageTable(1, 4)
    rows = [ready(table, (1, 2, 3)[:end]) for end in (1, 2, 3)]
    assert kept(table, 0, rows[::-1]) == [[False, False, False]]
    table.drop([rows[1]], 0)
    assert table.row(key((1, 2))) == rows[1], "it has a child"
    assert kept(table, 0, [rows[2], rows[0]]) == [[False, True]]
    table.check_integrity()


def test_an_orphan_of_which_only_a_colder_tier_knows_counts_too():
    table = PageTable(2, 4)
    orphan = ready(table, (1, 2), tier=1)
    parent = table.add(page((1,)))
    table.begin([parent], 1, [50])
    table.commit([parent], 1)
    assert kept(table, 1, [parent]) == [[True]]
    assert kept(table, 1, [orphan, parent]) == [[False, False]]
    assert math.isinf(table.pin_until[orphan])
