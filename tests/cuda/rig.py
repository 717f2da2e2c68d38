"""Caches whose device is a stand-in GPU that does everything as late as it may, and ways to read as an engine does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvtier.cache import TieredKVCache
from kvtier.layout import PageLayout
from kvtier.leases.lease import Lease
from kvtier.mover import lane
from kvtier.testing.accelerator import LateAccelerator, LateStream
from kvtier.tiers import gpu as gpu_module
from tests.cache.rig import DEEP, LAYOUT, kv_of, make_cache, push_out, put, run

HOST = 1
"""The tier below the GPU."""


def on_gpu(monkeypatch: pytest.MonkeyPatch, **more: Any) -> LateAccelerator:
    """From now on, caches of this test live on this GPU."""
    gpu = LateAccelerator(**{"total_bytes": 1 << 22, "step_bytes": 1 << 13, **more})
    monkeypatch.setattr(gpu_module, "find_accelerator", lambda place: gpu)
    return gpu


def gpu_cache(monkeypatch: pytest.MonkeyPatch, *args: Any, gpu: dict[str, Any] | None = None, **more: Any) -> TieredKVCache:
    """A cache by `make_config` on a GPU of its own."""
    on_gpu(monkeypatch, **(gpu or {}))
    return make_cache(*args, **more)


def direct_cache(monkeypatch: pytest.MonkeyPatch, path: Path, gpu: dict[str, Any] | None = None, **more: Any) -> TieredKVCache:
    """A cache of a GPU and a disk that reads straight into it; only one record fits each half of a worker's room, unless told otherwise."""
    options = {"host_pages": None, "disk__io_engine": "gds", "disk__format": "raw", "mover__workers": 1, **more}
    return gpu_cache(monkeypatch, path, gpu=gpu, **options)


def gpu_of(cache: TieredKVCache) -> LateAccelerator:
    """The GPU a cache is on."""
    found = cache._residency.device.accelerator
    assert isinstance(found, LateAccelerator)
    return found


def through_the_lane(monkeypatch: pytest.MonkeyPatch, cache: TieredKVCache) -> None:
    """From now on, the GPU reads nothing where the host tier has it: layers are copied one by one, once all pages are verified."""
    monkeypatch.setattr(cache._residency.tiers[HOST], "direct", lambda slots: np.zeros(len(slots), np.int64))


@contextmanager
def layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[TieredKVCache, Any]]:
    """A cache of pages of many layers with the two pages of `run(1, 2)` on the host, that come up one layer after the other, and the
    stream they come by."""
    monkeypatch.setattr(lane, "STEP_BYTES", 1)
    with gpu_cache(monkeypatch, layout=DEEP, mover__workers=1) as cache:
        put(cache, run(1, 2))
        push_out(cache)
        cache.flush()
        through_the_lane(monkeypatch, cache)
        yield cache, cache._residency.mover.staging._lanes[0].stream


def _note(layers: list[torch.Tensor], pool: torch.Tensor, slots: torch.Tensor) -> None:
    layers.append(pool[slots].clone())


class Engine:
    """Reads pages on a stream, later: what it finds is known once `finish` waited for that stream."""

    def __init__(self, cache: TieredKVCache, stream: LateStream | None = None) -> None:
        self.cache = cache
        self.gpu = gpu_of(cache)
        self.stream = stream or self.gpu.engine_stream()
        self._found: list[list[torch.Tensor]] = []

    def read(self, lease: Lease) -> int:
        """Launch a read of every layer, each as soon as `lease.layer` lets it; the number of this read."""
        layers: list[torch.Tensor] = []
        for index in range(self.cache.layout.layers):
            self.stream.run(partial(_note, layers, lease.layer(index), torch.as_tensor(lease.slots())))
        self._found.append(layers)
        return len(self._found) - 1

    def finish(self, number: int) -> torch.Tensor:
        """What a read found: `[layers, planes, tokens, kv_heads, head_dim]`."""
        self.stream.record().wait()
        layout = self.cache.layout
        pages = torch.stack(self._found[number])
        return pages.permute(0, 2, 1, 3, 4, 5).reshape(layout.layers, layout.planes, -1, layout.kv_heads, layout.head_dim)

    def assert_found(self, number: int, tokens: Sequence[int], layout: PageLayout = LAYOUT) -> None:
        """The read found, bit for bit, the KV of `tokens`."""
        found, wanted = self.finish(number), kv_of(tokens, layout=layout)
        assert found.shape == wanted.shape
        wrong = (found != wanted).flatten(3).any(-1).any(0).any(0)
        assert not bool(wrong.any()), f"wrong KV at tokens {torch.nonzero(wrong).flatten().tolist()}"
