"""vLLM's own bookkeeping is measured over the stream that ours is, and finds there what is to be found. No time of it is judged here."""

from __future__ import annotations

import json

import pytest

from benchmarks.stream import Replay, chats
from benchmarks.vllm_manager import POLICIES, asked, replay
from kvtier.cli import main


def test_a_tiny_run_reports_vllms_bookkeeping_beside_ours(capsys):
    assert main(["bench", "table", "--tiny", "--repeats", "1", "--vllm", "--json", "-"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    for policy in POLICIES:
        assert rows[f"stream.chats.vllm-{policy}"]["value"] > 0
        assert rows[f"stream.chats.vllm-{policy}"]["ceiling"] > 0
        assert 0 < rows[f"stream.chats.vllm-{policy}.hit_ratio"]["value"] < 1


@pytest.mark.parametrize("policy", POLICIES)
def test_with_room_for_all_vllm_finds_the_pages_that_we_find(policy):
    stream = chats(100)
    found = 0
    with Replay("lru", stream.distinct) as ours:
        for request in stream.requests:
            found += len(ours.residency.table.find(request.keys))
            ours.serve(request)
    assert found > 0
    assert replay(asked(stream, stream.distinct), stream.distinct, policy)[1] == found
