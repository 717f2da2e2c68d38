"""The page table: prefixes, links, orphans, copies, holders, open pages."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import IntegrityError
from kvtier.pages import ABSENT, NO_ROW, NO_TIER, READY, WRITING, PageTable
from kvtier.tiers.base import PageId
from tests.pages.rig import PATHS, ROOT, TIERS, chain, key, page, ready


@given(st.lists(st.tuples(PATHS, st.integers(0, TIERS - 1)), max_size=25), PATHS, st.randoms())
def test_find_gives_the_longest_visible_prefix_whatever_came_in_which_order(copies, asked, random):
    """Orphans included: a page whose parents come later, or never."""
    table = PageTable(TIERS, 4)
    visible: dict[tuple[int, ...], set[int]] = {}
    for path, tier in copies:
        row = table.add(page(path), table.row(key(path[:-1])) if random.random() < 0.5 else NO_ROW)
        if table.state[tier, row] == ABSENT:
            table.begin([row], tier, [row])
            table.check_integrity()
            assert key(path) in {table.key[row]}
            if random.random() < 0.8:
                table.commit([row], tier)
                visible.setdefault(path, set()).add(tier)
    table.check_integrity()
    found = table.find(chain(asked))
    wanted = 0
    while wanted < len(asked) and visible.get(asked[: wanted + 1]):
        wanted += 1
    assert [table.key[row] for row in found] == chain(asked)[:wanted]
    assert table.warmest(found).tolist() == [min(visible[asked[: end + 1]]) for end in range(wanted)]
    for end, row in enumerate(found.tolist()):
        parent = int(table.parent[row])
        assert (parent == NO_ROW) if end == 0 else table.key[parent] == key(asked[:end])
        assert table.page_id(row) == page(asked[: end + 1])
    for path in visible:
        assert table.page_id(table.row(key(path))) == page(path)


@given(st.lists(st.tuples(PATHS, st.integers(0, TIERS - 1)), min_size=1, max_size=25, unique=True), st.randoms())
def test_when_the_last_copy_goes_every_hollow_row_goes_too(copies, random):
    table = PageTable(TIERS, 4)
    for path, tier in copies:
        row = table.add(page(path))
        table.begin([row], tier, [row])
    random.shuffle(copies)
    for path, tier in copies:
        row = table.row(key(path))
        assert table.drop([row], tier) == [row]
        table.check_integrity()
    assert len(table) == 0
    assert table.find(chain((0, 1))).tolist() == []


def test_dropping_the_leaf_reaps_all_its_hollow_ancestors_at_once():
    table = PageTable(TIERS, 4)
    *before, leaf = [ready(table, (0, 1, 2, 3)[:end]) for end in (1, 2, 3, 4)]
    for row in before:
        table.drop([row], 0)
    assert len(table) == 4
    assert table.find(chain((0, 1, 2, 3))).tolist() == [], "no page before it is visible"
    table.drop([leaf], 0)
    assert len(table) == 0
    again = ready(table, (5,))
    assert table.parent_key[again] == ROOT
    assert math.isnan(table.attention[again])
    table.check_integrity()


def test_a_hollow_row_that_gets_its_own_copy_learns_its_parent_key():
    for path in ((0, 1), (0, 1, 2)):
        table = PageTable(TIERS, 4)
        ready(table, path, tier=2)
        for end in range(1, len(path)):
            ready(table, path[:end], tier=1)
        for end in range(1, len(path) + 1):
            assert table.page_id(table.row(key(path[:end]))) == page(path[:end])
        table.check_integrity()


def test_an_orphan_is_linked_when_its_parent_appears():
    table = PageTable(TIERS, 4)
    orphan = ready(table, (0, 1, 2), tier=2)
    middle = table.row(key((0, 1)))
    assert table.parent[orphan] == middle
    assert table.parent[middle] == NO_ROW
    first = ready(table, (0,), tier=1)
    assert ready(table, (0, 1), tier=1) == middle
    assert table.parent[middle] == first
    assert table.find(chain((0, 1, 2))).tolist() == [first, middle, orphan]
    table.check_integrity()


@given(st.lists(st.tuples(PATHS, st.integers(1, 5)), max_size=12))
def test_a_chain_added_at_once_is_what_adding_page_by_page_gives(sequences):
    one, all_ = PageTable(TIERS, 4), PageTable(TIERS, 4)
    for path, count in sequences:
        path, first = path[:count], max(0, len(path[:count]) - 3)
        keys = chain(path)
        parents = [one.row(key(path[:first])), all_.row(key(path[:first]))]
        rows: list[int] = []
        for end in range(first, len(path)):
            rows.append(one.add(page(path[: end + 1]), rows[-1] if rows else parents[0]))
        together = all_.add_chain(keys[first:], key(path[:first]), first, parents[1])
        assert [all_.key[row] for row in together] == [one.key[row] for row in rows] == keys[first:]
        for table, added in ((one, rows), (all_, together.tolist())):
            fresh = [row for row in added if table.state[1, row] == ABSENT]
            table.begin(fresh, 1, fresh)
        for ours, theirs in zip(together.tolist(), rows, strict=True):
            assert all_.page_id(ours) == one.page_id(theirs)
            assert all_.children[ours] == one.children[theirs]
        one.check_integrity()
        all_.check_integrity()
    assert len(one) == len(all_)


@given(st.lists(st.tuples(PATHS, st.integers(0, TIERS - 1)), min_size=1, max_size=25, unique=True), st.integers(1, 8))
def test_copies_dropped_many_at_once_leave_nothing_behind(copies, at_once):
    table = PageTable(TIERS, 4)
    for path, tier in copies:
        row = table.add(page(path))
        table.begin([row], tier, [row])
    for tier in range(TIERS):
        rows = [table.row(key(path)) for path, where in copies if where == tier]
        for start in range(0, len(rows), at_once):
            assert table.drop(rows[start : start + at_once], tier) == rows[start : start + at_once]
            table.check_integrity()
    assert len(table) == 0


def test_what_is_refused_for_one_row_is_done_for_none():
    table = PageTable(TIERS, 4)
    first, second = ready(table, (1,)), ready(table, (2,))
    waiting = table.add(page((3,)))
    table.begin([waiting], 0, [9])
    table.lease(np.array([first]))
    table.hold([second], 0)
    for refused in (
        lambda: table.begin([waiting, first], 0, [1, 2]),
        lambda: table.commit([waiting, first], 0),
        lambda: table.drop([first, second], 0),
        lambda: table.drop([first], 1),
        lambda: table.release([first, second]),
    ):
        with pytest.raises(IntegrityError):
            refused()
    assert table.state[0, [first, second, waiting]].tolist() == [READY, READY, WRITING]
    assert table.leases[[first, second]].tolist() == [1, 0]
    table.check_integrity()


def test_a_table_has_room_for_so_many_tiers_and_no_more():
    with pytest.raises(IntegrityError, match="8"):
        PageTable(9, 4)
    table = PageTable(8, 4)
    for tier in (7, 3):
        ready(table, (1,), tier=tier)
        assert table.warmest(table.find([key((1,))])).tolist() == [tier]
    assert table.ready(7).tolist() == table.ready(3).tolist() == [table.row(key((1,)))]


def test_the_ready_pages_of_a_tier_come_prefixes_first_and_without_open_ones():
    table = PageTable(TIERS, 4)
    rows = [ready(table, path) for path in ((1, 2, 3), (1, 2), (5, 6), (1,))]
    table.open(rows[0], 77, 3)
    ready(table, (9,), tier=1)
    assert [int(table.depth[row]) for row in table.ready(0)] == [0, 1, 1, 2]
    assert set(table.ready(0).tolist()) == set(rows)


# Copies


def test_a_copy_is_invisible_until_committed_and_cannot_be_begun_twice():
    table = PageTable(TIERS, 4)
    row = table.add(page((1,)))
    table.begin([row], 1, [7])
    assert table.find([key((1,))]).tolist() == []
    assert table.warmest(np.array([row])).tolist() == [NO_TIER]
    with pytest.raises(IntegrityError):
        table.begin([row], 1, [8])
    table.commit([row], 1)
    with pytest.raises(IntegrityError):
        table.commit([row], 1)
    assert table.find([key((1,))]).tolist() == [row]
    assert table.has_copy_below(np.array([row]), 0).tolist() == [True]
    assert table.has_copy_below(np.array([row]), 1).tolist() == [False]
    assert table.has_copy_below(np.array([row]), 0, coldest=0).tolist() == [False]
    assert table.drop([row], 1) == [7]
    with pytest.raises(IntegrityError):
        table.drop([row], 1)


def test_a_copy_that_is_read_cannot_be_dropped():
    table = PageTable(TIERS, 4)
    row = ready(table, (1,), tier=1)
    table.hold([row], 1)
    with pytest.raises(IntegrityError):
        table.drop([row], 1)
    table.unhold([row], 1)
    table.drop([row], 1)


# Holders


def test_a_leased_row_stays_without_any_copy_until_the_last_holder_goes():
    table = PageTable(TIERS, 4)
    row = ready(table, (1,), tier=1)
    rows = np.array([row])
    table.lease(rows)
    table.lease(rows)
    table.drop([row], 1)
    assert table.release([row]) == []
    assert table.row(key((1,))) == row
    assert table.release([row]) == []
    assert table.row(key((1,))) == NO_ROW
    with pytest.raises(IntegrityError):
        table.release([row])
    table.check_integrity()


def test_pins_last_as_long_as_they_should_and_do_not_pass_on_with_the_row():
    table = PageTable(TIERS, 4)
    row = ready(table, (1,))
    rows = np.array([row])
    table.pin(rows, 1, 10.0)
    assert table.pinned(row, 9.9) == 1
    assert table.pinned(row, 10.0) == NO_TIER
    table.pin(rows, 2, math.inf)
    assert table.pinned(row, 1e12) == 2
    table.unpin(rows)
    assert table.pinned(row, 0.0) == NO_TIER
    table.pin(rows, 0, math.inf)
    table.drop([row], 0)
    assert ready(table, (2,)) == row
    assert table.pinned(row, 0.0) == NO_TIER


# Open pages


def test_an_open_page_is_invisible_and_gone_with_its_last_holder():
    table = PageTable(TIERS, 4)
    parent = ready(table, (1,), slot=5)
    row = table.open(parent, 6, 1)
    table.check_integrity()
    assert table.find(chain((1, 1))).tolist() == [parent]
    with pytest.raises(IntegrityError):
        table.page_id(row)
    table.lease(np.array([row]))
    assert table.release([row]) == []
    assert table.release([row]) == [6]
    assert table.children[parent] == 0
    table.check_integrity()


def test_sealing_makes_the_page_visible_under_its_key_and_moves_the_lease():
    table = PageTable(TIERS, 4)
    parent = ready(table, (1,), slot=5)
    sealed, spare = table.seal(table.open(parent, 6, 1), page((1, 2)))
    assert spare == -1
    assert table.find(chain((1, 2))).tolist() == [parent, sealed]
    assert (table.slot[0, sealed], table.leases[sealed], table.children[parent]) == (6, 1, 1)
    table.check_integrity()


@pytest.mark.parametrize("where", [0, 1, "hollow"])
def test_sealing_a_page_that_exists_joins_it(where):
    table = PageTable(TIERS, 4)
    parent = ready(table, (1,), slot=5)
    if where == "hollow":
        ready(table, (1, 2, 3), tier=2)
        before = table.row(key((1, 2)))
    else:
        before = ready(table, (1, 2), tier=where, slot=9)
        table.lease(np.array([before]))
    sealed, spare = table.seal(table.open(parent, 6, 1), page((1, 2)))
    assert sealed == before
    assert spare == (6 if where == 0 else -1)
    assert table.slot[0, sealed] == (9 if where == 0 else 6)
    assert table.leases[sealed] == (1 if where == "hollow" else 2)
    assert table.state[0, sealed] == READY
    table.check_integrity()


def test_sealing_a_page_that_is_on_its_way_up_is_refused_and_changes_nothing():
    table = PageTable(TIERS, 4)
    row = ready(table, (1,), tier=1)
    table.begin([row], 0, [3])
    open_row = table.open(NO_ROW, 6, 0)
    with pytest.raises(IntegrityError, match="way up"):
        table.seal(open_row, page((1,)))
    assert table.state[0, row] == WRITING
    table.check_integrity()


def test_rows_keep_their_numbers_when_the_table_grows():
    table = PageTable(TIERS, 4)
    rows = [table.add(PageId(number.to_bytes(32, "big"), ROOT, 0)) for number in range(3000)]
    table.begin(rows, 2, list(range(3000)))
    assert rows == list(range(3000))
    assert [table.row(number.to_bytes(32, "big")) for number in range(3000)] == rows
    assert table.slot[2, rows].tolist() == rows
    table.check_integrity()
