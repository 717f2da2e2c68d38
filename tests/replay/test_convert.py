"""Converters: what another format says survives, what it does not say is told, and what is not that format is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from kvtier.errors import KVTierError, TraceError
from kvtier.replay.convert import FORMATS, Wish, convert, guess_format
from kvtier.replay.trace import Request, Trace, build_trace
from kvtier.replay.workloads import make_requests
from tests.replay.rig import prompts_of


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def lines(*entries: object) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def trace_of(requests: list[Request], block_tokens: int = 512) -> Trace:
    return build_trace("t", requests, block_tokens)


def same(one: Trace, other: Trace) -> None:
    assert prompts_of(one) == prompts_of(other)
    assert one.at_s.tolist() == pytest.approx(other.at_s.tolist())
    assert (one.input_tokens.tolist(), one.output_tokens.tolist()) == (other.input_tokens.tolist(), other.output_tokens.tolist())


def made(block_tokens: int) -> list[Request]:
    requests = list(make_requests({"chat": 0.8, "agents": 0.2}, 60, 3.4, 5, block_tokens))
    begin = requests[0].timestamp
    return [Request(request.timestamp - begin, request.input_length, request.output_length, request.hash_ids) for request in requests]


def test_mooncake_comes_back_as_it_is(tmp_path: Path):
    requests = made(512)
    path = write(tmp_path / "t.jsonl", "".join(request.as_json() + "\n" for request in requests))
    converted = convert(path, "mooncake", Wish())
    same(trace_of(converted.requests), trace_of(requests))
    assert converted.notes == []


def test_small_blocks_become_the_large_ones_that_the_same_prompts_have(tmp_path: Path):
    path = write(tmp_path / "t.jsonl", "".join(request.as_json() + "\n" for request in made(64)))
    same(trace_of(convert(path, "mooncake", Wish(from_block_tokens=64)).requests), trace_of(made(512)))


def test_bailian_has_seconds_and_blocks_of_16(tmp_path: Path):
    entries = [
        {
            "chat_id": place,
            "parent_chat_id": -1,
            "timestamp": 61.114 + request.timestamp / 1000,
            "input_length": request.input_length,
            "output_length": request.output_length,
            "type": "text",
            "turn": 1,
            "hash_ids": request.hash_ids,
        }
        for place, request in enumerate(made(16))
    ]
    path = tmp_path / "qwen.jsonl.gz"
    path.write_bytes(gzip.compress(lines(*entries).encode()))
    same(trace_of(convert(path, "bailian", Wish()).requests), trace_of(made(512)))


def test_ids_that_stand_for_a_block_alone_get_to_stand_for_a_prefix(tmp_path: Path):
    entry = {"timestamp": 0, "input_length": 64, "output_length": 1}
    path = write(
        tmp_path / "t.jsonl",
        lines(entry | {"hash_ids": [1, 2, 3, 4]}, entry | {"hash_ids": [9, 2, 3, 4]}, entry | {"hash_ids": [1, 2, 7, 4]}),
    )
    trace = trace_of(convert(path, "bailian", Wish(block_tokens=32)).requests, 32)
    assert prompts_of(trace) == [[0, 1], [2, 3], [0, 4]]


def test_a_partial_block_without_an_id_is_nobody_elses(tmp_path: Path):
    entry = {"timestamp": 0, "input_length": 20, "output_length": 1, "hash_ids": [1]}
    trace = trace_of(convert(write(tmp_path / "t.jsonl", lines(entry, entry)), "bailian", Wish(16)).requests, 16)
    assert prompts_of(trace) == [[0, 1], [0, 2]]


def test_times_start_at_0_and_are_put_in_order(tmp_path: Path):
    entry = {"input_length": 1, "hash_ids": [1]}
    path = write(tmp_path / "t.jsonl", lines(entry | {"timestamp": 9000}, entry | {"timestamp": 8000.5}))
    assert [request.timestamp for request in convert(path, "mooncake", Wish()).requests] == [0, 999.5]


def test_azure_has_lengths_and_times_and_nothing_shared(tmp_path: Path):
    rows = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,3180,8\n"
    converted = convert(write(tmp_path / "conv.csv", rows), "azure", Wish())
    assert [(request.timestamp, request.input_length, request.output_length) for request in converted.requests] == [
        (0, 4808, 10),
        (52, 3180, 8),
    ]
    assert trace_of(converted.requests).distinct == 10 + 7
    assert "no hashes" in converted.notes[0]
    later = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2024-05-10 00:00:00.009930+00:00,2162,5\r\n2024-05-10 00:00:01.009930+00:00,1,0\r\n"
    assert [request.timestamp for request in convert(write(tmp_path / "code.csv", later), "azure", Wish()).requests] == [0, 1000]


SHAREGPT = {
    "id": "a",
    "conversations": [
        {"from": "human", "value": "x" * 5000},
        {"from": "gpt", "value": "y" * 400},
        {"from": "human", "value": "more?"},
        {"from": "gpt", "value": "z" * 40},
    ],
}
OPENAI = {"id": "b", "messages": [{"role": "system", "content": "s" * 4100}, {"role": "user", "content": "hello"}]}


@pytest.mark.parametrize("text", [json.dumps([SHAREGPT, OPENAI], indent=1), lines(SHAREGPT, OPENAI)], ids=["list", "lines"])
def test_conversations_become_turns_that_share_what_was_said(tmp_path: Path, text):
    converted = convert(write(tmp_path / "c.json", text), "sharegpt", Wish(seed=2))
    assert convert(tmp_path / "c.json", "sharegpt", Wish(seed=2)) == converted
    assert converted != convert(tmp_path / "c.json", "sharegpt", Wish(seed=3))
    trace = trace_of(converted.requests)
    assert trace.requests == 3
    first, second, other = sorted(
        zip(trace.output_tokens.tolist(), prompts_of(trace), trace.input_tokens.tolist(), strict=True), reverse=True
    )
    assert (first[0], second[0], other[0]) == (100, 10, 0)
    assert first[2] == -(-len(f"human: {'x' * 5000}\n") // 4)
    assert first[1][:2] == second[1][:2], "two blocks of 2,048 bytes are the same, the third went on"
    assert first[1][2] != second[1][2]
    assert set(other[1]).isdisjoint(second[1])
    assert any("guessed" in note for note in converted.notes)
    assert any("made up: 3.4 requests" in note and "seed 2" in note for note in converted.notes)


BLOCKS = '{"timestamp": 0, "input_length": 40, "output_length": 1, "hash_ids": [1]}\n'


@pytest.mark.parametrize(
    ("source", "text", "expected"),
    [
        ("mooncake", "no json\n", "line 1"),
        ("mooncake", BLOCKS.replace("40", "1600"), "line 1: 1 hash_ids for 1600 tokens; expected 4.*--from-block-tokens"),
        ("bailian", BLOCKS, "line 1: 1 hash_ids for 40 tokens; expected 3"),
        ("bailian", '{"timestamp": -1, "input_length": 10, "output_length": 1, "hash_ids": [1]}\n', "line 1: timestamp is -1"),
        ("bailian", "", "no requests in the format bailian"),
        ("azure", "", "line 1"),
        ("azure", "a,b\n", "line 1 is 'a,b'; expected TIMESTAMP"),
        ("azure", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests"),
        ("azure", "TIMESTAMP,ContextTokens,GeneratedTokens\nnow,1,2\n", "line 2 is 'now,1,2'"),
        ("azure", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,1\n", "line 2"),
        ("azure", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,0,1\n", "line 2: ContextTokens is 0"),
        ("sharegpt", "[1, 2]", "conversation 1 is no object"),
        ("sharegpt", "[{]", "no JSON list"),
        ("sharegpt", "{}\n", "line 1 has neither conversations nor messages"),
        ("sharegpt", '[{"conversations": [{"from": "human"}]}]', "conversation 1: a message"),
        ("sharegpt", '[{"conversations": []}]', "no requests"),
    ],
)
def test_what_is_not_that_format_is_refused(tmp_path: Path, source, text, expected):
    with pytest.raises(TraceError, match=expected):
        convert(write(tmp_path / "t", text), source, Wish())


@pytest.mark.parametrize("source", FORMATS)
def test_a_missing_file_is_refused(tmp_path: Path, source):
    with pytest.raises(TraceError, match="cannot read"):
        convert(tmp_path / "missing", source, Wish())


@pytest.mark.parametrize(
    ("source", "wish", "expected"),
    [
        ("csv", Wish(), "unknown trace format 'csv'; known: mooncake, bailian, azure, sharegpt"),
        ("bailian", Wish(block_tokens=24), "blocks of 16 tokens do not make blocks of 24"),
        ("bailian", Wish(block_tokens=0), "tokens of a block: 0"),
        ("sharegpt", Wish(rate=0.0), "rate: 0"),
    ],
)
def test_wishes_that_make_no_sense_are_refused(tmp_path: Path, source, wish, expected):
    with pytest.raises(KVTierError, match=expected):
        convert(write(tmp_path / "t", BLOCKS), source, wish)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [0]}\n', "mooncake"),
        ('\n{"chat_id": 1, "parent_chat_id": -1, "timestamp": 0.5, "input_length": 5, "output_length": 1, "hash_ids": [0]}\n', "bailian"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "azure"),
        ('[\n{"conversations": []}]', "sharegpt"),
        ('{"messages": []}\n', "sharegpt"),
    ],
)
def test_a_format_is_known_by_its_first_line(tmp_path, content, expected):
    path = tmp_path / "t"
    path.write_text(content)
    assert guess_format(path) == expected


@pytest.mark.parametrize("content", ["", "timestamp;tokens\n", "{}\n", "7\n", '{"a": '])
def test_what_looks_like_no_format_is_told_which_there_are(tmp_path, content):
    path = tmp_path / "t"
    path.write_text(content)
    with pytest.raises(TraceError, match="none of the formats mooncake, bailian, azure, sharegpt .* --from"):
        convert(path, None, Wish())
