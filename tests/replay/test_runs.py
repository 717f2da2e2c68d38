"""Rows: capacities as they are written, what lies between LRU and the optimum, tiers and what moved between them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import ConfigError, KVTierError
from kvtier.policy import POLICIES
from kvtier.replay.capacities import Capacity, Layout, check_policies
from kvtier.replay.optimum import OPTIMUM
from kvtier.replay.runs import replay_capacities, replay_tiers
from kvtier.replay.trace import Trace, build_trace
from kvtier.replay.workloads import make_requests
from tests.replay.rig import trace_of, traces


def quietly(done: int, total: int, what: str) -> None:
    assert 0 <= done <= total
    assert what


@pytest.fixture(scope="module")
def chats() -> Trace:
    return build_trace("chats", make_requests({"chat": 1.0}, 400, 3.4, 0))


@pytest.mark.parametrize(
    ("text", "pages"), [("5%", 5), (".5%", 1), (" 29% ", 29), ("100%", 100), ("0.999%", 1), ("7", 7), ("100", 100), ("12.5%", 12)]
)
def test_capacities_are_rounded_down_exactly_and_never_to_nothing(text, pages):
    assert Capacity.parse(text).pages(trace_of(*([page] for page in range(100)))) == pages


@pytest.mark.parametrize("text", ["", "0", "0%", "-1%", "101%", "100.1%", "1.5", "five", "1e3", "nan", "inf%", "%", ".", "5 %%"])
def test_capacities_out_of_range_are_refused(text):
    with pytest.raises(KVTierError, match="capacity"):
        Capacity.parse(text)


def test_more_pages_than_there_are_is_refused():
    with pytest.raises(KVTierError, match="capacity 3: t has 2 distinct pages"):
        Capacity.parse("3").pages(trace_of([0], [1]))


def test_policies_are_known_or_refused():
    assert check_policies(["lru", "all", "lru"]) == ["lru", *(name for name in POLICIES if name != "lru")]
    with pytest.raises(ConfigError, match=r"unknown eviction policy 'mru'; known: a2cr, lru, "):
        check_policies(["lru", "mru"])


def test_rows_of_one_tier(chats):
    rows = replay_capacities([chats], ["a2cr-classic"], [Capacity.parse("2%"), Capacity.parse("100%")], None, quietly)
    assert [(row.policy, row.capacity) for row in rows] == [(name, size) for size in ("2%", "100%") for name in ("a2cr-classic", OPTIMUM)]
    ours, optimum, all_of_it, all_there_is = rows
    lru = replay_capacities([chats], ["lru"], [Capacity.parse("2%")], None, quietly)[0]
    assert ours.gap_closed == pytest.approx((ours.token_hit_ratio - lru.token_hit_ratio) / (optimum.token_hit_ratio - lru.token_hit_ratio))
    assert (lru.gap_closed, optimum.gap_closed) == (0, 1)
    assert all_of_it.token_hit_ratio == all_there_is.token_hit_ratio
    assert all_of_it.gap_closed is None
    shown = ours.as_json()
    assert shown["page_bytes"] == 64 * 2**20
    assert shown["bytes_moved"] == (ours.written_pages or 0) * 64 * 2**20 > 0
    assert {"trace", "policy", "capacity", "capacity_pages", "token_hit_ratio", "block_hit_ratio", "gap_closed", "accesses_per_s"} <= set(
        shown
    )
    assert optimum.as_json()["bytes_moved"] is None


def test_rows_of_several_tiers_add_up(chats):
    layout = Layout.parse("device=2%,host=5%,disk=10%", "write_back/write_through", 2, [2e9], [50.0])
    row = replay_tiers([chats], ["lru/a2cr-classic/lru"], [layout], 1000, quietly)[0]
    assert (row.policy, row.capacity) == ("lru/a2cr-classic/lru", "device=2%,host=5%,disk=10%")
    assert row.token_hit_ratio == pytest.approx(sum(tier.token_hit_ratio for tier in row.tiers))
    assert row.block_hit_ratio == pytest.approx(sum(tier.block_hit_ratio for tier in row.tiers))
    assert row.capacity_pages == sum(tier.capacity_pages for tier in row.tiers)
    assert row.tiers[0].link is None
    assert all(tier.link is not None and set(tier.link.in_place) == {50.0} for tier in row.tiers[1:])
    shown = row.as_json()
    assert shown["bytes_moved"] == 1000 * sum(move.pages for move in row.moved) > 0
    served_below = round(sum(tier.block_hit_ratio for tier in row.tiers[1:]) * chats.accesses)
    assert sum(move.pages for move in row.moved if move.target == "device") == served_below


@given(trace=traces(moments=False))
def test_exclusive_lru_tiers_close_nothing_of_the_gap(trace):
    longest = int(trace.lengths.max())
    if trace.distinct < 2 * longest:
        return
    layout = Layout.parse(f"a={longest},b={longest}", "exclusive")
    row = replay_tiers([trace], ["lru"], [layout], None, quietly)[0]
    assert row.gap_closed in (0, None)


@given(trace=traces(), share=st.integers(1, 100))
def test_ratios_are_shares_and_the_optimum_is_on_top(trace, share):
    rows = replay_capacities([trace], list(POLICIES), [Capacity.parse(f"{share}%")], None, quietly)
    assert all(0 <= row.block_hit_ratio <= rows[-1].block_hit_ratio <= 1 for row in rows)
    assert all(0 <= row.token_hit_ratio <= 1 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("device",), "expected names and capacities"),
        (("=1%,host=2%",), "expected names and capacities"),
        (("a=1%,a=2%",), "expected names and capacities"),
        (("a=1%,b=0%",), "capacity '0%'"),
        (("a=1%,b=2%", "write_often"), "unknown write policy 'write_often'; known: exclusive, write_back"),
        (("a=1%,b=2%", "write_back/write_back"), "--write-policy: 2 values for 1 tiers"),
        (("a=1%,b=2%,c=3%", "exclusive/write_back"), "exclusive tiers do not mix"),
        (("a=1%,b=2%", "write_back", 2, [1e9, 2e9]), "--link-speed: 2 values for 1 tiers"),
    ],
)
def test_layouts_that_make_no_sense_are_refused(arguments, expected):
    with pytest.raises(KVTierError, match=expected):
        Layout.parse(*arguments)


def test_one_policy_for_all_tiers_or_one_for_each():
    layout = Layout.parse("a=1%,b=2%")
    assert layout.policies("lru") == ["lru", "lru"]
    assert layout.policies("lru/a2cr-classic") == ["lru", "a2cr-classic"]
    with pytest.raises(KVTierError, match="--policy: 3 values for 2 tiers"):
        layout.policies("lru/lru/a2cr-classic")
    with pytest.raises(ConfigError, match="mru"):
        layout.policies("lru/mru")
