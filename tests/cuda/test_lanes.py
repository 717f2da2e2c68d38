"""A restore to a GPU while it is under way: bytes cross the link while they are verified, and of one that is wrong nobody is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvtier.cache import TieredKVCache
from kvtier.mover import lane
from kvtier.mover.lane import LaneFormat
from tests.cache.rig import DEEP, LAYOUT, PAGE, hold, kv_of, push_out, put, run
from tests.cuda.rig import HOST, Engine, gpu_cache, through_the_lane


def note(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, seen: Callable[..., None]) -> None:
    """From now on, `seen` gets the arguments of each call of this method first."""
    method = getattr(where, name)

    def noting(*arguments: Any) -> Any:
        seen(*arguments)
        return method(*arguments)

    monkeypatch.setattr(where, name, noting)


def form_of(cache: TieredKVCache) -> LaneFormat:
    """What the host's format is to a lane."""
    return cache._residency.mover.staging.lane_formats["host"]


@pytest.mark.parametrize("host_format", ["raw", "q8"])
@pytest.mark.parametrize("damaged", [None, 0, 2, 3])
def test_bytes_are_under_way_while_they_are_verified_but_of_one_that_is_wrong_nobody_is_told(monkeypatch, host_format, damaged):
    """A step of layers is a piece of its own. With one page damaged, those before it come, bit for bit what the CPU decodes."""
    monkeypatch.setattr(lane, "STEP_BYTES", 1)
    with gpu_cache(monkeypatch, layout=DEEP, mover__workers=1, host__format=host_format) as cache:
        put(cache, run(1, 4))
        push_out(cache)
        cache.flush()
        residency = cache._residency
        host: Any = residency.tiers[HOST]
        rows = [residency.table.row(key) for key in cache.lookup(run(1, 4)).keys]
        slots = [int(residency.table.slot[HOST, row]) for row in rows]
        wanted = host.format.decode([room.copy() for room in host.rooms(slots)], DEEP)
        if damaged is not None:
            host._bytes[slots[damaged], 5] ^= 1
        stream: Any = residency.mover.staging._lanes[0].stream
        happened: list[str] = []
        for where, name, what in ((host, "_read", "verify"), (stream, "copy", "copy"), (stream, "run", "decode")):
            note(monkeypatch, where, name, lambda *_, what=what: happened.append(what))
        with cache.acquire(cache.lookup(run(1, 4))) as lease:
            engine, good = Engine(cache), 4 if damaged is None else damaged
            number = engine.read(lease)
            assert lease.tokens == good * PAGE
            lease.wait(20)
            found = engine.finish(number)
            assert torch.equal(found, wanted[:good].permute(1, 2, 0, 3, 4, 5).reshape(found.shape))
        layers = DEEP.layers
        decodes = ["decode"] * layers if host_format == "q8" else []
        assert happened == ["copy"] * layers + ["verify"] * 4 + decodes
        if damaged is not None:
            assert cache.stats()["tiers"]["host"]["refused"] == {"checksum": 1}
            assert cache.lookup(run(1, 4)).tokens == damaged * PAGE
            put(cache, run(1, 4))  # the missing page is computed again; those behind it are the ones that were restored
            with hold(cache, run(1, 4)) as lease:
                found = engine.finish(engine.read(lease))
                wanted[damaged] = kv_of(run(1, 4), layout=DEEP).view(*DEEP.shape[:2], 4, *DEEP.shape[2:])[:, :, damaged]
                assert torch.equal(found, wanted.permute(1, 2, 0, 3, 4, 5).reshape(found.shape))
        cache.check_integrity()


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("host_format", ["raw", "q8"])
def test_of_a_restore_without_a_single_good_page_nothing_comes(monkeypatch, host_format, ahead):
    with gpu_cache(monkeypatch, mover__workers=1, host__format=host_format) as cache:
        put(cache, run(1, 4))
        push_out(cache)
        cache.flush()
        host: Any = cache._residency.tiers[HOST]
        host._bytes[:, 5] ^= 1
        if not ahead:
            through_the_lane(monkeypatch, cache)
        with cache.acquire(cache.lookup(run(1, 4))) as lease:
            lease.layer(LAYOUT.layers - 1, timeout=20)
            assert lease.tokens == 0
        cache.check_integrity()


@pytest.mark.parametrize(("lanes", "rooms", "ahead"), [(1, 3, 3), (8, 99, 3), (26, 99, 1), (99, 99, 1)])
def test_what_did_not_fit_the_lanes_room_or_its_share_of_the_link_is_copied_when_all_is_verified(monkeypatch, lanes, rooms, ahead):
    """A transfer of 13 layers: while one worker verifies it, two workers' worth of bytes cross the link, of all lanes together."""
    monkeypatch.setattr(lane, "STEP_BYTES", 1)
    with gpu_cache(monkeypatch, layout=DEEP, mover__workers=1, host__format="q8") as cache:
        put(cache, run(1, 4))
        push_out(cache)
        cache.flush()
        residency = cache._residency
        host: Any = residency.tiers[HOST]
        one = residency.mover.staging._lanes[0]
        rows = [residency.table.row(key) for key in cache.lookup(run(1, 4)).keys]
        slots = [int(residency.table.slot[HOST, row]) for row in rows]
        wanted = host.format.decode([room.copy() for room in host.rooms(slots)], DEEP)
        host._bytes[slots[3], 5] ^= 1
        monkeypatch.setattr(one, "_lanes", lanes)
        monkeypatch.setattr(one, "_room_bytes", min(one._room_bytes, rooms * 4 * form_of(cache).widest_bytes + 1))
        happened: list[str] = []
        note(monkeypatch, host, "_read", lambda *_: happened.append("verify"))
        note(monkeypatch, one.stream, "copy", lambda to, *_: happened.append(f"copy {len(to)}"))
        with cache.acquire(cache.lookup(run(1, 4))) as lease:
            engine = Engine(cache)
            found = engine.finish(engine.read(lease))
            assert torch.equal(found, wanted[:3].permute(1, 2, 0, 3, 4, 5).reshape(found.shape))
        assert happened == ["copy 4"] * ahead + ["verify"] * 4 + ["copy 3"] * (DEEP.layers - ahead)


@pytest.mark.parametrize("way", ["q8", "raw", "disk"])
def test_bytes_under_way_fit_the_lanes_and_layers_of_many_pages_come_first(monkeypatch, tmp_path, way):
    """A restore of more pages than a lane holds whole goes by layers: the first one of all pages before the second of any."""
    monkeypatch.setattr(lane, "STEP_BYTES", 1)
    options: dict[str, Any] = {"host_pages": None, "disk_pages": 96} if way == "disk" else {"host_pages": 96, "host__format": way}
    staging_bytes, disk = 12 * DEEP.page_bytes, tmp_path if way == "disk" else None
    with gpu_cache(monkeypatch, disk, DEEP, device_pages=40, mover__staging_bytes=staging_bytes, mover__workers=1, **options) as cache:
        put(cache, run(1, 40))
        cache.flush()
        staging = cache._residency.mover.staging
        one, asked = staging._lanes[0], []
        copy = one.stream.copy

        def noting(to, of, size):
            asked.append((len(to), size))
            copy(to, of, size)

        put(cache, run(2, 40))
        cache.flush()
        monkeypatch.setattr(one.stream, "copy", noting)
        with hold(cache, run(1, 40)) as lease:
            engine, form = Engine(cache), staging.lane_formats["disk" if way == "disk" else "host"]
            found = engine.finish(engine.read(lease))
            assert torch.equal(found, kv_of(run(1, 40), layout=DEEP)) or way == "q8"
            assert float((found - kv_of(run(1, 40), layout=DEEP)).norm() / found.norm()) < 0.02
        if way == "disk":
            assert max(pages for pages, _ in asked) <= staging.pages_per_round < 40
            return
        assert {pages for pages, _ in asked} == {40}
        assert sum(size for _, size in asked) == form.payload_bytes
        if way == "q8":
            assert all(pages * size <= one._room_bytes < pages * form.payload_bytes for pages, size in asked)
            assert len(asked) >= DEEP.layers // 2
