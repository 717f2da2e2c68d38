"""Policy and disk tier inside vLLM's tiered offloading, in real engines: hits from disk after a restart, none from what is damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvtier.errors import ConfigError, LayoutError, ModelError, StoreError
from tests.engines_real.conftest import running

PROMPT = "Water boils at a lower temperature on a mountain than at the sea. " * 75
OTHER = "A lighthouse keeper writes down every ship that passes in the night. " * 75
TOKENS = 12


def offloading(path: Path, **tier: Any) -> dict[str, Any]:
    # --- docs/vllm-offloading.md: kv_transfer_config
    config = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "TieringOffloadingSpec",
            "cpu_bytes_to_use": 400 << 20,
            "eviction_policy": "A2CR",
            "cache_policy_module_path": "kvtier.engines.vllm_policy",
            "secondary_tiers": [
                {
                    "type": "KvtierTier",
                    "module_path": "kvtier.engines.vllm_tier",
                    "disk.path": str(path),
                    "disk.capacity_bytes": "2GiB",
                    "disk.format": "raw+zstd",
                }
            ],
        },
    }
    # ---
    extra: dict[str, Any] = config["kv_connector_extra_config"]  # type: ignore[assignment]
    extra |= {"spec_name": "CpuTieringSpec", "spec_module_path": "kvtier.bench.cpu_tiering"}
    extra["secondary_tiers"][0] |= tier
    return config


def engine(model_folder: Path, path: Path, **tier: Any) -> Any:
    from vllm.config import KVTransferConfig

    return running(model_folder, kv_transfer_config=KVTransferConfig(**offloading(path, **tier)))


def ask(llm: Any, prompt: str) -> tuple[list[int], int]:
    """The answer's tokens and how many of the prompt's were found in a cache."""
    from vllm import SamplingParams

    output = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=TOKENS), use_tqdm=False)[0]
    return list(output.outputs[0].token_ids), output.num_cached_tokens


def tier_of(llm: Any) -> Any:
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    return scheduler.connector.connector_scheduler.manager.secondary_tiers[0]


@pytest.mark.timeout(900)  # three engines start
def test_chunks_on_disk_serve_the_next_engine_and_damaged_ones_are_computed_again(model_folder, tmp_path):
    with engine(model_folder, tmp_path) as llm:
        from kvtier.engines.vllm_policy import A2CR

        assert isinstance(llm.llm_engine.engine_core.engine_core.scheduler.connector.connector_scheduler.manager.primary_tier._policy, A2CR)
        cold, cached = ask(llm, PROMPT)
        assert cached == 0
        other, _ = ask(llm, OTHER)
        llm.reset_prefix_cache()
        warm, cached = ask(llm, PROMPT)  # from the CPU tier
        assert cached > 512
        assert warm == cold
        ask(llm, "One more step, so that everything is handed on.")
        assert tier_of(llm).store.stats()["stored"] > 8
    with engine(model_folder, tmp_path) as llm:
        warm, cached = ask(llm, PROMPT)
        stats = tier_of(llm).store.stats()
        assert cached > 512
        assert warm == cold
        assert stats["hits"] >= cached // 128
        assert "refused: checksum" not in stats
        assert 0 < stats["disk"]["bytes_used"] < stats["blocks"] * tier_of(llm).block_size_bytes
        assert llm.reset_prefix_cache(reset_connector=True)
        assert ask(llm, PROMPT) == (cold, 0), "the weights may be others now"
    for segment in tmp_path.glob("segment-*.kvt"):
        with segment.open("r+b") as file:
            for at in range(100_000, segment.stat().st_size, 200_000):
                file.seek(at)
                file.write(bytes(512))
    with engine(model_folder, tmp_path) as llm:
        again, cached = ask(llm, OTHER)
        assert again == other
        assert cached == 0
        assert sum(count for what, count in tier_of(llm).store.stats().items() if str(what).startswith("refused")) > 0


@pytest.mark.timeout(600)  # two engines start
def test_chunks_in_8_bits_serve_the_next_engine(model_folder, tmp_path):
    with engine(model_folder, tmp_path, **{"disk.format": "q8"}) as llm:
        cold, _ = ask(llm, PROMPT)
        ask(llm, "One more step, so that everything is handed on.")
        tier = tier_of(llm)
        assert tier.store.blocks.page.layers == 30
        assert smooth_along_tokens(tier.store.blocks, tier._rows[:16])
    with engine(model_folder, tmp_path, **{"disk.format": "q8"}) as llm:
        found, cached = ask(llm, PROMPT)
        assert cached > 512
        assert sum(ours == theirs for ours, theirs in zip(found, cold, strict=True)) >= 0.75 * TOKENS
        stats = tier_of(llm).store.stats()
        assert stats["hits"] >= 4
        assert stats["disk"]["bytes_used"] < 0.6 * stats["blocks"] * tier_of(llm).block_size_bytes


def smooth_along_tokens(blocks: Any, rows: Any) -> bool:
    """Whether these chunks look like KV in this layout: keys vary less from token to token than from channel to channel."""
    keys = np.stack([blocks.planes_of(row)[0] for row in rows if row.any()])
    numbers = torch.from_numpy(np.ascontiguousarray(keys)).view(torch.bfloat16).float()
    assert len(numbers)
    return bool(numbers.std(dim=2).mean() < 0.75 * numbers.std(dim=4).mean())


@pytest.mark.parametrize(
    ("tier", "error", "says"),
    [
        ({"disk.format": "q4"}, LayoutError, "known for vLLM's CPU backend only .*None.*; use a format without loss"),
        ({"disk.formt": "raw"}, ConfigError, "nearest known key is disk.format"),
    ],
)
def test_a_tier_that_cannot_be_is_refused_in_words(tmp_path, tier, error, says):
    with pytest.raises(error, match=says):
        make_tier(tmp_path, **tier)


def make_tier(path: Path, model: str | None = None, rows: int = 4, **settings: Any) -> Any:
    """The tier without an engine, under vLLM's own configuration objects. Without `model`, of one whose revision the user tells."""
    if model is None:
        model, settings = "m", {"model.revision": "1"} | settings
    from vllm.v1.kv_offload.base import OffloadingSpec
    from vllm.v1.kv_offload.config import (
        OffloadingCacheConfig,
        OffloadingConfig,
        OffloadingGroupConfig,
        OffloadingModelConfig,
        OffloadingParallelConfig,
    )

    from kvtier.engines.vllm_tier import KvtierTier

    class Spec(OffloadingSpec):
        def get_manager(self):
            raise NotImplementedError

        def get_worker(self, kv_caches):
            raise NotImplementedError

    config = OffloadingConfig(
        groups=(OffloadingGroupConfig(16, ("layer.0",), 0),),
        worker_kv_bytes_per_block=4096,
        enable_kv_cache_events=False,
        extra_config={},
        engine_id="e",
        model=OffloadingModelConfig(model, "bfloat16"),
        cache=OffloadingCacheConfig(16, 1),
        parallel=OffloadingParallelConfig(0, 1, 1, 1, 1, 1, 0, 1, None, False),
    )
    memory = np.random.default_rng(1).integers(0, 255, (rows, 4096), np.uint8)
    return KvtierTier(Spec(config), memory.data, "KvtierTier", **({"disk.path": str(path), "disk.capacity_bytes": "1MiB"} | settings))


def test_jobs_are_answered_and_lookups_tell_the_truth(tmp_path):
    from vllm.v1.kv_offload.base import LookupResult, ReqContext, make_offload_key
    from vllm.v1.kv_offload.tiering.base import TransferJob

    tier = make_tier(tmp_path)
    keys = [make_offload_key(bytes([number] * 32), 0) for number in range(4)]
    context = ReqContext("r")
    for place, key in enumerate(keys):
        context.set_offload_key_position(key, 16 * (place + 1))
    assert [tier.lookup(key, context) for key in keys] == [LookupResult.MISS] * 4
    tier.submit_store(TransferJob(7, keys[:2], np.array([0, 1]), False, context))
    tier.submit_store(TransferJob(8, keys[2:3], np.array([2]), False, context))
    tier.store.drain()
    assert {(result.job_id, result.success) for result in tier.get_finished_jobs()} == {(7, True), (8, True)}
    assert [tier.lookup(key, context) for key in keys] == [LookupResult.HIT] * 3 + [LookupResult.MISS]
    table = tier.store._contents.table
    assert sorted(table.depth[: table.rows].tolist()) == [0, 1, 2]  # known as one sequence
    before = tier._rows[:2].copy()
    tier._rows[:2] = 0
    tier.submit_load(TransferJob(9, [keys[0], keys[3], keys[1]], np.array([0, 3, 1]), True, context))
    tier.store.drain()
    (result,) = tier.get_finished_jobs()
    assert not result.success
    assert result.successful_keys == (keys[0], keys[1])
    np.testing.assert_array_equal(tier._rows[:2], before)
    assert list(tier.get_finished_jobs()) == []
    tier.shutdown()
    other: dict[str, Any] = {"model.revision": "other"}
    with pytest.raises(StoreError, match="another model"):
        make_tier(tmp_path, **other)


def test_what_is_kept_after_a_reset_is_found_by_this_engine_and_what_was_kept_before_by_the_next(tmp_path):
    """vLLM resets its cache when weights were changed in memory, and tells a tier neither."""
    from vllm.v1.kv_offload.base import LookupResult, ReqContext, make_offload_key
    from vllm.v1.kv_offload.tiering.base import TransferJob

    def begun(name: str) -> ReqContext:
        context = ReqContext(name)
        for place, key in enumerate(keys):
            context.set_offload_key_position(key, 16 * (place + 1))
        tier.on_new_request(context)
        return context

    def move(job: int, keys: list[Any], rows: list[int], context: ReqContext, is_load: bool = False) -> None:
        submit = tier.submit_load if is_load else tier.submit_store
        submit(TransferJob(job, keys, np.array(rows), is_load, context))
        tier.store.drain()
        assert [(result.job_id, result.success) for result in tier.get_finished_jobs()] == [(job, True)]

    tier, keys = make_tier(tmp_path), [make_offload_key(bytes([number] * 32), 0) for number in range(3)]
    before, rows = begun("before"), tier._rows.copy()
    move(1, keys[:1], [0], before)
    assert tier.lookup(keys[0], before) is LookupResult.HIT
    tier.submit_store(TransferJob(2, keys[1:2], np.array([1]), False, before))
    tier.drain_jobs()
    assert [result.job_id for result in tier.get_finished_jobs()] == [2]
    assert [tier.lookup(key, before) for key in keys] == [LookupResult.MISS] * 3
    move(3, keys[2:], [2], before)
    assert tier.lookup(keys[2], before) is LookupResult.MISS, "computed in part before the reset"
    after = begun("after")
    move(4, keys, [3, 2, 1], after)
    assert [tier.lookup(key, after) for key in keys] == [LookupResult.HIT] * 3
    move(5, keys[:1], [0], after, is_load=True)
    np.testing.assert_array_equal(tier._rows[0], rows[3])
    table = tier.store._contents.table
    assert sorted(table.depth[: table.rows].tolist()) == [0, 0, 1, 1, 2]
    tier.shutdown()
    tier = make_tier(tmp_path)
    after = begun("another engine")
    assert [tier.lookup(key, after) for key in keys] == [LookupResult.HIT, LookupResult.HIT, LookupResult.MISS]
    move(6, keys[:2], [2, 3], after, is_load=True)
    np.testing.assert_array_equal(tier._rows[2:], rows[:2])
    tier.shutdown()


def test_other_weights_in_the_same_folder_are_another_model(tmp_path):
    folder, store = tmp_path / "model", tmp_path / "store"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"one")
    make_tier(store, str(folder)).shutdown()
    make_tier(store, str(folder)).shutdown()
    (folder / "model.safetensors").write_bytes(b"two")
    with pytest.raises(StoreError, match="another model"):
        make_tier(store, str(folder))
    named: dict[str, Any] = {"model.revision": "1"}
    make_tier(tmp_path / "named", str(folder), **named).shutdown()


def test_a_model_whose_revision_vllm_does_not_tell_is_refused_unless_the_user_does(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folders = [tmp_path / "hub" / "models--someone--some-model" / "snapshots" / commit for commit in ("c0ffee", "decade")]
    for folder in folders:
        folder.mkdir(parents=True)
    with pytest.raises(ModelError, match="several revisions"):
        make_tier(tmp_path / "store", "someone/some-model")
    named: dict[str, Any] = {"model.revision": "c0ffee"}
    make_tier(tmp_path / "store", "someone/some-model", **named).shutdown()
    folders[1].rmdir()
    make_tier(tmp_path / "other", "someone/some-model").shutdown()
    make_tier(tmp_path / "other", str(folders[0])).shutdown()  # as vLLM names it offline


@pytest.mark.parametrize(
    ("algorithm", "seed", "warned"),
    [("sha256", None, False), ("sha256_cbor", None, False), ("xxhash", None, True), ("xxhash_cbor", None, True), ("xxhash", "7", False)],
)
def test_names_that_end_with_the_process_are_warned_of_once(tmp_path, monkeypatch, caplog, algorithm, seed, warned):
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.kv_offload.base import ReqContext

    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    if seed is not None:
        monkeypatch.setenv("PYTHONHASHSEED", seed)
    for name in ("NONE_HASH", "_NONE_HASH_SEED"):
        monkeypatch.setattr(kv_cache_utils, name, None, raising=False)
    tier = make_tier(tmp_path)
    kv_cache_utils.init_none_hash(get_hash_fn_by_name(algorithm))  # as vLLM: after its tiers are made
    for request in ("one", "two"):
        tier.on_new_request(ReqContext(request))
    said = [record.getMessage() for record in caplog.records if "PYTHONHASHSEED" in record.getMessage() and "kvtier" in record.name]
    assert len(said) == warned
    assert all(str(tmp_path) in line for line in said)
    tier.shutdown()
