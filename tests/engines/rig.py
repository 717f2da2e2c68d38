"""Small models with random weights, and caches for them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from kvtier.cache import TieredKVCache
from kvtier.config import load_config
from kvtier.engines.transformers import layout_of

PROMPT = [(7 * position * position + 3) % 200 for position in range(150)]
GENERATE: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
SIZES: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "eos_token_id": None,
}


def llama(layers: int = 8, **more: Any) -> LlamaForCausalLM:
    """Attends over everything."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **SIZES, **more)).eval()


def sliding(kinds: list[str]) -> Gemma3ForCausalLM:
    """Layers of these kinds, with a window of 24 tokens where they slide; weights so large that its predictions hang on the context."""
    torch.manual_seed(1)
    sizes = {**SIZES, "num_hidden_layers": len(kinds), "head_dim": 16, "query_pre_attn_scalar": 16, "pad_token_id": 0}
    return Gemma3ForCausalLM(Gemma3TextConfig(layer_types=kinds, sliding_window=24, initializer_range=0.15, **sizes)).eval()


def open_cache(
    model: Any, store: Any, pages: int = 64, disk_format: str = "raw+lz4", name: str = "tiny", disk_bytes: str = "16MiB"
) -> TieredKVCache:
    """Room for `pages` pages on the device, 8 on the host and many on disk, all without loss."""
    layout = layout_of(model)
    sizes = {
        "model.name": name,
        "device.capacity_bytes": pages * layout.page_bytes,
        "host.capacity_bytes": 8 * layout.page_bytes,
        "host.format": "raw",
        "disk.path": str(store),
        "disk.capacity_bytes": disk_bytes,
        "disk.format": disk_format,
    }
    return TieredKVCache(load_config(env={}, overrides=sizes), layout)


def evict_everything(cache: TieredKVCache) -> None:
    """Push all pages below the device with pages of another tenant."""
    layout = cache.layout
    tokens = cache.stats()["tiers"]["device"]["achieved"]["slots"] * layout.page_tokens
    kv = torch.zeros(layout.layers, layout.planes, tokens, layout.kv_heads, layout.head_dim)
    assert cache.put(range(tokens), kv, salt="filler") == tokens
    cache.settle()
