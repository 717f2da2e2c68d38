"""Reading traces: columns as the file has them, and one clear error for what is no trace."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from kvtier.errors import TraceError
from kvtier.policy import ROOT
from kvtier.replay.trace import Request, build_trace, read_trace, write_trace
from tests.replay.rig import BLOCK, parents_of, prompts_of, public_trace, traces

GOOD = {"timestamp": 0, "input_length": 700, "output_length": 3, "hash_ids": [10, 11]}


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_columns_are_those_of_the_file(tmp_path: Path):
    trace = read_trace(
        write(tmp_path / "mooncake_mine.jsonl", GOOD, "", GOOD | {"timestamp": 2500.5, "input_length": 1030, "hash_ids": [10, 2**70, -1]})
    )
    assert trace.name == "mine"
    assert (trace.requests, trace.accesses, trace.distinct, trace.tokens, trace.backwards) == (2, 5, 4, 1730, 0)
    assert trace.at_s.tolist() == [0.0, 2.5005]
    assert trace.output_tokens.tolist() == [3, 3]
    assert trace.starts.tolist() == [0, 2, 5]
    assert trace.pages.tolist() == [0, 1, 0, 2, 3]
    assert trace.parents.tolist() == [ROOT, 0, ROOT, 0, 2]
    assert trace.depths.tolist() == [0, 1, 0, 1, 2]
    assert trace.first_seen.tolist() == [True, True, False, True, True]
    assert trace.hit_tokens(trace.lengths) == trace.tokens, "the last page counts its real tokens"
    assert trace.hit_tokens(trace.lengths - 1) == 512 + 1024


@given(trace=traces())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_written_trace_is_read_back_packed_or_not(tmp_path: Path, trace):
    requests = [
        Request(at_s * 1000, tokens, output, [page * 7 - 3 for page in prompt])
        for at_s, tokens, output, prompt in zip(
            trace.at_s.tolist(), trace.input_tokens.tolist(), trace.output_tokens.tolist(), prompts_of(trace), strict=True
        )
    ]
    for name in ("t.jsonl", "t.jsonl.gz"):
        path = tmp_path / name
        with gzip.open(path, "wt") if name.endswith("gz") else path.open("w") as file:
            assert write_trace(requests, file) == trace.requests
        again = read_trace(path, BLOCK)
        assert again.name == "t"
        assert prompts_of(again) == prompts_of(trace)
        assert again.at_s.tolist() == trace.at_s.tolist()
        assert again.input_tokens.tolist() == trace.input_tokens.tolist()
        assert dict(zip(again.pages.tolist(), again.parents.tolist(), strict=True)) == parents_of(trace)


def test_timestamps_that_run_backwards_are_counted_and_stand_still(tmp_path: Path):
    stamps = (5000, 1000, 5000, 7000, 6999)
    trace = read_trace(write(tmp_path / "t.jsonl", *(GOOD | {"timestamp": stamp} for stamp in stamps)))
    assert trace.backwards == 2
    assert trace.at_s.tolist() == [5.0, 5.0, 5.0, 7.0, 7.0]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("no json", "line 2 is not a JSON object"),
        ("[" * 100_000, "line 2 is not a JSON object"),
        ("[]", "line 2 is not a JSON object"),
        ({}, "line 2: timestamp is null"),
        (GOOD | {"timestamp": -1}, "line 2: timestamp is -1"),
        (GOOD | {"timestamp": float("nan")}, "line 2: timestamp is NaN"),
        (GOOD | {"timestamp": "now"}, 'line 2: timestamp is "now"'),
        (GOOD | {"timestamp": True}, "line 2: timestamp is true"),
        (GOOD | {"input_length": 0}, "line 2: input_length is 0.*at least 1"),
        (GOOD | {"input_length": 700.5}, "line 2: input_length is 700.5"),
        (GOOD | {"output_length": -1}, "line 2: output_length is -1"),
        (GOOD | {"hash_ids": None}, "line 2: hash_ids is null"),
        (GOOD | {"hash_ids": [1, "2"]}, "line 2: hash_ids"),
        (GOOD | {"hash_ids": [1, True]}, "line 2: hash_ids"),
        (GOOD | {"hash_ids": [10]}, "line 2: 1 hash_ids for 700 tokens; expected 2.*--block-tokens"),
        (GOOD | {"hash_ids": [11, 10]}, "line 2: block 11 follows another block.*convert"),
        (GOOD | {"hash_ids": [10, 10]}, "line 2: block 10 follows another block"),
    ],
)
def test_a_line_that_is_no_request_is_named(tmp_path: Path, line, expected):
    path = write(tmp_path / "t.jsonl", GOOD, line)
    with pytest.raises(TraceError, match=expected) as caught:
        read_trace(path)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(("name", "content"), [("t.jsonl", b""), ("t.jsonl", b"\n \n"), ("t.jsonl", b"\xff\xfe"), ("t.jsonl.gz", b"plain")])
def test_a_file_without_requests_is_refused(tmp_path: Path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TraceError, match=name):
        read_trace(path)


def test_a_missing_file_and_a_cut_archive_are_refused(tmp_path: Path):
    with pytest.raises(TraceError, match="cannot read"):
        read_trace(tmp_path / "missing.jsonl")
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(GOOD).encode() * 100)[:40])
    with pytest.raises(TraceError, match="cannot read"):
        read_trace(path)
    with pytest.raises(TraceError, match="at least 1"):
        build_trace("t", [], block_tokens=0)


@pytest.mark.parametrize(
    ("name", "requests", "accesses", "distinct"), [("conversation", 12031, 288500, 182790), ("synthetic", 3993, 121877, 43924)]
)
def test_the_public_traces_are_read_whole(name, requests, accesses, distinct):
    trace = public_trace(name)
    assert (trace.name, trace.requests, trace.accesses, trace.distinct, trace.backwards) == (name, requests, accesses, distinct, 0)
