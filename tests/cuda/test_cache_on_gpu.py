"""A whole cache on a GPU that does nothing before it must: every missing wait would show as wrong bytes here."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
import torch

from kvtier.attention import on_device
from kvtier.cache import TieredKVCache
from kvtier.cuda.kernels import triton_version
from kvtier.errors import DeviceError
from kvtier.testing.accelerator import LateAccelerator, LateStream
from tests.cache.rig import DEEP, LAYOUT, PAGE, grow, hold, kv_of, make_cache, push_out, put, run, tiers_of
from tests.cuda.rig import HOST, Engine, gpu_cache, gpu_of, layer_by_layer

INTERPRETED = pytest.mark.skipif(triton_version() is None or torch.cuda.is_available(), reason="needs Triton's interpreter")


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
    with layer_by_layer(monkeypatch) as (cache, stream):
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
