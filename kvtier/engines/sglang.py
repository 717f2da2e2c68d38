"""kvtier's disk tier as a storage backend of SGLang's hierarchical cache, loaded by its `dynamic` configuration; SGLang is not patched.

SGLang's own threads call, several at once, and wait for the answer; `BlockStore` is safe for that and owns all state but what keys begin
with (`generations.py`) and `_pool`, which is set once, before the first call. A page is one block, read and written in SGLang's host memory
without another copy of it there (`batch_get_v1`, `batch_set_v1`); the older calls with tensors work, too. Written for SGLang 0.5.23.
"""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from kvtier.blocks import BlockStore, Chain
from kvtier.engines.generations import Generations
from kvtier.engines.settings import store_config
from kvtier.engines.versions import require_engine
from kvtier.engines.weights import named_adapter_revision, named_revision
from kvtier.errors import ConfigError, LayoutError
from kvtier.layout import PageLayout
from kvtier.tiers.lent import BlockLayout, Part

require_engine("sglang")

from sglang.srt.mem_cache.hicache_storage import (  # noqa: E402  # after the check
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
)
from sglang.srt.runtime_context import get_lora, get_model, get_server_args, get_serving  # noqa: E402

log = logging.getLogger(__name__)

ORDERS = {"layer_first": "LPTHD", "page_first": "PTLHD", "page_first_direct": "PLTHD", "page_head": "PHTLD"}
"""By layout of SGLang's host pool, the order of the axes in the pieces of a page that it names, put one after the other."""
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class _Pool:
    """SGLang's host pool and the store of its pages."""

    host: Any
    store: BlockStore
    pieces: int
    """Stretches of memory a page consists of."""
    flat_layers: int
    """Layers to be taken apart in a page as the older calls have it, which keeps all keys before all values; 0 where that is no matter."""


class KvtierHiCache(HiCacheStorage):  # type: ignore[misc]  # SGLang is not there when types are checked
    """Pages in a `kvtier.blocks.BlockStore`, one store per rank, in a directory of its own below `disk.path`.

    Of `hicache-storage-backend-extra-config`, the keys with a dot in them and `config` are kvtier's (`store_config`). The model's name,
    weights, dtype, layers, heads, page size and ranks are part of every key. Formats that lose bits need a dtype and layout that kvtier
    knows (ORDERS; bf16, fp16, fp32), others are kept as they are. ConfigError, LayoutError, StoreError or StoreLocked if it cannot be.
    """

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: Mapping[str, object]) -> None:
        given: Mapping[str, Any] = storage_config.extra_config or {}
        self._settings = {key: value for key, value in given.items() if "." in key or key == "config"}
        self._config = store_config(self._settings)
        self._ranks = storage_config
        self._pool: _Pool | None = None
        self._generations = Generations(lambda: get_serving().weight_version, get_server_args().weight_version)
        if storage_config.is_mla_model and storage_config.tp_size > 1:
            raise ConfigError(
                f"this model keeps the same KV on all {storage_config.tp_size} tensor-parallel ranks and SGLang stores it once, but a "
                "store of kvtier belongs to one process; run it with one rank, or use another backend"
            )

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """SGLang names its host pool; the store is opened here, because only now is known what a page is."""
        super().register_mem_pool_host(mem_pool_host)
        self.close()
        ranks, own = self._ranks, self._config.disk
        assert own is not None  # `store_config` requires it
        blocks, pieces = _blocks_of(mem_pool_host)
        place = {"tp": (ranks.tp_rank, ranks.tp_size), "pp": (ranks.pp_rank, ranks.pp_size)}
        place |= {"cp": (ranks.attn_cp_rank, ranks.attn_cp_size), "dcp": (ranks.dcp_rank, ranks.dcp_size)}
        facts: dict[str, object] = {
            "engine": "sglang",
            "model": ranks.model_name or self._config.model.name,
            "revision": self._config.model.revision or _weights(),
            "dtype": _numbers(mem_pool_host.dtype),
            "page_tokens": mem_pool_host.page_size,
            "block_bytes": blocks.block_bytes,
            "layers": [mem_pool_host.start_layer, mem_pool_host.end_layer],
            "ranks": place,
            "layout": "any" if blocks.known else mem_pool_host.layout,
        }
        where = "-".join(f"{name}{rank}of{size}" for name, (rank, size) in place.items() if size > 1 or name == "tp")
        path = Path(own.path) / (where + (f"-dp{ranks.dp_rank}" if ranks.dp_rank else ""))
        config = self._config.model_copy(update={"disk": own.model_copy(update={"path": str(path)})})
        store = BlockStore(config, blocks, facts)
        self._pool = _Pool(mem_pool_host, store, pieces, mem_pool_host.layer_num if pieces > 2 else 0)
        log.info("kvtier keeps pages of %s (%s) in %s", blocks.page, own.format, path)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: str) -> None:
        """Only the pool of keys and values: models that need others beside it (Mamba, sliding windows, draft models) are refused."""
        if host_pool_name != "kv":
            raise LayoutError(
                f"this model has a second host pool, {str(host_pool_name)!r}, which kvtier's backend does not hold; use another"
            )
        super().register_mem_host_pool_v2(host_pool, host_pool_name)

    # -- pages where they are in SGLang's host memory --------------------------------------------------------------------------

    def batch_get_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None) -> list[bool]:
        pool = self._open()
        return pool.store.get(self._names(keys), _pages(pool, host_indices, len(keys)))

    def batch_set_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None) -> list[bool]:
        pool = self._open()
        before = extra_info.prefix_keys if extra_info is not None else None  # with `hicache_storage_pass_prefix_keys`
        last = list(before or ())[-1:]
        names = self._names([*last, *keys])
        chain = None if before is None else Chain(names[0] if last else None, len(before))
        return pool.store.put(names[len(last) :], _pages(pool, host_indices, len(keys)), chain)

    def batch_exists(self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None) -> int:
        found = self._open().store.exists(self._names(keys))
        return found.index(False) if False in found else len(found)

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    # -- pages as flat tensors (SGLang's older calls) --------------------------------------------------------------------------

    def get(self, key: str, target_location: torch.Tensor | None = None, target_sizes: object = None) -> torch.Tensor | None:
        return self.batch_get([key], None if target_location is None else [target_location])[0]

    def batch_get(
        self, keys: list[str], target_locations: Sequence[torch.Tensor] | None = None, target_sizes: object = None
    ) -> list[torch.Tensor | None]:
        pool = self._open()
        targets = target_locations or [pool.host.get_dummy_flat_data_page() for _ in keys]
        came = pool.store.get(self._names(keys), [_flat(pool, target) for target in targets])
        return [target if here else None for target, here in zip(targets, came, strict=True)]

    def set(self, key: str, value: torch.Tensor | None = None, target_location: object = None, target_sizes: object = None) -> bool:
        return value is not None and self.batch_set([key], [value])

    def batch_set(
        self, keys: list[str], values: Sequence[torch.Tensor] | None = None, target_locations: object = None, target_sizes: object = None
    ) -> bool:
        pool = self._open()
        return values is not None and all(pool.store.put(self._names(keys), [_flat(pool, value.contiguous()) for value in values]))

    # -- the whole -------------------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Forget everything. SGLang says so when somebody asks it to, perhaps because the weights are others now, which it does not say."""
        self._generations.begin()
        self._open().store.clear()

    def close(self) -> None:
        """End what runs and leave the store to the next process. Safe to call twice."""
        if self._pool is not None:
            self._pool.store.close()
            self._pool = None

    @property
    def store(self) -> BlockStore:
        """The store behind this backend, for its `stats`. ConfigError before SGLang registered its host pool."""
        return self._open().store

    def _names(self, keys: Sequence[str]) -> list[bytes]:
        prefix = self._generations.prefix()
        return [prefix + key.encode() for key in keys]

    def _open(self) -> _Pool:
        if self._pool is None:
            raise ConfigError("SGLang's host pool is not known yet, so neither is what a page is; call register_mem_pool_host first")
        return self._pool


def _blocks_of(host: Any) -> tuple[BlockLayout, int]:
    """What a page of this host pool is, and in how many pieces it lies there. LayoutError for pools whose pages are none of one kind."""
    order = ORDERS.get(host.layout)
    if order is None:
        raise LayoutError(f"hicache-mem-layout is {host.layout!r}, which kvtier does not know; use one of {', '.join(ORDERS)}")
    _, sizes = host.get_page_buffer_meta(torch.arange(host.page_size))
    total = sum(sizes)
    latent = hasattr(host, "kv_lora_rank")
    heads, width = (1, host.kv_cache_dim) if latent else (host.head_num, host.head_dim)
    planes = 1 if latent else 2
    values = host.layer_num * planes * host.page_size * heads * width
    if getattr(host, "v_head_dim", width) == width and total != values * host.dtype.itemsize:
        raise LayoutError(
            f"a page of this host pool has {total} bytes in {len(sizes)} pieces; expected {values * host.dtype.itemsize} of keys and "
            "values: a pool with something more in it (scales, an index) is not one that kvtier holds"
        )
    name = _DTYPES.get(host.dtype)
    if name is None or getattr(host, "v_head_dim", width) != width:
        return BlockLayout.opaque(total), len(sizes)
    return BlockLayout(PageLayout(host.layer_num, planes, host.page_size, heads, width, name), order, order), len(sizes)


def _numbers(dtype: torch.dtype) -> str:
    """What the bytes of a pool of this dtype stand for. SGLang keeps all kinds of FP8 as plain bytes, scaled by what a file says.

    ConfigError where that file cannot be read.
    """
    if dtype in _DTYPES:
        return str(dtype)
    kind, scales = get_model().kv_cache_dtype, get_model().quantization_param_path
    try:
        scaled = "" if scales is None else xxhash.xxh3_128_hexdigest(Path(scales).read_bytes())
    except OSError as error:
        raise ConfigError(f"quantization-param-path {scales} cannot be read: {error.strerror}; name SGLang's file of KV scales") from None
    return f"{dtype}, {kind}, scales {scaled}"


def _weights() -> str:
    """What this server computes KV with: the name in SGLang's storage configuration is only what it is served under.

    Of the adapters that it starts with, SGLang's keys have name and path; those of adapters loaded later no other server has.
    """
    server, adapters = get_server_args(), get_lora().lora_paths or ()
    how = f"{server.dtype}, quantization {server.quantization}, overrides {server.json_model_override_args}"
    for adapter in sorted(adapters, key=lambda adapter: str(adapter.lora_name)):
        how += f", adapter {adapter.lora_name} {named_adapter_revision(adapter.lora_path)}"
    return f"{named_revision(server.model_path, server.revision)}, {how}"


def _pages(pool: _Pool, host_indices: torch.Tensor, count: int) -> list[list[Part]]:
    """The memory of each page, in the pieces that SGLang names. LayoutError if these are not `count` pages."""
    addresses, sizes = pool.host.get_page_buffer_meta(host_indices)
    if len(addresses) != count * pool.pieces:
        raise LayoutError(f"{len(host_indices)} host indices are {len(addresses)} pieces of pages; expected {count} pages of {pool.pieces}")
    pieces = [_memory(address, size) for address, size in zip(addresses, sizes, strict=True)]
    return [pieces[start : start + pool.pieces] for start in range(0, len(pieces), pool.pieces)]


def _memory(address: int, size: int) -> Part:
    memory: Part = np.frombuffer(_bytes_type(size).from_address(address), np.uint8)
    return memory


@lru_cache(maxsize=64)
def _bytes_type(size: int) -> Any:
    """`c_ubyte * size`, made once: ctypes never forgets a type."""
    return ctypes.c_ubyte * size


def _flat(pool: _Pool, page: torch.Tensor) -> list[Part]:
    """The memory of a page given as a flat tensor, in the order of the pieces."""
    if not page.is_contiguous():
        raise LayoutError("a page is not contiguous; expected a flat tensor")
    data: Part = page.detach().reshape(-1).view(torch.uint8).numpy()
    if not pool.flat_layers:
        return [data]
    size, rest = divmod(data.nbytes, pool.pieces)
    if rest:
        raise LayoutError(f"a page of {data.nbytes} bytes; expected {pool.pieces} equal pieces")
    planes = math.ceil(pool.pieces / pool.flat_layers)
    parts = data.reshape(planes, pool.flat_layers, size)
    return [parts[plane, layer] for layer in range(pool.flat_layers) for plane in range(planes)]
