"""A whole cache on a GPU that does nothing before it must: every missing wait would show as wrong bytes here."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kvtier.attention import on_device
from kvtier.cache import TieredKVCache
from kvtier.cuda.kernels import triton_version
from kvtier.errors import DeviceError, TransferFailed
from kvtier.mover import lane
from kvtier.mover.lane import LaneFormat
from kvtier.testing.accelerator import LateAccelerator, LateSpan, LateStream
from tests.cache.rig import DEEP, LAYOUT, PAGE, grow, hold, kv_of, make_cache, push_out, put, run, tiers_of
from tests.cuda.rig import Engine, gpu_cache, gpu_of

HOST = 1
INTERPRETED = pytest.mark.skipif(triton_version() is None or torch.cuda.is_available(), reason="needs Triton's interpreter")


def note(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, seen: Callable[..., None]) -> None:
    """From now on, `seen` gets the arguments of each call of this method first."""
    method = getattr(where, name)

    def noting(*arguments: Any) -> Any:
        seen(*arguments)
        return method(*arguments)

    monkeypatch.setattr(where, name, noting)


def through_the_lane(monkeypatch: pytest.MonkeyPatch, cache: TieredKVCache) -> None:
    """From now on, the GPU reads nothing where the host tier has it: layers are copied one by one, once all pages are verified."""
    monkeypatch.setattr(cache._residency.tiers[HOST], "direct", lambda slots: np.zeros(len(slots), np.int64))


@pytest.mark.parametrize("host_format", ["raw", "q8"])
def test_pages_go_down_and_come_back_without_the_engine_ever_waiting(monkeypatch, host_format):
    with gpu_cache(monkeypatch, host__format=host_format) as cache:
        assert put(cache, run(1, 4)) == 4 * PAGE
        push_out(cache)
        assert tiers_of(cache, run(1, 4)) == [{HOST}] * 4
        engine = Engine(cache)
        lease = cache.acquire(cache.lookup(run(1, 4)))
        number = engine.read(lease)
        assert lease.tokens == 4 * PAGE
        if host_format == "raw":
            engine.assert_found(number, run(1, 4))
        else:
            difference = engine.finish(number) - kv_of(run(1, 4))
            assert 0 < float(difference.norm() / kv_of(run(1, 4)).norm()) < 0.02
        lease.release()
        cache.check_integrity()


def test_what_was_put_is_read_by_another_stream_only_after_it_was_written(monkeypatch):
    with gpu_cache(monkeypatch) as cache:
        gpu = gpu_of(cache)
        writer, reader = gpu.new_stream(), gpu.new_stream()
        gpu.engine = writer
        put(cache, run(1, 3))
        gpu.engine = reader
        engine = Engine(cache, reader)
        with hold(cache, run(1, 3)) as lease:
            engine.assert_found(engine.read(lease), run(1, 3))


def test_an_offload_waits_on_the_gpu_for_the_write_it_copies(monkeypatch):
    with gpu_cache(monkeypatch, host__write_policy="write_through") as cache:
        gpu = gpu_of(cache)
        gpu.engine = gpu.new_stream()
        put(cache, run(1, 3))
        assert gpu.engine.pending, "the write has not even begun"
        cache.settle(20)
        host: Any = cache._residency.tiers[HOST]
        rows = [cache._residency.table.row(key) for key in cache.lookup(run(1, 3)).keys]
        payloads = host.load([int(cache._residency.table.slot[HOST, row]) for row in rows], cache.lookup(run(1, 3)).keys, None)
        found = torch.stack([torch.from_numpy(payload.copy()).view(torch.float32).view(LAYOUT.shape) for payload in payloads])
        wanted = kv_of(run(1, 3)).view(LAYOUT.layers, 2, 3, PAGE, 1, 32).permute(2, 0, 1, 3, 4, 5)
        assert torch.equal(found, wanted)


def test_a_restore_does_not_overwrite_what_an_engine_has_yet_to_read(monkeypatch):
    """The engine lets go of pages that it will read later on its stream; their slots are filled again before it does."""
    with gpu_cache(monkeypatch, device_pages=4) as cache:
        put(cache, run(1, 4))
        push_out(cache)
        gpu = gpu_of(cache)
        gpu.engine = gpu.new_stream()
        engine = Engine(cache, gpu.engine)
        put(cache, run(2, 4))
        cache.flush()
        with hold(cache, run(2, 4)) as lease:
            late = engine.read(lease)
        assert gpu.engine.pending, "the engine has not read yet"
        gpu.engine = gpu.new_stream()
        other = Engine(cache, gpu.engine)
        with hold(cache, run(1, 4)) as lease:
            assert lease.tokens == 4 * PAGE
            other.assert_found(other.read(lease), run(1, 4))
        engine.assert_found(late, run(2, 4))


def test_a_write_does_not_overwrite_what_another_stream_has_yet_to_read(monkeypatch):
    with gpu_cache(monkeypatch, device_pages=4, host_pages=None) as cache:
        gpu = gpu_of(cache)
        gpu.engine = first = gpu.new_stream()
        put(cache, run(1, 4))
        engine = Engine(cache, first)
        with hold(cache, run(1, 4)) as lease:
            late = engine.read(lease)
        gpu.engine = second = gpu.new_stream()
        put(cache, run(2, 4))
        second.record().wait()
        engine.assert_found(late, run(1, 4))


def test_a_layer_is_read_while_the_next_is_not_even_launched(monkeypatch):
    monkeypatch.setattr(lane, "STEP_BYTES", 1)
    with gpu_cache(monkeypatch, layout=DEEP, mover__workers=1) as cache:
        put(cache, run(1, 2))
        push_out(cache)
        cache.flush()
        through_the_lane(monkeypatch, cache)
        stream = cache._residency.mover.staging._lanes[0].stream
        go_on, record, records = threading.Event(), stream.record, itertools.count()

        def held_before_the_second_layer():
            assert next(records) == 0 or go_on.wait(20)
            return record()

        monkeypatch.setattr(stream, "record", held_before_the_second_layer)
        with cache.acquire(cache.lookup(run(1, 2))) as lease:
            engine = gpu_of(cache).engine_stream()
            pool, slots = lease.layer(0, timeout=20), torch.as_tensor(lease.slots())
            found = engine.result(lambda: pool[slots].clone())
            assert torch.equal(found[:, 0].flatten(0, 1), kv_of(run(1, 2), layout=DEEP)[0, 0])
            with pytest.raises(TimeoutError):
                lease.layer(1, timeout=0.05)
            go_on.set()
            reader = Engine(cache)
            reader.assert_found(reader.read(lease), run(1, 2), DEEP)


@pytest.mark.parametrize("when", ["fail_at_launch", "fail_in_stream"])
@pytest.mark.parametrize("way", ["down", "up"])
def test_a_copy_that_fails_takes_its_own_transfer_along_and_no_other(monkeypatch, when, way):
    with gpu_cache(monkeypatch, mover__workers=1, mover__staging_bytes=5 * LAYOUT.page_bytes) as cache:
        gpu = gpu_of(cache)
        assert cache._residency.mover.staging.pages_per_round == 2
        put(cache, run(1, 2))
        put(cache, run(2, 2))
        if way == "up":
            push_out(cache)
            cache.flush()
        setattr(gpu, when, DeviceError("a cosmic ray"))
        if way == "down":
            push_out(cache)
            refused = cache.stats()["tiers"]["host"]["refused"]
            assert cache.stats()["links"]["device->host"]["pages"] == 2, "the other transfer went well"
        else:
            with hold(cache, run(1, 2)) as lease:
                assert lease.tokens == 0
            refused = cache.stats()["tiers"]["device"]["refused"]
        assert refused == {"gpu": 2}
        for number in (1, 2):
            engine = Engine(cache)
            with hold(cache, run(number, 2)) as lease:
                engine.assert_found(engine.read(lease), run(number, 2)[: lease.tokens])
                assert way == "down" or lease.tokens == 2 * PAGE, "the copies on the host are as good as before"
        cache.check_integrity()


def test_a_restore_that_breaks_half_way_breaks_the_lease_and_frees_its_slots_only_when_its_copies_are_over(monkeypatch):
    monkeypatch.setattr(lane, "STEP_BYTES", 1)
    with gpu_cache(monkeypatch, layout=DEEP, mover__workers=1) as cache:
        put(cache, run(1, 2))
        push_out(cache)
        cache.flush()
        through_the_lane(monkeypatch, cache)
        pool: Any = cache._residency.device
        stream: Any = cache._residency.mover.staging._lanes[0].stream
        copy, free, asked, steps = stream.copy, pool.free, threading.Event(), itertools.count()
        pending: list[int] = []

        def breaks_at_the_second_layer(*copies):
            if next(steps) == 1:
                assert asked.wait(20)
                raise DeviceError("a cosmic ray")
            copy(*copies)

        def noting(slots):
            pending.append(stream.pending)
            free(slots)

        monkeypatch.setattr(stream, "copy", breaks_at_the_second_layer)
        monkeypatch.setattr(pool, "free", noting)
        with cache.acquire(cache.lookup(run(1, 2))) as lease:
            lease.layer(0, timeout=20)
            assert lease.tokens == 2 * PAGE
            asked.set()
            with pytest.raises(TransferFailed):
                lease.layer(1, timeout=20)
            cache.settle(20)
        assert set(pending) == {0}
        monkeypatch.setattr(stream, "copy", copy)
        with hold(cache, run(1, 2)) as lease:
            engine = Engine(cache)
            engine.assert_found(engine.read(lease), run(1, 2), DEEP)


def test_what_a_broken_restore_promised_to_a_second_lease_is_broken_too_and_not_brought_to_another_place(monkeypatch):
    """The second lease, which only went along, was told slots and read a layer; it must not be given the pages elsewhere without a word."""
    monkeypatch.setattr(lane, "STEP_BYTES", 1)
    with gpu_cache(monkeypatch, layout=DEEP, mover__workers=1) as cache:
        put(cache, run(1, 2))
        push_out(cache)
        cache.flush()
        through_the_lane(monkeypatch, cache)
        stream: Any = cache._residency.mover.staging._lanes[0].stream
        copy, asked, steps = stream.copy, threading.Event(), itertools.count()

        def breaks_at_the_second_layer(*copies):
            if next(steps) == 1:
                assert asked.wait(20)
                raise DeviceError("a cosmic ray")
            copy(*copies)

        monkeypatch.setattr(stream, "copy", breaks_at_the_second_layer)
        first = cache.acquire(cache.lookup(run(1, 2)))
        first.layer(0, timeout=20)
        with cache.acquire(cache.lookup(run(1, 2))) as second:
            second.layer(0, timeout=20)
            assert second.tokens == 2 * PAGE
            asked.set()
            first.restored.result(20)
            first.release()
            second.restored.result(20)
            with pytest.raises(TransferFailed):
                second.layer(1, timeout=20)
        with hold(cache, run(1, 2)) as lease:
            engine = Engine(cache)
            engine.assert_found(engine.read(lease), run(1, 2)[: lease.tokens], DEEP)
        cache.check_integrity()


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
        wanted = host.format.decode([host.payload_at(slot).copy() for slot in slots], DEEP)
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


def test_a_cache_whose_gpu_does_nothing_any_more_closes_the_rest_all_the_same(monkeypatch, tmp_path, caplog):
    """As after an error that CUDA calls sticky: every call says so, also those that give something back."""
    cache = gpu_cache(monkeypatch, tmp_path)
    put(cache, run(1, 4))
    cache.flush()

    def fail(*_: object) -> None:
        raise DeviceError("an illegal memory access was encountered")

    monkeypatch.setattr(LateAccelerator, "unregister", fail)
    monkeypatch.setattr(LateSpan, "close", fail)
    cache.close()
    assert "host memory stays registered: an illegal memory access" in caplog.text
    monkeypatch.undo()
    with gpu_cache(monkeypatch, tmp_path) as again:
        assert again.lookup(run(1, 4)).tokens == 4 * PAGE
        disk: Any = again._residency.tiers[-1]
        assert disk._was_clean


def test_of_a_gpu_that_answers_nothing_any_more_all_that_is_known_is_told_and_why_there_is_no_more(monkeypatch):
    with gpu_cache(monkeypatch) as cache:
        put(cache, run(1, 4))
        push_out(cache)
        cache.flush()
        before = cache.stats()
        assert before["tiers"]["device"]["achieved"]["gpu_failed"] == ""
        gpu_of(cache).broken = "an illegal memory access was encountered"
        after = cache.stats()
        achieved = after["tiers"]["device"].pop("achieved")
        assert achieved["gpu_failed"] == "an illegal memory access was encountered"
        assert (achieved["gpu"], achieved["slots"]) == ("a stand-in", before["tiers"]["device"].pop("achieved")["slots"])
        assert (after["tiers"]["device"], after["pages"]) == (before["tiers"]["device"], before["pages"])
        gpu_of(cache).broken = ""


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
        wanted = host.format.decode([host.payload_at(slot).copy() for slot in slots], DEEP)
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


def form_of(cache: TieredKVCache) -> LaneFormat:
    """What the host's format is to a lane."""
    return cache._residency.mover.staging.lane_formats["host"]


@pytest.mark.parametrize("host_format", ["raw", "q8"])
def test_copies_go_by_the_kernel_where_it_was_measured_to_be_faster_and_bring_the_same(monkeypatch, host_format):
    """On a machine where the kernel always wins, and on one where it never does."""
    for kernel_s, used in ((1e-9, True), (1.0, False)):
        gpu = {"why_no_kernels": "", "kernel_s": lambda copies, size_bytes, each=kernel_s: each}
        with gpu_cache(monkeypatch, host__format=host_format, gpu=gpu) as cache:
            said = cache.stats()["mover"]["copies"]
            assert (said["kernel_below_bytes"]["d2h"]["8"] > 0) == used
            before = gpu_of(cache).kernels
            put(cache, run(1, 4))
            push_out(cache)
            cache.flush()
            with hold(cache, run(1, 4)) as lease:
                engine = Engine(cache)
                found = engine.finish(engine.read(lease))
            assert float((found - kv_of(run(1, 4))).norm() / found.norm()) < (0.02 if host_format == "q8" else 1e-9)
            assert (gpu_of(cache).kernels > before) == used


def test_a_kernel_that_fails_when_it_is_measured_leaves_the_copies_to_the_copy_engines(monkeypatch):
    def fail(*_: object, to_host: bool) -> None:
        raise DeviceError("no room for its registers")

    monkeypatch.setattr(LateStream, "copy_by_kernel", fail)
    with gpu_cache(monkeypatch, gpu={"why_no_kernels": ""}) as cache:
        said = cache.stats()["mover"]["copies"]
        assert said == {
            "kernel_below_bytes": None,
            "why_copies_only": "copies by a kernel were tried and failed: no room for its registers",
        }
        put(cache, run(1, 4))
        push_out(cache)
        with hold(cache, run(1, 4)) as lease:
            engine = Engine(cache)
            engine.assert_found(engine.read(lease), run(1, 4))


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


@pytest.mark.parametrize("refuse_after", [None, 0, 1 << 15])
def test_host_memory_that_is_not_registered_is_copied_through_memory_that_is(monkeypatch, refuse_after):
    pages = 32
    with gpu_cache(monkeypatch, host_pages=pages, host__mlock="off") as cache:
        host: Any = cache._residency.tiers[HOST]
        if refuse_after is not None:
            monkeypatch.setattr(host._registration, "registered_bytes", refuse_after)
        direct = host.direct(range(pages))
        expected = pages if refuse_after is None else refuse_after // LAYOUT.page_bytes
        assert (direct != 0).sum() == expected
        for number in (1, 2, 3):
            put(cache, run(number, 8))
        engine = Engine(cache)
        for number in (1, 2, 3):
            with hold(cache, run(number, 8)) as lease:
                engine.assert_found(engine.read(lease), run(number, 8))


def test_a_disk_behind_a_gpu_works_with_its_byte_stage(monkeypatch, tmp_path):
    for compress in ("always", "auto"):
        with gpu_cache(monkeypatch, tmp_path / compress, host_pages=None, disk__compress=compress) as cache:
            for number in (1, 2, 3):
                put(cache, run(number, 8))
            engine = Engine(cache)
            for number in (1, 2, 3):
                with hold(cache, run(number, 8)) as lease:
                    assert lease.tokens == 8 * PAGE
                    engine.assert_found(engine.read(lease), run(number, 8))


def test_closing_gives_back_all_memory_and_every_registration(monkeypatch):
    cache = gpu_cache(monkeypatch)
    gpu = gpu_of(cache)
    put(cache, run(1, 8))
    assert gpu.registered
    cache.close()
    assert gpu.registered == {}


def test_token_by_token_forks_and_truncation_keep_their_order_on_the_stream(monkeypatch):
    with gpu_cache(monkeypatch) as cache:
        gpu_of(cache).engine = gpu_of(cache).new_stream()
        lease = cache.begin()
        tokens = run(1, 3)[:-2]
        for index in range(len(tokens)):
            assert grow(cache, lease, tokens[index : index + 1]) == 1
        twin = cache.fork(lease)
        assert grow(cache, twin, [7]) == 1
        cache.truncate(lease, 5)
        assert grow(cache, lease, [8, 9]) == 2
        engine = Engine(cache)
        numbers = engine.read(twin), engine.read(lease)
        for number, wanted in zip(numbers, ([*tokens, 7], [*tokens[:5], 8, 9]), strict=True):
            assert torch.equal(engine.finish(number)[:, :, : len(wanted)], kv_of(wanted))


@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=INTERPRETED)])
def test_queries_on_one_stream_see_the_keys_that_were_written_on_another(monkeypatch, kernels):
    queries = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))

    def told(cache: TieredKVCache) -> list[float]:
        with cache:
            lease = cache.begin()
            assert grow(cache, lease, run(1, 2)[: PAGE + 3]) == PAGE + 3
            gpu = cache._residency.device.accelerator
            if isinstance(gpu, LateAccelerator):
                gpu.engine = gpu.new_stream()
            cache.record_queries(lease, 1, queries)
            assert lease.attention is not None
            found: list[float] = lease.attention.tolist()
            lease.release()
            return found

    expected = told(make_cache(attention__digest_bytes=1 << 16))
    if kernels:
        monkeypatch.setattr(on_device, "why_missing", lambda device: "")
    assert told(gpu_cache(monkeypatch, attention__digest_bytes=1 << 16)) == (pytest.approx(expected, abs=1e-3) if kernels else expected)
