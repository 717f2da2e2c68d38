"""Laws checked: what comes back from the tiers is what the model computed, it really came back, and it matters that it did."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from kvtier.engines.models import cache_argument
from kvtier.engines.transformers import Session, TieredCache, layout_of
from kvtier.errors import LayoutError, ModelError
from tests.engines.rig import GENERATE, PROMPT, evict_everything, llama, open_cache


@pytest.fixture(scope="module")
def model():
    return llama()


@torch.inference_mode()
def untiered(model, prompt, prefix):
    """Greedy tokens with a plain cache whose first `prefix` tokens were computed beforehand, as an earlier turn would have."""
    past = DynamicCache()
    if prefix:
        model(torch.tensor([prompt[:prefix]]), **cache_argument(past))
    output = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **cache_argument(past), **GENERATE)
    return output[0, len(prompt) :].tolist()


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


def test_a_batch_of_unknown_rows_is_not_committed(model, tmp_path):
    with open_cache(model, tmp_path) as cache, TieredCache(cache, PROMPT) as past:
        model(torch.tensor([PROMPT, PROMPT]), **cache_argument(past))
        with pytest.raises(LayoutError, match="2 sequences|holds 2"):
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


@pytest.mark.parametrize(
    ("setting", "value", "why"),
    [
        ("layer_types", ["full_attention", "linear_attention"], "linear_attention"),
        ("kv_lora_rank", 8, "latents"),
        ("num_kv_shared_layers", 2, "share"),
    ],
)
def test_models_kvtier_cannot_hold_are_refused(setting, value, why):
    model = llama(layers=2)
    setattr(model.config, setting, value)
    with pytest.raises(ModelError, match=why):
        layout_of(model)


def test_a_disk_without_a_model_name_is_refused(model, tmp_path):
    with open_cache(model, tmp_path, name="unnamed") as cache, pytest.raises(ModelError, match=r"set model\.name"):
        Session(model, cache).generate(PROMPT, **GENERATE)


def test_tensors_of_tokens_are_taken_as_tokenizers_make_them(model, tmp_path):
    with open_cache(model, tmp_path) as cache:
        said = Session(model, cache).generate(torch.tensor([PROMPT]), **GENERATE)
        assert said == untiered(model, PROMPT, 0)
        for ids in (torch.tensor(PROMPT), torch.tensor([PROMPT])):
            again = Session(model, cache)
            assert again.generate(ids, **GENERATE) == said
            with TieredCache(cache, ids, model=model) as past:
                assert again.restored == past.restored == 144
        with pytest.raises(LayoutError, match=r"\[2, 150\]; a session plays one sequence"):
            Session(model, cache).generate(torch.tensor([PROMPT, PROMPT]), **GENERATE)
