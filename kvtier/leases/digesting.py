"""Digests of pages of the device tier; on a GPU on the calling thread's stream and straight from the pool. Stateless."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvtier.attention.digest import encode
from kvtier.attention.on_device import encode_paged
from kvtier.tiers.device import DevicePool
from kvtier.tiers.gpu import GpuPool


def pool_digests(pool: DevicePool, slots: Sequence[int]) -> torch.Tensor:
    """Digests of the pages in these slots, uint8 `[len(slots), layers, kv_heads, digest_bytes]`, where the pool is."""
    if isinstance(pool, GpuPool):
        return pool.read(lambda: encode_paged(pool.paged, slots))
    return encode(pool.keys(slots))
