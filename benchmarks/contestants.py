"""What `engines.py` compares: vLLM alone, and what can stand behind its own cache. Data only; `serving.py` starts them.

All get room for the same number of pages in memory, whatever a page takes there, so that what is in memory with one is with all.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvtier.formats import get_format
from kvtier.layout import PageLayout

SLOW_IN_BF16 = platform.machine() == "x86_64" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
"""Whether vLLM takes about five times as long in bf16 as in fp32 on this CPU, which is so without AVX-512: 20 to 40 s for 1,000 tokens."""
ENGINE_DTYPE = "float32" if SLOW_IN_BF16 else "bfloat16"
"""What all engines compute in, by vLLM's name."""
LAYOUT = PageLayout(layers=30, planes=2, page_tokens=128, kv_heads=3, head_dim=64, dtype="fp32" if SLOW_IN_BF16 else "bf16")
"""A block of vLLM on CPUs with SmolLM2-135M."""
SECTOR_BYTES = 4096
"""What a page is rounded up to at most."""
GIB = 1 << 30


@dataclass(frozen=True)
class Place:
    """What a connector is told: where its files go, the port of its server, pages it may keep in memory and on disk."""

    store: Path
    port: int
    memory_pages: int
    disk_pages: int


@dataclass(frozen=True)
class System:
    """Something behind an engine's own cache, or nothing.

    `connector`: arguments of vLLM's `KVTransferConfig`; None without one.
    `chunk_tokens`: of the LMCache server it needs, 0 without one. `durable`: whether the store outlives the engine. `limited`: whether it
    passes over a request that says so (`PASSED_OVER`).
    """

    connector: Callable[[Place], dict[str, Any]] | None = None
    chunk_tokens: int = 0
    durable: bool = False
    limited: bool = False


def _tiering(place: Place) -> dict[str, Any]:
    extra = {
        "cpu_bytes_to_use": place.memory_pages * LAYOUT.page_bytes,
        "spec_name": "CpuTieringSpec",
        "spec_module_path": "kvtier.bench.cpu_tiering",
        "secondary_tiers": [{"type": "fs", "root_dir": str(place.store)}],
    }
    return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}


def _lmcache(place: Place) -> dict[str, Any]:
    return {
        "kv_connector": "LMCacheMPConnector",
        "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"lmcache.mp.host": "tcp://localhost", "lmcache.mp.port": place.port},
    }


def _kvtier(host_format: str, disk_format: str) -> Callable[[Place], dict[str, Any]]:
    def room(name: str, pages: int) -> int:
        return pages * (get_format(name).payload_bytes(LAYOUT) + SECTOR_BYTES)

    def connector(place: Place) -> dict[str, Any]:
        return {
            "kv_connector": "KvtierConnector",
            "kv_connector_module_path": "kvtier.engines.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "host.capacity_bytes": room(host_format, place.memory_pages),
                "host.format": host_format,
                "disk.path": str(place.store),
                "disk.capacity_bytes": room(disk_format, place.disk_pages),
                "disk.format": disk_format,
            },
        }

    return connector


PASSED_OVER = {"max_offload_tokens": 0, "max_load_tokens": 0}
"""What a request says in its `kv_transfer_params` that is neither to be stored nor looked up: vLLM's own names, which kvtier knows too."""
SYSTEMS = {
    "plain": System(),
    "vllm-fs": System(_tiering, durable=True, limited=True),
    "lmcache-fs": System(_lmcache, chunk_tokens=128, durable=True),
    "kvtier-q8": System(_kvtier("q8", "q8"), durable=True, limited=True),
    "kvtier-q4": System(_kvtier("q8", "q4"), durable=True, limited=True),
    "kvtier-raw": System(_kvtier("raw", "raw"), durable=True, limited=True),
    "lmcache-fs-256": System(_lmcache, chunk_tokens=256, durable=True),
    "lmcache-ram": System(_lmcache, chunk_tokens=128),
}
"""By name: vLLM alone; its own tiers; LMCache's server with chunks of 128 tokens; kvtier with (host, disk) formats; LMCache otherwise."""
USUAL = ("plain", "vllm-fs", "lmcache-fs", "kvtier-q8", "kvtier-q4", "kvtier-raw")
"""Those that run unless others are named."""
