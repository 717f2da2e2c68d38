"""The backend under SGLang's own factory, interface, page arithmetic and failure injector (its engine needs a GPU and is not run)."""

from __future__ import annotations

import json
import re
import shlex
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from kvtier.errors import ConfigError, LayoutError, ModelError, StoreError, StoreLocked
from tests.engines_real.sglang_pool import import_storage, mha_pool, static_method

ROOT = import_storage()

from sglang.srt.mem_cache.hicache_storage import (  # noqa: E402
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    HiCacheStorageFailureInjector,
)
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory  # noqa: E402
from sglang.srt.runtime_context import get_context  # noqa: E402

PAGE = 16
LAYOUTS = ["layer_first", "page_first", "page_first_direct", "page_head"]
SERVER = {"model_path": "m", "revision": None, "dtype": "auto", "quantization": None, "json_model_override_args": "{}"}
"""Of SGLang's `ServerArgs`, which asks for a GPU when it is made, what the backend reads about the model."""
KEPT_AS = {"kv_cache_dtype": "auto", "quantization_param_path": None}
"""Of the same, resolved, what it reads about KV."""
VERSION = {"weight_version": "default"}
"""What it reads about serving; the value of now is in the context."""
KEYS = [f"hash{number}" for number in range(12)]


def make(path: Path, pool: Any, more: dict[str, Any] | None = None, **ranks: Any) -> Any:
    # --- docs/sglang.md: hicache-storage-backend-extra-config
    extra_config = {
        "backend_name": "kvtier",
        "module_path": "kvtier.engines.sglang",
        "class_name": "KvtierHiCache",
        "interface_v1": 1,
        "disk.path": str(path),
        "disk.capacity_bytes": "64MiB",
    }
    # ---
    usual = {"tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0, "attn_cp_size": 1, "is_mla_model": False}
    config = HiCacheStorageConfig(
        **(usual | {"enable_storage_metrics": False, "is_page_first_layout": False, "model_name": "m"} | ranks),
        extra_config=extra_config | (more or {}),
    )
    backend = StorageBackendFactory.create_backend("dynamic", config, pool)
    backend.register_mem_pool_host(pool)
    backend.on_host_pools_registered()
    return backend


@pytest.fixture(autouse=True)
def server(monkeypatch, tmp_path_factory):
    """The arguments that SGLang's scheduler publishes before it makes a backend."""
    (folder := tmp_path_factory.mktemp("model")).joinpath("model.safetensors").write_bytes(b"weights")
    arguments = types.SimpleNamespace(**SERVER, **VERSION)
    arguments.model_path = str(folder)
    monkeypatch.setattr(get_context(), "_server_args", arguments)
    bags = {"serving": types.SimpleNamespace(**VERSION), "lora": types.SimpleNamespace(lora_paths=None)}
    bags["model"] = types.SimpleNamespace(**KEPT_AS)
    monkeypatch.setattr(get_context(), "_config_bags", bags)
    return arguments


def indices(*pages: int) -> torch.Tensor:
    return torch.cat([torch.arange(page * PAGE, (page + 1) * PAGE) for page in pages])


def page(pool: Any, number: int) -> torch.Tensor:
    return pool.get_data_page(number * PAGE).clone()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_pages_come_back_to_the_bit_in_every_layout_also_after_a_restart(tmp_path, layout, dtype):
    pool = mha_pool(ROOT, layout, dtype)
    before = [page(pool, number) for number in range(12)]
    backend = make(tmp_path, pool)
    assert backend.batch_set_v1(KEYS[:3], indices(0, 5, 2), HiCacheStorageExtraInfo(prefix_keys=[])) == [True] * 3
    assert backend.batch_set_v1(KEYS[3:4], indices(7), HiCacheStorageExtraInfo(prefix_keys=KEYS[:3])) == [True]
    backend.close()
    backend = make(tmp_path, pool)
    assert backend.batch_exists([*KEYS[:4], "never", KEYS[0]]) == 4
    assert backend.exists(KEYS[2])
    assert not backend.exists("never")
    pool.kv_buffer.view(torch.uint8).zero_()
    assert backend.batch_get_v1([KEYS[1], "never", KEYS[3]], indices(1, 2, 3)) == [True, False, True]
    for place, source in ((1, 5), (3, 7)):
        assert torch.equal(page(pool, place).view(torch.uint8), before[source].view(torch.uint8))
    assert not page(pool, 2).view(torch.uint8).any()
    backend.store.check_integrity()
    backend.close()


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "page_head"])
def test_the_calls_with_tensors_and_those_without_see_the_same_pages(tmp_path, layout):
    pool = mha_pool(ROOT, layout, torch.bfloat16)
    first, second = page(pool, 1), page(pool, 2)
    backend = make(tmp_path, pool)
    assert backend.batch_set(KEYS[:1], [pool.get_data_page(1 * PAGE)])
    assert backend.batch_set_v1(KEYS[1:2], indices(2)) == [True]
    pool.kv_buffer.zero_()
    assert backend.batch_get_v1(KEYS[:1], indices(4)) == [True]
    assert torch.equal(page(pool, 4), first)
    found = backend.batch_get([*KEYS[1:2], "never"], [pool.get_dummy_flat_data_page() for _ in range(2)])
    assert found[1] is None
    pool.set_from_flat_data_page(6 * PAGE, found[0])
    assert torch.equal(page(pool, 6), second)
    assert torch.equal(backend.get(KEYS[0]), first)
    assert backend.set(KEYS[5], first)
    assert not backend.set(KEYS[6])
    backend.close()


def test_quantized_pages_are_smaller_and_one_store_serves_all_layouts(tmp_path):
    pool = mha_pool(ROOT, "page_first", torch.bfloat16)
    before = page(pool, 3).reshape(2, PAGE, 3, 2, 32)
    backend = make(tmp_path, pool, {"disk.format": "q8"})
    assert backend.batch_set_v1(KEYS[:1], indices(3), HiCacheStorageExtraInfo(prefix_keys=[])) == [True]
    backend.close()
    other = mha_pool(ROOT, "layer_first", torch.bfloat16)
    backend = make(tmp_path, other, {"disk.format": "q8"})
    assert backend.batch_get_v1(KEYS[:1], indices(0)) == [True]
    error = (page(other, 0).reshape(2, 3, PAGE, 2, 32).transpose(1, 2).float() - before.float()).abs().max()
    assert 0 < error < 0.05
    backend.close()


def test_under_sglangs_failure_injector_pages_are_right_or_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE", "0.3")
    monkeypatch.setenv("SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY", "0.002")
    pool = mha_pool(ROOT, "page_first_direct", torch.bfloat16)
    before = [page(pool, number) for number in range(6)]
    backend = make(tmp_path, pool)
    assert isinstance(backend, HiCacheStorageFailureInjector)
    came = 0
    for _ in range(30):
        for number in range(6):
            backend.batch_set_v1([KEYS[number]], indices(number))
        there = backend.batch_exists(KEYS[:6])
        for number in range(there):
            if backend.batch_get_v1([KEYS[number]], indices(11)) == [True]:
                came += 1
                assert torch.equal(page(pool, 11), before[number])
    assert came > 0
    backend.close()


def test_corrupted_pages_are_not_handed_out(tmp_path):
    pool = mha_pool(ROOT, "page_first", torch.bfloat16)
    backend = make(tmp_path, pool, {"disk.format": "raw"})
    assert backend.batch_set_v1(KEYS[:2], indices(0, 1)) == [True, True]
    segment = next(tmp_path.rglob("segment-*.kvt"))
    with segment.open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 1]))
    assert sorted(backend.batch_get_v1(KEYS[:2], indices(4, 5))) == [False, True]
    backend.clear()
    assert backend.batch_exists(KEYS[:2]) == 0
    backend.close()


def test_ranks_keep_their_pages_apart(tmp_path):
    pool = mha_pool(ROOT, "page_first", torch.bfloat16)
    backends = [make(tmp_path, pool, tp_rank=rank, tp_size=2) for rank in range(2)]
    assert backends[0].batch_set_v1(KEYS[:1], indices(0)) == [True]
    assert [backend.batch_exists(KEYS[:1]) for backend in backends] == [1, 0]
    with pytest.raises(StoreLocked):
        make(tmp_path, pool, tp_rank=0, tp_size=2)
    for backend in backends:
        backend.close()


@pytest.mark.parametrize("change", [{"model_name": "other"}, {"dtype": torch.float16}])
def test_a_store_of_another_model_or_dtype_is_refused(tmp_path, change):
    make(tmp_path, mha_pool(ROOT, "page_first", torch.bfloat16)).close()
    dtype = change.pop("dtype", torch.bfloat16)
    with pytest.raises((StoreError, LayoutError)):
        make(tmp_path, mha_pool(ROOT, "page_first", dtype), **change)


def test_bytes_that_stand_for_other_numbers_are_another_model(tmp_path):
    """SGLang keeps both kinds of FP8 as uint8."""
    pool, model = mha_pool(ROOT, "page_first", torch.uint8), get_context().config_bag("model")
    scales = tmp_path / "scales.json"
    scales.write_text("{}")
    model.kv_cache_dtype, model.quantization_param_path = "fp8_e4m3", str(scales)
    for _ in range(2):
        make(tmp_path / "store", pool).close()
    model.kv_cache_dtype = "fp8_e5m2"
    with pytest.raises(StoreError, match="another model"):
        make(tmp_path / "store", pool)
    model.kv_cache_dtype = "fp8_e4m3"
    scales.write_text('{"other": 1}')
    with pytest.raises(StoreError, match="another model"):
        make(tmp_path / "store", pool)
    scales.unlink()
    with pytest.raises(ConfigError, match="quantization-param-path .*scales.json cannot be read: No such file"):
        make(tmp_path / "store", pool)


def test_the_arguments_that_the_backend_reads_are_sglangs():
    for file, names in (("model.py", SERVER | KEPT_AS), ("serving.py", VERSION), ("lora.py", ["lora_paths"])):
        fields = (ROOT / "srt" / "arg_groups" / "fields" / file).read_text()
        assert [name for name in names if f"\n    {name}: A[" not in fields] == []


def test_the_command_on_the_front_page_is_one_that_sglang_understands(tmp_path, monkeypatch):
    """Its launcher needs a GPU and is not run: the flags are looked up in its own table, the file is read by its own code."""
    repository = Path(__file__).parents[2]
    document = (repository / "docs" / "sglang.md").read_text()
    command = re.search(r"```sh\n(python -m sglang.launch_server .*?)```", (repository / "README.md").read_text(), re.DOTALL)
    shown = re.search(r"```python\n(.*?)```", document, re.DOTALL)
    assert command is not None
    assert shown is not None
    assert command[0] in document
    words = shlex.split(command[1])
    given = {word: following for word, following in zip(words, [*words[1:], "--"], strict=True) if word.startswith("--")}
    assert len(given) == 4
    fields = (ROOT / "srt" / "arg_groups" / "fields" / "memory.py").read_text()
    for flag, value in given.items():
        about = re.search(rf"\n    {flag[2:].replace('-', '_')}: A\[\n(.*?)\n    \] = ", fields, re.DOTALL)
        assert about is not None, flag
        assert value.startswith(("--", "@")) or f'"{value}"' in about[1]
    monkeypatch.chdir(tmp_path)
    settings = eval(shown[1], {"__builtins__": {}})
    Path("kvtier.json").write_text(json.dumps(settings))
    parse = static_method(ROOT, "hybrid_cache/hybrid_cache_controller.py", "HybridCacheController", "parse_storage_backend_extra_config")
    assert parse(given["--hicache-storage-backend-extra-config"])[0] == settings


def test_other_weights_under_the_same_name_and_path_are_another_model(tmp_path, server):
    """The name is what they are served under; a fine-tuned model has the path of the one before it."""
    folder, store = tmp_path / "model", tmp_path / "store"
    folder.mkdir()
    server.model_path = str(folder)
    pool = mha_pool(ROOT, "page_first", torch.bfloat16)
    (folder / "model.safetensors").write_bytes(b"one")
    backend = make(store, pool)
    assert backend.batch_set_v1(KEYS[:1], indices(0)) == [True]
    backend.close()
    backend = make(store, pool)
    assert backend.exists(KEYS[0])
    backend.close()
    (folder / "model.safetensors").write_bytes(b"two")
    with pytest.raises(StoreError, match="another model"):
        make(store, pool)
    make(tmp_path / "other", pool).close()
    server.quantization = "fp8"
    with pytest.raises(StoreError, match="another model"):
        make(tmp_path / "other", pool)


def test_other_weights_of_an_adapter_that_the_server_starts_with_are_another_model(tmp_path):
    folder, pool = tmp_path / "adapter", mha_pool(ROOT, "page_first", torch.bfloat16)
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"one")
    get_context().config_bag("lora").lora_paths = [types.SimpleNamespace(lora_name="a", lora_path=str(folder))]
    for _ in range(2):
        make(tmp_path / "store", pool).close()
    (folder / "adapter_model.safetensors").write_bytes(b"two")
    with pytest.raises(StoreError, match="another model"):
        make(tmp_path / "store", pool)


def test_weights_that_nobody_can_tell_from_others_are_refused(tmp_path, server):
    server.model_path = "someone/some-model"
    with pytest.raises(ModelError, match="set model.revision"):
        make(tmp_path, mha_pool(ROOT, "page_first", torch.bfloat16))
    make(tmp_path, mha_pool(ROOT, "page_first", torch.bfloat16), {"model.revision": "1"}).close()


def test_pages_of_weights_that_were_updated_in_the_running_server_are_its_own(tmp_path):
    """Its scheduler notes the version that an update was given, `SchedulerWeightUpdaterManager.record_weight_version_after_update`."""
    pool, serving = mha_pool(ROOT, "page_first", torch.bfloat16), get_context().config_bag("serving")
    backend = make(tmp_path, pool)
    assert backend.batch_set_v1(KEYS[:2], indices(0, 1), HiCacheStorageExtraInfo(prefix_keys=[])) == [True, True]
    serving.weight_version = "step-1"
    assert backend.batch_exists(KEYS[:2]) == 0
    assert backend.batch_get_v1(KEYS[:2], indices(2, 3)) == [False, False]
    assert backend.batch_set_v1(KEYS[:1], indices(4), HiCacheStorageExtraInfo(prefix_keys=[])) == [True]
    assert backend.batch_set_v1(KEYS[1:2], indices(5), HiCacheStorageExtraInfo(prefix_keys=KEYS[:1])) == [True]
    assert backend.batch_exists(KEYS[:3]) == 2
    backend.close()
    backend = make(tmp_path, pool)  # attached anew
    assert backend.batch_exists(KEYS[:1]) == 0, "nor those of the weights that the server started with"
    backend.close()
    serving.weight_version = "default"
    backend = make(tmp_path, pool)  # another server
    assert backend.batch_exists(KEYS[:3]) == 2
    wanted = page(pool, 0)
    assert backend.batch_get_v1(KEYS[:1], indices(7)) == [True]
    assert torch.equal(page(pool, 7), wanted)
    backend.close()


def test_what_is_kept_after_it_was_cleared_is_not_found_by_the_next_server(tmp_path):
    """Whoever clears may have changed the weights without a version."""
    pool = mha_pool(ROOT, "page_first", torch.bfloat16)
    backend = make(tmp_path, pool)
    assert backend.batch_set_v1(KEYS[:1], indices(0)) == [True]
    backend.clear()
    assert not backend.exists(KEYS[0])
    assert backend.batch_set_v1(KEYS[:1], indices(1)) == [True]
    assert backend.exists(KEYS[0])
    backend.close()
    backend = make(tmp_path, pool)
    assert not backend.exists(KEYS[0])
    backend.close()


def test_what_cannot_be_held_is_refused_in_words(tmp_path):
    pool = mha_pool(ROOT, "page_first", torch.bfloat16)
    with pytest.raises(ConfigError, match="opaque"):
        make(tmp_path, mha_pool(ROOT, "page_first", torch.float8_e4m3fn), {"disk.format": "q4"})
    with pytest.raises(ConfigError, match="nearest known key is disk.format"):
        make(tmp_path, pool, {"disk.formt": "q4"})
    with pytest.raises(ConfigError, match="tensor-parallel ranks"):
        make(tmp_path, pool, is_mla_model=True, tp_size=2)
    pool.layout = "page_unified"
    with pytest.raises(LayoutError, match="page_first_direct"):
        make(tmp_path, pool)
    pool.layout = "page_first"
    backend = make(tmp_path, pool)
    with pytest.raises(LayoutError, match="mamba"):
        backend.register_mem_host_pool_v2(pool, "mamba")
    with pytest.raises(LayoutError, match="expected 2 pages"):
        backend.batch_get_v1(KEYS[:2], indices(0))
    backend.close()
    with pytest.raises(ConfigError, match="register_mem_pool_host"):
        backend.batch_exists(KEYS)
