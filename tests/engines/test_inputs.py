"""Laws checked: what KV depends on beside its tokens is refused or computed again; nothing is found by others with the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from kvtier.engines.budgeted import BudgetedCache
from kvtier.engines.models import cache_argument
from kvtier.engines.transformers import Session, TieredCache, layout_of
from kvtier.errors import LayoutError, ModelError
from tests.engines.rig import GENERATE, PROMPT, SIZES, llama, open_cache

LONGER = PROMPT[:110]
ROTATIONS: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0] * 8,
        "long_factor": [8.0] * 8,
        "original_max_position_embeddings": 64,
    },
}
"""Rotations of keys that change, all of them, where a sequence is longer than 63 or 64 tokens."""


def rotating(kind: str) -> Any:
    torch.manual_seed(0)
    sizes = SIZES | {"num_hidden_layers": 3, "initializer_range": 0.15, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=ROTATIONS[kind] | {"rope_theta": 1e4})).eval()


def plain(model: Any, ids: list[int], **options: Any) -> list[int]:
    inputs = torch.tensor([ids])
    answer: list[int] = model.generate(inputs, attention_mask=torch.ones_like(inputs), **(GENERATE | options))[0, len(ids) :].tolist()
    return answer


def test_images_beside_the_tokens_are_refused(tmp_path):
    torch.manual_seed(0)
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(num_hidden_layers=2, **SIZES), image_token_index=199)
    ).eval()
    ids = [3, 4] + [199] * 16 + PROMPT[:30]
    inputs, pixels = torch.tensor([ids]), torch.randn(1, 3, 28, 28)
    with open_cache(model, tmp_path) as cache:
        with TieredCache(cache, ids, model=model) as past, pytest.raises(LayoutError, match=r"was given .*: its KV depends on that"):
            model.generate(inputs, attention_mask=torch.ones_like(inputs), pixel_values=pixels, **cache_argument(past), **GENERATE)
        with TieredCache(cache, ids, model=model) as past, pytest.raises(LayoutError, match="pixel_values"):
            model(inputs, pixel_values=pixels, **cache_argument(past))
        assert cache.lookup(ids).tokens == 0
        session = Session(model, cache)
        assert session.generate(PROMPT, **GENERATE) == plain(model, PROMPT), "text alone is served"


def test_a_mask_of_what_each_token_sees_is_refused(tmp_path):
    """Here every token sees all others."""
    model, ids = llama(layers=2), torch.tensor([PROMPT])
    everything = torch.zeros(1, 1, 150, 150)
    with open_cache(model, tmp_path) as cache:
        with TieredCache(cache, PROMPT, model=model) as past, pytest.raises(LayoutError, match=r"mask is \[1, 1, 150, 150\]; expected"):
            model(ids, attention_mask=everything, **cache_argument(past))
        with TieredCache(cache, PROMPT, model=model) as past:
            model(ids[:, :100], **cache_argument(past))
            for mask in (everything[:, :, 100:], {"full_attention": everything[:, :, 100:]}):
                with pytest.raises(LayoutError, match=r"expected \[sequences, columns\], or none"):
                    model(ids[:, 100:], attention_mask=mask, **cache_argument(past))
        with BudgetedCache(model, cache, PROMPT, 12) as past, pytest.raises(LayoutError, match="mask is"):
            model(ids, attention_mask=everything, **cache_argument(past))
        assert cache.lookup(PROMPT).tokens == 0


def test_a_model_that_was_told_to_use_no_cache_uses_this_one(tmp_path):
    """As most are left by their training; some are by default. Every token would bring the whole sequence into the cache again."""
    model = llama(layers=2, initializer_range=0.15, use_cache=False)
    said = plain(model, PROMPT, use_cache=True)
    assert model.generation_config.use_cache is False
    with open_cache(model, tmp_path) as cache:
        for restored in (0, 144):
            session = Session(model, cache)
            assert session.generate(PROMPT, **GENERATE) == said
            assert session.restored == restored
        assert Session(model, cache, device_pages=12, select="exact").generate(PROMPT, **GENERATE) == said
        inputs = torch.tensor([PROMPT])
        for past in (TieredCache(cache, PROMPT, model=model), BudgetedCache(model, cache, PROMPT, 12)):
            with past, pytest.raises(LayoutError, match="use_cache is off .*; say use_cache=True"):
                model.generate(inputs, attention_mask=torch.ones_like(inputs), **cache_argument(past), **GENERATE)
        with pytest.raises(LayoutError, match="use_cache is off"):
            Session(model, cache).generate(PROMPT, use_cache=False, **GENERATE)


def test_a_model_with_an_encoder_is_refused():
    sizes = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    model = BartForConditionalGeneration(BartConfig(vocab_size=100, d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32, **sizes))
    with pytest.raises(ModelError, match="an encoder"):
        layout_of(model)


@pytest.mark.parametrize("kind", ROTATIONS)
def test_sequences_that_rotate_their_keys_otherwise_share_no_page(kind, tmp_path):
    model = rotating(kind)
    short, own_short = PROMPT[:48], plain(model, PROMPT[:48])
    own_long = plain(model, LONGER)
    for number, order in enumerate([(short, LONGER, short), (LONGER, short, LONGER)]):
        with open_cache(model, tmp_path / str(number)) as cache:
            for ids in order:
                plain(model, PROMPT[:5], max_new_tokens=1)  # transformers goes on with the rotation of the last sequence
                assert Session(model, cache).generate(ids, **GENERATE) == (own_short if ids is short else own_long)
            again = Session(model, cache)
            again.generate(short, **GENERATE)
            assert again.restored == 32


@pytest.mark.parametrize("kind", ROTATIONS)
def test_what_is_generated_behind_the_change_is_not_kept(kind, tmp_path):
    model = rotating(kind)
    with open_cache(model, tmp_path) as cache:
        session = Session(model, cache)
        assert session.generate(PROMPT[:50], **(GENERATE | {"max_new_tokens": 60})) == plain(model, PROMPT[:50], max_new_tokens=60)
        assert cache.lookup(session.token_ids).tokens == (48 if kind == "dynamic" else 64)


def test_a_device_budget_ends_where_the_rotation_changes(tmp_path):
    model = rotating("longrope")
    with open_cache(model, tmp_path) as cache, pytest.raises(ModelError, match="beyond 64 tokens"):
        Session(model, cache, device_pages=4).generate(LONGER, **GENERATE)
