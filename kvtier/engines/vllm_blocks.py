"""What is inside a chunk of vLLM's CPU tier, for formats that lose bits and so have to know which numbers belong together.

vLLM tells a tier how many bytes a block has and how its cache is ordered, but neither heads nor what the attention kernel does inside a
block. The heads are the model's; where the numbers go is probed with vLLM's own kernel, in this process, because the CPU backend keeps
keys transposed on some machines. On GPUs a tier's process, the scheduler's, has no such kernel at hand: refused. No state.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.platforms import current_platform
from vllm.transformers_utils.config import get_config, get_hf_text_config
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa  # vLLM 0.32 has no public way to ask

from kvtier.engines.vllm.layouts import matching, readings
from kvtier.errors import LayoutError
from kvtier.layout import PageLayout
from kvtier.tiers.lent import BlockLayout

_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_ORDERS = {
    "K and V side by side": ("LHTPD", "LHTPD"),
    "K, then V": ("LHPTD", "LHPTD"),
    "K transposed, then V": ("LHPDT", "LHPTD"),
}
"""By reading of a block, the order of its keys' and its values' axes."""


def known_blocks(config: Any, chunk_bytes: int) -> BlockLayout:
    """The layout of chunks of `chunk_bytes` under vLLM's `OffloadingConfig`. LayoutError, naming the reason, where it cannot be known.

    A chunk is one block after the other of one layer on one worker; which of them comes first is no matter to a format, so they all count
    as layers.
    """
    dtype = _DTYPES.get(config.model.dtype)
    if not current_platform.is_cpu() or config.kv_cache_layout != "LBHNC" or config.canonical_layout:
        raise _unknown(f"their order is known for vLLM's CPU backend only (here: {current_platform.device_name}, {config.kv_cache_layout})")
    if dtype is None or len(config.groups) != 1:
        raise _unknown(f"expected one KV group of {', '.join(_DTYPES)} (here: {len(config.groups)} of {config.model.dtype})")
    heads, head_dim = _heads(config)
    tokens = config.groups[0].tokens_per_block
    layer = PageLayout(1, 2, tokens, heads, head_dim, dtype)
    per_worker = len(config.groups[0].layer_names) * layer.page_bytes
    if config.worker_kv_bytes_per_block != per_worker or chunk_bytes % layer.page_bytes:
        raise _unknown(f"a worker's block has {config.worker_kv_bytes_per_block} bytes; expected {per_worker} for {layer} in each layer")
    layers = chunk_bytes // layer.page_bytes
    return BlockLayout(PageLayout(layers, 2, tokens, heads, head_dim, dtype), *_ORDERS[_reading(layer)])


def _heads(config: Any) -> tuple[int, int]:
    """KV heads of one worker, and their width."""
    text = get_hf_text_config(get_config(config.model.name, trust_remote_code=False))
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return max(1, heads // config.parallel.tp_size), width


def _reading(layer: PageLayout) -> str:
    """Which reading of a block is right here: one is written with the kernel that the engine uses, and looked at."""
    shape = (layer.page_tokens, layer.kv_heads, layer.head_dim)
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(shape, generator=generator).to(layer.torch_dtype) for _ in range(2))
    block = torch.zeros((1, layer.kv_heads, layer.page_tokens, 2 * layer.head_dim), dtype=layer.torch_dtype)
    planes = block.view(1, layer.kv_heads, 2 * layer.page_tokens, layer.head_dim).chunk(2, dim=2)
    isa = _get_attn_isa(layer.torch_dtype, layer.page_tokens, layer.head_dim)
    ops.cpu_attn_reshape_and_cache(keys, values, *planes, torch.arange(layer.page_tokens), isa)
    return matching(readings(block, layer.head_dim), 0, keys, values)


def _unknown(why: str) -> LayoutError:
    return LayoutError(
        f"disk.format loses bits and has to know what is inside vLLM's blocks, but {why}; use a format without loss (raw, raw+lz4, "
        "raw+zstd), or kvtier's connector (docs/vllm.md)"
    )
