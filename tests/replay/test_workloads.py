"""Made-up traces: the same for the same seed, valid, and with the habits that their descriptions promise."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from kvtier.errors import KVTierError
from kvtier.replay.stats import TraceStats, trace_stats
from kvtier.replay.trace import Trace, build_trace
from kvtier.replay.workloads import WORKLOADS, make_requests
from tests.replay.rig import prompts_of

MIXTURE = {"chat": 0.5, "agents": 0.3, "scan": 0.2}


def made(mix: dict[str, float], requests: int = 1500, seed: int = 3, block_tokens: int = 512) -> Trace:
    return build_trace("made", make_requests(mix, requests, 4.0, seed, block_tokens), block_tokens)


def stats_of(kind: str) -> TraceStats:
    return trace_stats(made({kind: 1.0}, 3000))


@pytest.mark.parametrize("mix", [*({name: 1.0} for name in WORKLOADS), MIXTURE], ids=lambda mix: "+".join(mix))
def test_equal_seeds_make_equal_traces_and_others_do_not(mix):
    lines = [[request.as_json() for request in make_requests(mix, 300, 4.0, seed)] for seed in (3, 3, 4)]
    assert lines[0] == lines[1]
    assert lines[0] != lines[2]
    assert len(lines[0]) == 300


@pytest.mark.parametrize("mix", [*({name: 1.0} for name in WORKLOADS), MIXTURE], ids=lambda mix: "+".join(mix))
def test_every_made_up_trace_is_one_at_any_block_size_in_order_of_time(mix):
    for block_tokens in (16, 512):
        trace = made(mix, 300, block_tokens=block_tokens)
        assert (trace.requests, trace.backwards) == (300, 0)
    again = made(mix, 300, block_tokens=16)
    assert again.input_tokens.tolist() == trace.input_tokens.tolist(), "blocks do not change what is said"


def test_a_mixture_keeps_its_shares_and_the_rate():
    trace = made({"chat": 1.0, "system": 3.0}, 4000)
    single = sum(count == 1 for count in Counter(prompt[-1] for prompt in prompts_of(trace)).values())
    assert single >= 0.9 * trace.requests
    assert trace.requests / trace.at_s[-1] == pytest.approx(4.0, rel=0.25)


def test_chats_grow_and_come_back_after_minutes():
    stats = stats_of("chat")
    assert 0.4 < stats.infinite_token_hit_ratio < 0.75
    assert 60 < stats.reuse_gap_s["p50"] < 180
    assert stats.output_length["mean"] == pytest.approx(340, rel=0.1)


def test_programs_reuse_few_prompts_soon():
    stats = stats_of("system")
    assert stats.infinite_token_hit_ratio > 0.4
    assert stats.never_reused_share > 0.8


def test_retrieval_shares_popular_beginnings_only():
    stats = stats_of("retrieval")
    assert 0.2 < stats.infinite_token_hit_ratio < 0.6
    first = Counter(prompt[0] for prompt in prompts_of(made({"retrieval": 1.0})))
    assert len(first) == 1, "the instructions"


def test_agents_send_nearly_everything_again_within_seconds():
    trace = made({"agents": 1.0}, 3000)
    stats = trace_stats(trace)
    assert stats.infinite_token_hit_ratio > 0.9
    assert stats.reuse_gap_s["p50"] < 20
    assert 30_000 < stats.input_length["mean"] < 90_000
    assert stats.input_length["p99"] < 200_000
    assert len({prompt[0] for prompt in prompts_of(trace)}) <= 6


def test_a_scan_shares_instructions_and_no_document():
    trace = made({"scan": 1.0}, 3000)
    reused = trace.depths[~trace.first_seen]
    assert trace_stats(trace).never_reused_share > 0.98
    assert np.percentile(reused, 90) < 10
    gaps = np.diff(trace.at_s)
    assert np.median(gaps) < 0.2, "a job's requests come ten a second"


@pytest.mark.parametrize(
    ("mix", "requests", "rate", "expected"),
    [
        ({"games": 1.0}, 10, 1.0, "unknown workload 'games'; known: chat, system, retrieval, agents, scan"),
        ({"chat": 0.0}, 10, 1.0, "share 0"),
        ({"chat": float("nan")}, 10, 1.0, "share nan"),
        ({}, 10, 1.0, "no workload"),
        ({"chat": 1.0}, 0, 1.0, "requests: 0"),
        ({"chat": 1.0}, 10, 0.0, "rate: 0"),
        ({"chat": 1.0}, 10, float("inf"), "rate: inf"),
    ],
)
def test_wishes_that_make_no_sense_are_refused(mix, requests, rate, expected):
    with pytest.raises(KVTierError, match=expected):
        make_requests(mix, requests, rate, 0)
