"""Law checked: whatever a model's attention is like (one head of keys for all, a bias by distance instead of rotation, learned positions,
windows, experts), a new process goes on with what the last one kept, and says what the model alone says; or the model is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from kvtier.cache import TieredKVCache
from kvtier.engines.models import cache_argument
from kvtier.engines.transformers import Session, TieredCache, generate_together, layout_of, left_padded
from kvtier.errors import ModelError
from tests.engines.rig import GENERATE, PROMPT, llama, open_cache

SHORT = PROMPT[::-1][:60]
LOUD: dict[str, Any] = {"vocab_size": 200, "initializer_range": 0.15, "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
"""Weights so large that predictions hang on the context."""
COMMON: dict[str, Any] = {
    **LOUD,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
FALCON = {key: value for key, value in COMMON.items() if key != "intermediate_size"}
GPT: dict[str, Any] = {**LOUD, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024}
GPT_NEO: dict[str, Any] = {**LOUD, "hidden_size": 64, "max_position_embeddings": 1024, "attention_types": [[["global", "local"], 1]]}
WINDOWS: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 24}

KINDS: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "Falcon, one head for all": ("Falcon", FALCON, (1, 16)),
    "Falcon, a head each": ("Falcon", {**FALCON, "multi_query": False}, (4, 16)),
    "Falcon, groups": ("Falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}, (4, 16)),
    "Falcon, bias by distance": ("Falcon", {**FALCON, "alibi": True}, (1, 16)),
    "GPT-BigCode, one head for all": ("GPTBigCode", GPT, (1, 16)),
    "GPT-BigCode, a head each": ("GPTBigCode", {**GPT, "multi_query": False}, (4, 16)),
    "MPT": ("Mpt", {**LOUD, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 1024}, (4, 16)),
    "BLOOM": ("Bloom", {**LOUD, "hidden_size": 64, "n_layer": 2, "n_head": 4}, (4, 16)),
    "OPT": ("OPT", {**COMMON, "ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.15}, (4, 16)),
    "GPT-2": ("GPT2", GPT, (4, 16)),
    "GPT-Neo": ("GPTNeo", {**GPT_NEO, "num_layers": 2, "num_heads": 4, "window_size": 24}, (4, 16)),
    "GPT-NeoX": ("GPTNeoX", COMMON, (4, 16)),
    "Phi": ("Phi", GROUPED, (2, 16)),
    "Gemma": ("Gemma", {**GROUPED, "head_dim": 32}, (2, 32)),
    "Gemma 2": ("Gemma2", {**GROUPED, **WINDOWS}, (2, 16)),
    "Mistral, windows": ("Mistral", {**GROUPED, "sliding_window": 24}, (2, 16)),
    "Qwen 2, windows in some": ("Qwen2", {**GROUPED, "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}, (2, 16)),
    "Qwen 3": ("Qwen3", {**GROUPED, "head_dim": 32}, (2, 32)),
    "Cohere": ("Cohere", GROUPED, (2, 16)),
    "Mixtral": ("Mixtral", {**GROUPED, "num_local_experts": 4}, (2, 16)),
    "StableLM": ("StableLm", GROUPED, (2, 16)),
    "GPT-OSS, sinks": ("GptOss", {**GROUPED, "head_dim": 16, "num_local_experts": 4, "sliding_window": 24}, (2, 16)),
}


def made(name: str) -> Any:
    torch.manual_seed(4)
    kind, settings, _ = KINDS[name]
    config = getattr(transformers, f"{kind}Config")(**settings)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def plain(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    inputs = left_padded(prompts, 0)
    longest = inputs["input_ids"].shape[1]
    answers: list[list[int]] = model.generate(**inputs, **GENERATE)[:, longest:].tolist()
    return answers


@torch.inference_mode()
def next_token(model: Any, ids: list[int], **options: Any) -> torch.Tensor:
    """Logits `[vocabulary]` behind these tokens."""
    logits: torch.Tensor = model(torch.tensor([ids]), **options).logits[0, -1]
    return logits


def restored_next_token(model: Any, cache: TieredKVCache, salt: str) -> torch.Tensor:
    with TieredCache(cache, PROMPT, salt, model) as past:
        assert past.restored == 144
        return next_token(model, PROMPT[144:], **cache_argument(past))


@pytest.mark.parametrize("name", KINDS)
def test_a_new_process_goes_on_with_what_the_last_one_kept(name, tmp_path):
    model = made(name)
    layout = layout_of(model)
    assert (layout.kv_heads, layout.head_dim) == KINDS[name][2]
    both = plain(model, [PROMPT, SHORT])
    alone = plain(model, [PROMPT])[0]
    with open_cache(model, tmp_path) as cache:
        assert Session(model, cache).generate(PROMPT, **GENERATE) == alone
        assert generate_together([Session(model, cache), Session(model, cache)], [PROMPT, SHORT], **GENERATE) == both
    with open_cache(model, tmp_path) as cache:
        session = Session(model, cache)
        assert session.generate(PROMPT, **GENERATE) == alone
        assert session.restored == 144
        sessions = [Session(model, cache), Session(model, cache)]
        assert generate_together(sessions, [PROMPT, SHORT], **GENERATE) == both
        assert [each.restored for each in sessions] == [138, 48]
        zeros = torch.zeros(layout.layers, layout.planes, 144, layout.kv_heads, layout.head_dim)
        cache.put(PROMPT[:144], zeros, salt="zeros")
        whole = next_token(model, PROMPT)
        assert torch.allclose(restored_next_token(model, cache, ""), whole, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(restored_next_token(model, cache, "zeros"), whole, rtol=1e-2, atol=1e-2), "what is restored matters"


def test_a_model_whose_kv_is_not_of_the_layout_is_refused_at_its_first_layer(tmp_path):
    model = llama(layers=2)
    other = llama(layers=2)
    other.config.num_key_value_heads = 4
    what = r"layer 0 has keys and values of .* \(2, 16\) and \(2, 16\), but pages hold \(4, 16\)"
    with open_cache(other, tmp_path) as cache, pytest.raises(ModelError, match=what):
        Session(model, cache).generate(PROMPT, **GENERATE)


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        ("Moshi", {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}, "own cache alone"),
        ("OpenAIGPT", {"n_embd": 64, "n_layer": 2, "n_head": 4}, "no KV cache in transformers"),
        ("Rwkv", {"hidden_size": 64, "num_hidden_layers": 2}, "no KV cache in transformers"),
        ("Jamba", {"hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2}, "linear_attention"),
        ("Gemma4Text", {"num_hidden_layers": 6, "hidden_size": 64}, "layers of unequal KV"),
    ],
)
def test_models_that_pages_cannot_hold_are_refused_by_name(name, settings, why):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**settings))
    with pytest.raises(ModelError, match=why):
        layout_of(model)


@pytest.mark.parametrize("name", ["Qwen 3", "BLOOM", "MPT"])  # which are told positions, and are not
@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 4}])
def test_a_prompt_that_goes_on_as_it_began_is_computed_whole(name, options, tmp_path):
    """What comes behind the restored tokens begins with the same ones."""
    model = made(name)
    once = PROMPT[:16]
    prompt = [*once, *once, *once, *PROMPT[40:60]]
    alone = plain(model, [prompt])[0]
    with open_cache(model, tmp_path) as cache:
        Session(model, cache).generate([*once, *SHORT[:3]], **GENERATE)
        session = Session(model, cache)
        assert session.generate(prompt, **GENERATE, **options) == alone
        assert session.restored == 16
        with TieredCache(cache, [*once, *once], model=model) as past:
            given = next_token(model, [*once, *PROMPT[40:60]], **cache_argument(past))
            assert torch.allclose(given, next_token(model, [*once, *once, *PROMPT[40:60]]), rtol=1e-4, atol=1e-4)
