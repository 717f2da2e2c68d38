"""Statistics: beside counting by hand, and on the public traces."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.replay.stats import MOMENTS, percentiles, stack_distances, trace_stats
from tests.replay.rig import prompts_of, public_trace, trace_of, traces


@given(st.lists(st.integers(0, 12), max_size=70))
def test_stack_distances_are_the_different_things_in_between(accesses):
    last: dict[int, int] = {}
    previous, expected = [], []
    for place, thing in enumerate(accesses):
        before = last.get(thing, -1)
        previous.append(before)
        expected.append(-1 if before < 0 else len(set(accesses[before + 1 : place])))
        last[thing] = place
    assert stack_distances(np.array(previous, np.int64)).tolist() == expected


@given(trace=traces())
def test_shares_and_working_set_are_those_of_a_count(trace):
    stats = trace_stats(trace)
    prompts = prompts_of(trace)
    named = [page for prompt in prompts for page in prompt]
    assert stats.never_reused_share * trace.distinct == pytest.approx(sum(named.count(page) == 1 for page in set(named)))
    assert stats.infinite_block_hit_ratio == pytest.approx(1 - len(set(named)) / len(named))
    alive = [
        sum(
            any(page in prompt for prompt in prompts[: place + 1]) and any(page in prompt for prompt in prompts[place + 1 :])
            for page in set(named)
        )
        for place in range(len(prompts))
    ]
    work = stats.working_set
    assert work.peak_pages == max(alive)
    assert work.requests.sum() == trace.requests
    assert len(work.live_pages) == len(work.named_pages) == MOMENTS
    assert work.live_pages[-1] == 0
    assert stats.reuse_gap_s == {} or stats.reuse_gap_s["p5"] >= 0
    assert set(stats.as_json()) >= {"never_reused_share", "reuse_distance", "reuse_gap_s", "working_set", "infinite_token_hit_ratio"}


def test_a_trace_worked_by_hand():
    stats = trace_stats(trace_of([0, 1], [2], [0, 1], tail=2))
    # Tail first: 1 0, 2, 1 0; so page 1 comes back after {0, 2} and page 0 after {2, 1}.
    assert (stats.reuse_distance["p50"], stats.reuse_gap_s["p50"], stats.reuse_gap_s["mean"]) == (2, 2.0, 2.0)
    assert (stats.requests, stats.accesses, stats.distinct_pages, stats.input_tokens) == (3, 5, 3, 6 + 2 + 6)
    assert stats.infinite_token_hit_ratio == pytest.approx(6 / 14)
    assert stats.never_reused_share == pytest.approx(1 / 3)
    assert stats.working_set.peak_pages == 2


def test_nothing_to_rank_has_no_percentiles():
    assert percentiles(np.empty(0, np.int64)) == {}
    assert percentiles(np.array([3])) == dict.fromkeys(("p5", "p10", "p50", "p90", "p95", "p99"), 3) | {"mean": 3.0}


@pytest.mark.parametrize(
    ("name", "infinite", "never", "peak", "distances", "gaps"),
    [
        ("conversation", 0.3736, 0.759, 8138, (48, 8356, 31589, 85268), (0, 114, 519, 1578)),
        ("synthetic", 0.6512, 0.585, 12637, (708, 6264, 20392, 33941), (5, 59, 282, 583)),
    ],
)
def test_the_public_traces_are_as_others_found_them(name, infinite, never, peak, distances, gaps):
    stats = trace_stats(public_trace(name))
    assert stats.infinite_token_hit_ratio == pytest.approx(infinite, abs=1e-4)
    assert stats.never_reused_share == pytest.approx(never, abs=1e-3)
    assert stats.working_set.peak_pages == peak
    shown = ("p10", "p50", "p90", "p99")
    assert tuple(stats.reuse_distance[key] for key in shown) == distances
    assert tuple(stats.reuse_gap_s[key] for key in shown) == pytest.approx(gaps, abs=0.5)


def test_pages_of_a_request_are_used_tail_first():
    assert trace_stats(trace_of([0, 1, 2], [0])).reuse_distance["p50"] == 0
