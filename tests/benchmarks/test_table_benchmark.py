"""The table benchmark runs, replays real traces rightly and refuses what is none. No time of it is judged here."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from benchmarks.stream import CHATS_PER_S, Replay, chats, page_key, read_stream, stream_of
from kvtier.cli import main
from kvtier.errors import KVTierError
from kvtier.policy import make_policy
from kvtier.replay.lab import replay
from kvtier.replay.trace import build_trace
from kvtier.replay.workloads import make_requests

TRACES = Path(os.environ.get("KVTIER_TRACES", Path(__file__).parents[3] / "shared" / "traces"))


def test_a_tiny_run_reports_operations_and_the_stream(capsys, tmp_path: Path):
    plot = tmp_path / "plot.svg"
    assert main(["bench", "table", "--tiny", "--repeats", "1", "--json", "-", "--plot", str(plot)]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    operations = {f"table.{name}.1e2" for name in ("lookup", "lease", "rewrite")}
    operations |= {f"{policy}.{name}.1e3" for policy in ("lru", "a2cr", "lfu", "a2cr-classic") for name in ("touch", "evict")}
    named = ("lru", "lru.p99", "lru.hit_ratio", "lru.ticking", "lru.busy", "a2cr", "a2cr.busy", "a2cr-classic", "hit_ratio")
    streams = {f"stream.chats.{name}" for name in named}
    assert operations | streams <= set(rows)
    assert all(row["value"] > 0 for row in rows.values())
    assert plot.read_text().startswith("<?xml")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "policy", "share", "hit_ratio"),
    [
        ("conversation", "lru", 0.05, 0.2001),
        ("conversation", "lru", 0.01, 0.0535),
        ("conversation", "lru", 1.0, 0.3736),
        ("synthetic", "lru", 0.05, 0.1596),
        ("conversation", "lru-2", 0.01, 0.1057),  # without ghosts, or with ghosts by row: .08 or less
    ],
)
def test_replays_of_the_public_traces_find_what_others_found(name, policy, share, hit_ratio):
    path = TRACES / f"mooncake_{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here; set KVTIER_TRACES to the folder of the Mooncake traces")
    stream = read_stream(path)
    assert stream.name == name
    with Replay(policy, int(stream.distinct * share)) as replay:
        for request in stream.requests:
            replay.serve(request)
        replay.residency.check_integrity()
        assert not replay.residency.table.leases.any()
    assert replay.hit_tokens / replay.tokens == pytest.approx(hit_ratio, abs=1e-4)


@pytest.mark.parametrize("policy", ["a2cr", "lru", "a2cr-classic"])
@pytest.mark.parametrize("ticking", [False, True])
def test_a_replay_with_little_room_keeps_heads_and_leaves_nothing_held(policy, ticking):
    stream = chats(100)
    longest = max(len(request.keys) for request in stream.requests)
    with Replay(policy, longest // 2, ticking) as replay:
        for request in stream.requests:
            replay.serve(request)
            found = len(replay.residency.table.find(request.keys))
            assert found == min(len(request.keys), longest // 2)
        replay.residency.check_integrity()


@pytest.mark.parametrize("policy", ["a2cr", "lru"])
def test_a_busy_replay_holds_the_pages_of_the_last_requests_as_far_as_there_is_room(policy):
    stream, at_once = chats(300), 4
    longest = max(len(request.keys) for request in stream.requests)
    most = 0
    with Replay(policy, 2 * longest, under_way=at_once) as replay:
        for request in stream.requests:
            replay.serve(request)
            most = max(most, len(replay.held))
            held = {row for rows in replay.held for row in rows.tolist()}
            assert np.flatnonzero(replay.residency.table.leases).tolist() == sorted(held)
        replay.residency.check_integrity()
    assert 1 < most <= at_once


@pytest.mark.parametrize("policy", ["lru", "a2cr-classic"])
@pytest.mark.parametrize("share", [0.02, 0.2])
def test_the_live_caches_bookkeeping_finds_what_the_laboratory_finds(policy, share):
    trace = build_trace("chats", make_requests({"chat": 0.6, "scan": 0.4}, 300, CHATS_PER_S, seed=2))
    capacity = int(share * trace.distinct)
    with Replay(policy, capacity) as live:
        for request in stream_of(trace).requests:
            live.serve(request)
    assert live.hit_tokens == trace.hit_tokens(replay(trace, make_policy(policy), capacity).hit_pages)


def test_made_up_chats_are_the_same_every_time_and_keys_stand_for_pages():
    stream = chats(150)
    assert stream == chats(150)
    assert stream.distinct < stream.pages
    assert [request.at_s for request in stream.requests] == sorted(request.at_s for request in stream.requests)
    trace = build_trace("chats", make_requests({"chat": 1.0}, 150, CHATS_PER_S, seed=1))
    assert (stream.pages, stream.distinct) == (trace.accesses, trace.distinct)
    assert [request.keys for request in stream.requests][1] == tuple(map(page_key, trace.pages[trace.starts[1] : trace.starts[2]].tolist()))


def test_a_file_that_is_no_trace_is_one_clear_error(tmp_path: Path):
    path = tmp_path / "trace.jsonl"
    path.write_text("no json\n")
    with pytest.raises(KVTierError, match="line 1"):
        read_stream(path)
    assert main(["bench", "table", "--tiny", "--trace", str(path)]) == 2


@pytest.mark.parametrize("arguments", [("--share", "0"), ("--share", "1.5"), ("--share", "nan"), ("--trace", "/nonexistent")])
def test_bad_input_is_one_line_and_exit_code_2(capsys, arguments):
    assert main(["bench", "table", "--tiny", *arguments]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is here: tests/engines_real/test_table_benchmark.py measures it")
def test_without_vllm_its_bookkeeping_is_refused_before_anything_is_measured(capsys):
    assert main(["bench", "table", "--vllm"]) == 2
    assert "vllm is not installed here" in capsys.readouterr().err
