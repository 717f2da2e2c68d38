"""A GPU that fails, at a copy, half way through a restore or for good: what it had promised breaks, everything else goes on."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest

from kvtier.errors import DeviceError, TransferFailed
from kvtier.testing.accelerator import LateAccelerator, LateSpan
from tests.cache.rig import DEEP, LAYOUT, PAGE, hold, push_out, put, run
from tests.cuda.rig import Engine, gpu_cache, gpu_of, layer_by_layer


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


def breaking_at_the_second_layer(copy: Callable[..., None], asked: threading.Event) -> Callable[..., None]:
    """`copy`, but for its second call, which fails once somebody has `asked`."""
    steps = itertools.count()

    def copies(*parts: object) -> None:
        if next(steps) == 1:
            assert asked.wait(20)
            raise DeviceError("a cosmic ray")
        copy(*parts)

    return copies


def test_a_restore_that_breaks_half_way_breaks_the_lease_and_frees_its_slots_only_when_its_copies_are_over(monkeypatch):
    with layer_by_layer(monkeypatch) as (cache, stream):
        pool: Any = cache._residency.device
        copy, free, asked = stream.copy, pool.free, threading.Event()
        pending: list[int] = []

        def noting(slots):
            pending.append(stream.pending)
            free(slots)

        monkeypatch.setattr(stream, "copy", breaking_at_the_second_layer(stream.copy, asked))
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
    with layer_by_layer(monkeypatch) as (cache, stream):
        asked = threading.Event()
        monkeypatch.setattr(stream, "copy", breaking_at_the_second_layer(stream.copy, asked))
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
