"""Tensor parallelism in real vLLM: two worker processes, each with its part of every page in a directory of its own."""

from __future__ import annotations

import shutil
from contextlib import contextmanager

import pytest

from tests.engines_real.conftest import running
from tests.engines_real.test_vllm_connector import BLOCK, Talk, connector
from tests.engines_real.tiny_models import PAGE_BYTES, tiny_llama

LENGTH = 5 * BLOCK + 3


@contextmanager
def two_ranks(folder, store):
    transfer = connector(
        host__format="raw",
        host__capacity_bytes=64 * PAGE_BYTES,
        disk__format="raw",
        disk__path=str(store),
        disk__capacity_bytes=64 * PAGE_BYTES,
        device__capacity_bytes=64 * PAGE_BYTES,
    )
    options = {"dtype": "float32", "max_model_len": 2048, "tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with running(folder, kv_transfer_config=transfer, **options) as llm:
        yield Talk(llm)


def segments(store):
    return {rank: b"".join(path.read_bytes() for path in sorted((store / f"rank-{rank}-of-2").glob("segment-*.kvt"))) for rank in (0, 1)}


@pytest.mark.timeout(900)  # three engines of two processes each
def test_ranks_keep_their_parts_apart_and_a_page_is_found_when_both_have_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    folder, store = tiny_llama(tmp_path / "model"), tmp_path / "kv"
    with two_ranks(folder, store) as talk:
        prompt = talk.prompt(LENGTH)
        cached, cold = talk.ask(prompt)
        assert cached == 0
        own = talk.ask(prompt)
        assert own[0] == 5 * BLOCK
        talk.let_kvtier_end()
        assert talk.llm.reset_prefix_cache()
        assert talk.ask(prompt) == own
        assert talk.counted("loaded_pages") == 2 * 5, "each rank loads its part of each page"
        assert talk.gauge("tier_capacity_bytes", "tier") == dict.fromkeys(("device", "host", "disk"), 64 * PAGE_BYTES), "both ranks'"
    kept = segments(store)
    assert min(map(len, kept.values())) >= 5 * PAGE_BYTES // 2
    assert kept[0] != kept[1]
    with two_ranks(folder, store) as talk:
        assert talk.ask(prompt) == own, "found after a restart"
        assert talk.counted("failed_pages") == 0
    shutil.rmtree(store / "rank-1-of-2")
    with two_ranks(folder, store) as talk:
        assert talk.ask(prompt) == (0, cold), "rank 0 alone has all of it, which is nothing"
        assert talk.counted("hit_tokens") == 0
