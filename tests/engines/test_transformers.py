"""Laws checked: what comes back from the tiers is what the model computed, it really came back, and it matters that it did."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from kvtier.cache import TieredKVCache
from kvtier.config import load_config
from kvtier.engines.models import cache_argument
from kvtier.engines.transformers import Session, TieredCache, layout_of
from kvtier.errors import LayoutError, ModelError

PROMPT = [(7 * position * position + 3) % 200 for position in range(150)]
GENERATE = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def open_cache(model, store, pages=64, disk_format="raw+lz4", name="tiny"):
    layout = layout_of(model)
    sizes = {
        "model.name": name,
        "device.capacity_bytes": pages * layout.page_bytes,
        "host.capacity_bytes": 8 * layout.page_bytes,
        "host.format": "raw",
        "disk.path": str(store),
        "disk.capacity_bytes": "16MiB",
        "disk.format": disk_format,
    }
    return TieredKVCache(load_config(env={}, overrides=sizes), layout)


@torch.inference_mode()
def untiered(model, prompt, prefix):
    """Greedy tokens with a plain cache whose first `prefix` tokens were computed beforehand, as an earlier turn would have."""
    past = DynamicCache()
    if prefix:
        model(torch.tensor([prompt[:prefix]]), **cache_argument(past))
    output = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **cache_argument(past), **GENERATE)
    return output[0, len(prompt) :].tolist()


def evict_everything(cache):
    """Push all pages below the device with pages of another tenant."""
    layout = cache.layout
    tokens = cache.stats()["tiers"]["device"]["achieved"]["slots"] * layout.page_tokens
    kv = torch.zeros(layout.layers, layout.planes, tokens, layout.kv_heads, layout.head_dim)
    assert cache.put(range(tokens), kv, salt="filler") == tokens
    cache.settle()


def test_restored_generation_equals_plain_generation_and_really_was_restored(model, tmp_path):
    with open_cache(model, tmp_path) as cache:
        assert Session(model, cache).generate(PROMPT, **GENERATE) == untiered(model, PROMPT, 0)
        evict_everything(cache)
        match = cache.lookup(PROMPT[:-1])
        assert match.tokens == 144
        assert match.pages_by_tier["device"] == 0
        assert match.pages_by_tier["disk"] > 0
        again = Session(model, cache)
        assert again.generate(PROMPT, **GENERATE) == untiered(model, PROMPT, 144)
        assert again.restored == 144


def test_zeroed_pages_change_the_output(model, tmp_path):
    """The control without which equality proves nothing: the model does read what was restored."""
    with open_cache(model, tmp_path) as cache:
        layout = cache.layout
        zeros = torch.zeros(layout.layers, layout.planes, 144, layout.kv_heads, layout.head_dim)
        cache.put(PROMPT[:144], zeros)
        session = Session(model, cache)
        assert session.generate(PROMPT, **GENERATE) != untiered(model, PROMPT, 144)
        assert session.restored == 144


def test_later_turns_compute_only_what_is_new(model, tmp_path):
    with open_cache(model, tmp_path) as cache:
        session = Session(model, cache, salt="a")
        session.generate(PROMPT, **GENERATE)
        kept = len(session.token_ids) - 1
        session.generate([5, 6, 7], **GENERATE)
        assert session.restored == kept // 16 * 16
        stranger = Session(model, cache, salt="b")
        stranger.generate(PROMPT, **GENERATE)
        assert stranger.restored == 0


def test_a_session_resumes_from_disk_in_a_new_cache(model, tmp_path):
    with open_cache(model, tmp_path) as cache:
        first = Session(model, cache)
        first.generate(PROMPT, **GENERATE)
    with open_cache(model, tmp_path) as cache:
        match = cache.lookup(first.token_ids)
        assert match.pages_by_tier["disk"] * 16 == match.tokens == 160
        session = Session(model, cache)
        answer = session.generate([*first.token_ids, 9], **GENERATE)
        assert session.restored == 160
        assert answer == untiered(model, [*first.token_ids, 9], 160)


def test_a_whole_prompt_in_the_cache_still_leaves_one_token_to_compute(model, tmp_path):
    with open_cache(model, tmp_path) as cache:
        session = Session(model, cache)
        session.generate(PROMPT[:128], **GENERATE)
        again = Session(model, cache)
        assert again.generate(PROMPT[:128], **GENERATE) == untiered(model, PROMPT[:128], 112)
        assert again.restored == 112


def test_crop_and_beam_operations_reach_the_restored_prefix(model, tmp_path):
    with open_cache(model, tmp_path) as cache:
        Session(model, cache).generate(PROMPT, **GENERATE)
        with TieredCache(cache, PROMPT) as past:
            past.crop(-10)
            assert past.get_seq_length() == past.layers[3].get_seq_length() == 134
            past.batch_repeat_interleave(3)
            past.reorder_cache(torch.tensor([2, 1, 0]))
            assert past.layers[7].keys.shape == (3, 2, 134, 16)


def test_batches_are_not_committed(model, tmp_path):
    with open_cache(model, tmp_path) as cache, TieredCache(cache, PROMPT) as past:
        model(torch.tensor([PROMPT, PROMPT]), **cache_argument(past))
        with pytest.raises(LayoutError, match="2 sequences"):
            past.commit(PROMPT)
        assert cache.lookup(PROMPT).tokens == 0


def test_a_device_too_small_for_the_session_keeps_what_fits(model, tmp_path):
    with open_cache(model, tmp_path, pages=4) as cache:
        session = Session(model, cache)
        assert session.generate(PROMPT, **GENERATE) == untiered(model, PROMPT, 0)
        assert cache.lookup(PROMPT).tokens == 64
        again = Session(model, cache)
        assert again.generate(PROMPT, **GENERATE) == untiered(model, PROMPT, 64)
        assert again.restored == 64


def test_models_kvtier_cannot_hold_are_refused():
    config = MistralConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, intermediate_size=64, sliding_window=32
    )
    config.layer_types = ["sliding_attention", "sliding_attention"]
    with pytest.raises(ModelError, match="sliding_attention"):
        layout_of(MistralForCausalLM(config))


def test_a_disk_without_a_model_name_is_refused(model, tmp_path):
    with open_cache(model, tmp_path, name="unnamed") as cache, pytest.raises(ModelError, match=r"set model\.name"):
        Session(model, cache).generate(PROMPT, **GENERATE)
