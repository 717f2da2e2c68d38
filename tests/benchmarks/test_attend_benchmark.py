"""The attend benchmark runs and reports both ways and the router, each with its ceiling. No figure of it is judged here."""

from __future__ import annotations

import json

import pytest

from benchmarks import attend
from benchmarks.measure import Run
from benchmarks.rig import TINY_LAYOUT, Room, open_cache
from kvtier.cli import main
from kvtier.errors import KVTierError


def test_a_tiny_run_reports_both_ways_and_the_router(capsys):
    assert main(["bench", "attend", "--tiny", "--repeats", "1", "--json", "-"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    steps = {f"attend.{way}.{count}steps" for way in ("fetch", "in_place") for count in attend.TINY_STEPS}
    assert set(rows) == steps | {f"attend.mix.{what}" for what in ("fetch", "in_place", "routed", "right")}
    for count in attend.TINY_STEPS:
        assert min(rows[f"attend.{way}.{count}steps"]["ratio"] for way in ("fetch", "in_place")) == 1
    assert all(row["value"] > 0 for name, row in rows.items() if name != "attend.mix.right")
    assert 0 <= rows["attend.mix.right"]["value"] <= 1


@pytest.mark.parametrize(("mode", "attention", "choice"), [("fetch", 0.1, "fetch"), ("in_place", 0.9, "in_place")])
def test_a_request_goes_the_way_it_is_told(mode, attention, choice):
    with open_cache(TINY_LAYOUT, Room(5, host=12), routing__mode=mode) as cache:
        bench = attend.Bench(cache, 64)
        bench.request(attend.Kind("default", 1, attention))
        assert bench.choices == [choice]


def test_prefixes_shorter_than_a_page_are_one_clear_error():
    with pytest.raises(KVTierError, match="--prefix-tokens 8: expected at least one page, 16 tokens"):
        attend.measure(Run(repeats=1), prefix_tokens=8)
