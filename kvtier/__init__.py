"""kvtier: a tiered KV cache for LLM serving.

`TieredKVCache` is the public face. Names are loaded when first used, so that `kvtier.policy`, `kvtier.config` and the command line work
without importing torch.
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
