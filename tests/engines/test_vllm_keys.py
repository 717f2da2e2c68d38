"""Laws checked: pages of vLLM requests are named by tokens and by all else their KV depends on; a page counts when every worker has it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kvtier.engines.vllm.keys import RequestKeys
from kvtier.engines.vllm.mirror import Mirror
from kvtier.engines.weights import (
    PIECE_BYTES,
    adapter_revision,
    folder_revision,
    given_name,
    model_revision,
    named_revision,
    only_revision,
)
from kvtier.errors import MissingExtra, ModelError
from kvtier.keys import page_keys, root_key

PAGE = 4
NAMESPACE = b"namespace"


def request(tokens, salt=None, lora=None, features=()):
    return SimpleNamespace(all_token_ids=list(tokens), cache_salt=salt, lora_request=lora, mm_features=list(features))


def image(identifier, offset, length):
    return SimpleNamespace(identifier=identifier, mm_position=SimpleNamespace(offset=offset, length=length))


def keys(asked, revision=""):
    return RequestKeys(asked, NAMESPACE, PAGE, revision).first(len(asked.all_token_ids) // PAGE)


def test_plain_requests_have_the_keys_kvtier_gives_them_anywhere():
    assert keys(request(range(14))) == page_keys(range(14), PAGE, root_key(NAMESPACE))


def test_keys_asked_for_bit_by_bit_are_those_asked_for_at_once():
    asked = request(range(9), features=[image("cat", 6, 4)])
    growing = RequestKeys(asked, NAMESPACE, PAGE)
    growing.first(1)
    asked.all_token_ids += range(9, 16)
    assert growing.first(4) == keys(request(range(16), features=[image("cat", 6, 4)]))


def test_salts_and_adapters_share_no_page():
    adapters = [SimpleNamespace(lora_name=name, lora_path=path) for name, path in [("a", "/a"), ("b", "/b")]]
    variants = [request(range(8)), request(range(8), "x"), request(range(8), "y"), *(request(range(8), None, lora) for lora in adapters)]
    first = [keys(variant)[0] for variant in variants] + [keys(variants[3], "retrained")[0], keys(request(range(8), "x", adapters[0]))[0]]
    assert len(set(first)) == len(first)


def test_images_separate_pages_from_where_they_are():
    shown = [image("cat", 5, 6), image("dog", 5, 6), image("cat", 6, 6)]
    cat, dog, later = (keys(request(range(16), features=[feature])) for feature in shown)
    plain = keys(request(range(16)))
    assert cat[0] == dog[0] == later[0] == plain[0]
    assert all(len({names[page] for names in (cat, dog, later, plain)}) == 4 for page in (1, 2, 3))


def test_a_page_counts_only_where_every_worker_has_its_part():
    mirror = Mirror(2)
    assert mirror.update(0, {b"a": 0b10, b"b": 0b10}) == []
    assert mirror.prefix([b"a", b"b"]) == 0
    assert mirror.update(1, {b"a": 0b110}) == [(b"a", 0, 0b10)]
    assert mirror.prefix([b"a", b"b"]) == 1
    mirror.update(0, {b"a": 0b100})
    assert mirror.homes([b"a"]).tolist() == [2]
    assert mirror.update(1, {b"a": 0}) == [(b"a", 0b100, 0)]
    assert not mirror.holds(b"a")


def test_other_weights_are_another_revision(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = bytearray(PIECE_BYTES * 200)
    (tmp_path / "model.safetensors").write_bytes(weights)
    first = folder_revision(tmp_path)
    for eighth in range(8):
        changed, part = bytearray(weights), len(weights) // 8
        changed[eighth * part : (eighth + 1) * part] = b"\1" * part
        (tmp_path / "model.safetensors").write_bytes(changed)
        assert folder_revision(tmp_path) != first


def test_adapters_have_the_revision_of_the_folder_that_vllm_reads(tmp_path, monkeypatch, hub):
    (adapter := tmp_path / "adapter").mkdir()
    for folder in (adapter, hub("abc", "main", b"weights")):
        (folder / "adapter_config.json").write_text("{}")
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert {adapter_revision(name) for name in (str(adapter), "~/adapter", "someone/some-model")} == {folder_revision(adapter)}


def test_what_vllm_computes_with_the_same_weights_in_another_way_is_another_revision(tmp_path):
    pytest.importorskip("huggingface_hub")

    def revision(max_model_len=4096, load_format="auto", weights=None, rope_type="longrope", **overrides):
        rope = {"rope_type": rope_type, "original_max_position_embeddings": 4096}
        text = SimpleNamespace(rope_parameters=rope, to_dict=lambda: {"rope_parameters": rope} | overrides)
        model = SimpleNamespace(model=str(tmp_path), model_weights="", revision=None, hf_config=text, hf_text_config=text)
        return model_revision(SimpleNamespace(**vars(model), max_model_len=max_model_len), load_format, weights)

    assert revision(2048) == revision(4096)
    assert revision(8192) == revision(16384)
    assert revision(8192, rope_type="yarn") == revision(4096, rope_type="yarn")
    variants = [revision(), revision(8192), revision(load_format="dummy"), revision(weights="1"), revision(weights="1", theta=2)]
    assert len(set(variants)) == len(variants)


def test_weights_that_are_one_file_or_are_told_by_another_name_have_a_revision(tmp_path):
    pytest.importorskip("huggingface_hub")

    def revision(model: str) -> str:
        known = SimpleNamespace(to_dict=dict)
        return model_revision(SimpleNamespace(model=model, model_weights="", revision=None, hf_config=known, hf_text_config=known), "auto")

    (file := tmp_path / "model.gguf").write_bytes(b"one")
    first = revision(str(file))
    file.write_bytes(b"two")
    assert first != revision(str(file))
    with pytest.raises(ModelError, match="'someone/some-model:Q4_K_M' are neither .*; set model.revision"):
        revision("someone/some-model:Q4_K_M")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Hugging Face's cache. Called with a commit, a branch and weights, it has these of the model `someone/some-model`."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--someone--some-model"

    def add(commit, branch, weights):
        folder = model / "snapshots" / commit
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        if weights is not None:
            (folder / "model.safetensors").write_bytes(weights)
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / branch).write_text(commit)
        return folder

    return add


def test_a_model_given_by_name_has_the_weights_of_its_revision(hub):
    name = "someone/some-model"
    folders = hub("c0ffee", "main", b"one"), hub("decade", "next", b"two")
    first, second = (folder_revision(folder) for folder in folders)
    assert first != second
    assert [named_revision(name, revision) for revision in (None, "main", "c0ffee", "next", "decade")] == [first] * 3 + [second] * 2
    assert [named_revision(str(folder), None) for folder in folders] == [first, second], "as vLLM names it offline"
    assert [given_name(str(folder)) for folder in folders] == [name] * 2
    assert given_name(name) == name
    assert adapter_revision(name) == first
    with pytest.raises(ModelError, match="'someone/some-model' at 'decay'"):
        named_revision(name, "decay")


def test_who_is_not_told_the_revision_takes_the_only_one_there_is(hub):
    name = "someone/some-model"
    with pytest.raises(ModelError, match="neither"):
        only_revision(name)
    first = hub("c0ffee", "main", b"one")
    assert only_revision(name) == only_revision(str(first)) == folder_revision(first)
    second = hub("decade", "next", b"two")
    with pytest.raises(ModelError, match=r"several revisions .*\(c0ffee, decade\).*set model.revision"):
        only_revision(name)
    assert only_revision(str(second)) == folder_revision(second)


def test_weights_in_another_folder_than_the_configuration_are_told_by_their_commit(hub):
    first, second = hub("c0ffee", "main", None), hub("decade", "next", None)
    assert [named_revision(str(folder), None) for folder in (first, second)] == ["c0ffee", "decade"]


def test_an_adapter_that_is_not_there_yet_is_not_known(hub):
    assert adapter_revision("someone/some-model") is None
    hub("c0ffee", "main", b"one")
    assert adapter_revision("someone/some-model")


def test_without_vllm_the_connector_says_what_to_install():
    import kvtier.engines.vllm as connector

    with pytest.raises(MissingExtra, match="pip install"):
        connector.KvtierConnector  # noqa: B018
