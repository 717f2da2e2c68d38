"""Tiny caches whose right content can be computed from the tokens alone, and ways to slow down and damage their tiers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvtier.cache import TieredKVCache
from kvtier.config import Config, load_config
from kvtier.formats import get_format
from kvtier.keys import page_keys, root_key
from kvtier.layout import PageLayout
from kvtier.leases.lease import Lease
from kvtier.pages import READY
from kvtier.tiers.disk import record

PAGE = 4
LAYOUT = PageLayout(layers=2, planes=2, page_tokens=PAGE, kv_heads=1, head_dim=32, dtype="fp32")
"""2048 bytes a page."""
DEEP = PageLayout(layers=13, planes=2, page_tokens=PAGE, kv_heads=1, head_dim=32, dtype="fp32")
"""Deep enough that a restore places its layers in three steps."""
DEVICE, HOST, DISK = 0, 1, 2


def make_config(
    disk: Path | None = None,
    device_pages: int = 8,
    host_pages: int | None = 16,
    disk_pages: int = 64,
    layout: PageLayout = LAYOUT,
    **more: object,
) -> Config:
    """Room for that many pages; without loss unless `more` ("host__format") says otherwise; no cleaning ahead, no threshold pass."""
    settings: dict[str, object] = {
        "device.capacity_bytes": device_pages * layout.page_bytes,
        "device.place": "cpu",
        "mover.clean_pressure": 1.0,
        "mover.staging_bytes": "1MiB",
        "mover.prefetch_budget_bytes": "64MiB",
        "policy.cleanup_interval": 1e9,
    }
    more = {key.replace("__", "."): value for key, value in more.items()}
    if host_pages is None:
        settings["host"] = None
    else:
        settings["host.format"] = more.get("host.format", "raw")
        size = get_format(str(settings["host.format"])).payload_bytes(layout)
        settings["host.capacity_bytes"] = host_pages * (-(-size // 64) * 64)
    if disk is not None:
        settings["disk.path"] = str(disk)
        settings["disk.format"] = more.get("disk.format", "raw+lz4")
        settings["disk.capacity_bytes"] = disk_pages * record.record_bytes(get_format(str(settings["disk.format"])).payload_bytes(layout))
    return load_config(None, env={}, overrides={**settings, **more})


def make_cache(disk: Path | None = None, layout: PageLayout = LAYOUT, **more: Any) -> TieredKVCache:
    """A cache by `make_config`, on a clock if `clock` is given."""
    clock = {"clock": more.pop("clock")} if "clock" in more else {}
    return TieredKVCache(make_config(disk, layout=layout, **more), layout, **clock)


def kv_of(tokens: Sequence[int], salt: str = "", layout: PageLayout = LAYOUT) -> torch.Tensor:
    """The KV of a sequence, `[layers, planes, tokens, kv_heads, head_dim]`: what stands at a token depends on every token before it."""
    state, seeds = b"kv of " + salt.encode(), []
    for token in tokens:
        state = blake2b(state + int(token).to_bytes(8, "little", signed=True), digest_size=8).digest()
        seeds.append(int.from_bytes(state, "little"))
    width = layout.layers * layout.planes * layout.kv_heads * layout.head_dim
    steps = np.arange(1, width + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = np.array(seeds, np.uint64)[:, None] + steps
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    numbers = ((mixed >> np.uint64(41)).astype(np.uint32) | np.uint32(0x3F800000)).view(np.float32)
    shaped = torch.from_numpy(numbers).reshape(len(seeds), layout.layers, layout.planes, layout.kv_heads, layout.head_dim)
    return shaped.permute(1, 2, 0, 3, 4).contiguous().to(layout.torch_dtype)


def content(lease: Lease, layout: PageLayout = LAYOUT) -> torch.Tensor:
    """What an engine reads through the lease, `[layers, planes, lease.tokens, kv_heads, head_dim]`, asked for layer by layer."""
    layers = []
    for index in range(layout.layers):
        pages = lease.layer(index)[torch.as_tensor(lease.slots())]
        layers.append(pages.permute(1, 0, 2, 3, 4).reshape(layout.planes, -1, layout.kv_heads, layout.head_dim))
    return torch.stack(layers)[:, :, : lease.tokens]


def assert_right(lease: Lease, tokens: Sequence[int], salt: str = "", layout: PageLayout = LAYOUT) -> None:
    """The lease holds, bit for bit, the KV of the first `lease.tokens` of `tokens`."""
    assert lease.tokens <= len(tokens)
    assert list(lease.ids[: lease.tokens]) == list(tokens[: lease.tokens])
    found = content(lease, layout)
    wanted = kv_of(tokens[: lease.tokens], salt, layout)
    same = (found == wanted).all(dim=0).all(dim=0).all(dim=-1).all(dim=-1)
    assert bool(same.all()), f"wrong KV at tokens {torch.nonzero(~same).flatten().tolist()} of {lease.tokens}"


def put(cache: TieredKVCache, tokens: Sequence[int], salt: str = "") -> int:
    """Put a sequence with its right KV."""
    return cache.put(tokens, kv_of(tokens, salt, cache.layout), salt=salt)


def hold(cache: TieredKVCache, tokens: Sequence[int], salt: str = "") -> Lease:
    """Look up, acquire and wait."""
    lease = cache.acquire(cache.lookup(tokens, salt))
    lease.wait(20)
    return lease


def grow(cache: TieredKVCache, lease: Lease, tokens: Sequence[int], salt: str = "") -> int:
    """Append `tokens` to the lease with the KV that is right after its own tokens."""
    known = list(lease.ids[: lease.tokens])
    return cache.append(lease, tokens, kv_of([*known, *tokens], salt, cache.layout)[:, :, len(known) :])


def run(start: int, pages: int) -> list[int]:
    """Tokens of a sequence of whole pages that begins with token `start`, so shares nothing with others."""
    return [start * 1000 + index for index in range(pages * PAGE)]


def tiers_of(cache: TieredKVCache, tokens: Sequence[int], salt: str = "") -> list[set[int]]:
    """For each full page of `tokens` the tiers with a visible copy."""
    keys = page_keys(tokens, PAGE, root_key(cache._namespace, salt))
    table = cache._residency.table
    rows = [table.row(key) for key in keys]
    return [set(np.flatnonzero(table.state[:, row] == READY).tolist()) if row >= 0 else set() for row in rows]


def push_out(cache: TieredKVCache, start: int = 900) -> None:
    """Fill the device with other pages, so that everything not held leaves it."""
    pages = cache._residency.device.capacity_slots - int((cache._residency.table.leases > 0).sum())
    put(cache, run(start, pages))
    cache.settle(20)


def flip_in_host(cache: TieredKVCache, row: int, byte: int = 0, mask: int = 1) -> None:
    """Damage the host copy of a row."""
    residency = cache._residency
    host: Any = residency.tiers[HOST]
    host._bytes[int(residency.table.slot[HOST, row])][byte] ^= mask


def flip_on_disk(cache: TieredKVCache, row: int, byte: int, mask: int = 1) -> None:
    """Damage the disk copy of a row (the last tier), `byte` counted from the start of its record."""
    residency = cache._residency
    disk: Any = residency.tiers[residency.last]
    segment, index = divmod(int(residency.table.slot[residency.last, row]), disk._segments.segment_slots)
    with open(disk._directory.segment_path(segment), "r+b") as file:
        file.seek(index * disk.slot_bytes + byte)
        old = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([old ^ mask]))


class Gate:
    """Holds every call of one method of a tier until it is opened, and counts the slots it was called for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tier: Any, method: str, open_: bool = False) -> None:
        self.slots: list[list[int]] = []
        self.reached = threading.Event()
        self._open = threading.Event()
        if open_:
            self._open.set()
        inner = getattr(tier, method)

        def gated(slots, *rest):
            self.slots.append(list(slots))
            self.reached.set()
            assert self._open.wait(30), "the test never opened this gate"
            return inner(slots, *rest)

        monkeypatch.setattr(tier, method, gated)

    def open(self) -> None:
        """Let everybody through from now on."""
        self._open.set()

    def shut(self) -> None:
        """Hold callers again."""
        self.reached.clear()
        self._open.clear()


def until(true: Callable[[], object]) -> None:
    """Wait for something that must come."""
    limit_s = time.monotonic() + 60
    while not true():
        assert time.monotonic() < limit_s
        time.sleep(0.001)


def kvtier_threads() -> list[str]:
    """Names of living threads that kvtier started."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kvtier")]


class Clock:
    """A clock that only moves when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def counters(cache):
    """`stats()` without what depends on the machine."""
    stats = cache.stats()
    for tier in stats["tiers"].values():
        tier.pop("achieved")
    return stats


def clean_up(cache):
    asyncio.run_coroutine_threadsafe(cache._residency.house.clean_up(), cache._residency.mover.loop).result(20)
    cache.settle(20)
