"""kvtier: a tiered KV cache for LLM serving.

    layout = PageLayout(layers=32, planes=2, page_tokens=16, kv_heads=8, head_dim=128, dtype="bf16")
    with TieredKVCache.open("kvtier.yaml", layout) as cache:
        with cache.acquire(cache.lookup(token_ids)) as lease:
            block_table = lease.wait()
            cache.append(lease, token_ids[lease.tokens:], kv)

`TieredKVCache`: the cache; `help(kvtier.TieredKVCache)` describes its methods.
`PageLayout`: shape and dtype of a page, as the engine produces it.
`Match`, `Lease`: what `lookup` found, and a hold on pages.
`Config`, `load_config`: the configuration tree (docs/configuration.md), and how it is read.
`KVTierError`: the base of all errors; `kvtier.errors` has them, named for what the caller can do.

`kvtier.engines.transformers` is for Hugging Face models, `kvtier.engines.vllm` is vLLM's connector; other engines: docs/.
Names are loaded when first used, so that `kvtier.policy`, `kvtier.config` and the command line work without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvtier.cache import TieredKVCache
    from kvtier.config import Config, load_config
    from kvtier.errors import KVTierError
    from kvtier.layout import PageLayout
    from kvtier.leases.lease import Lease, Match

__version__ = version("kvtier")
__all__ = ["Config", "KVTierError", "Lease", "Match", "PageLayout", "TieredKVCache", "__version__", "load_config"]

_ROOMS = {
    "TieredKVCache": "cache",
    "Config": "config",
    "load_config": "config",
    "KVTierError": "errors",
    "PageLayout": "layout",
    "Lease": "leases.lease",
    "Match": "leases.lease",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'kvtier' has no attribute {name!r}")
    return getattr(import_module(f"kvtier.{_ROOMS[name]}"), name)
