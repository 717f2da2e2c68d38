"""Two caches of one process on two GPUs: a lease of one is forked onto the other, directly where they reach each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kvtier.cache import TieredKVCache
from kvtier.errors import DeviceError, LayoutError, LeaseError
from tests.cache.rig import LAYOUT, PAGE, grow, hold, kv_of, make_cache, put, run
from tests.cuda.rig import Engine, gpu_cache, gpu_of


@pytest.fixture
def both(monkeypatch) -> Iterator[tuple[TieredKVCache, TieredKVCache]]:
    with gpu_cache(monkeypatch) as here, gpu_cache(monkeypatch, attention__digest_bytes=1 << 16) as there:
        yield here, there


def read(cache: TieredKVCache, lease: Any) -> None:
    engine = Engine(cache)
    engine.assert_found(engine.read(lease), lease.ids[: lease.tokens].tolist())


@pytest.mark.parametrize("reached", [True, False])
def test_a_fork_onto_another_gpu_has_the_same_tokens_and_grows_on_its_own(both, reached):
    here, there = both
    if reached:
        gpu_of(here).friends.append(gpu_of(there))
    lease = here.begin()
    tokens = run(1, 4)[:-1]
    assert grow(here, lease, tokens) == len(tokens)
    before = gpu_of(here).launches
    twin = here.fork(lease, onto=there)
    assert (gpu_of(here).launches > before) == reached, "one copy from pool to pool, or through host memory"
    assert twin.tokens == len(tokens)
    read_partly(there, twin, tokens)
    assert grow(there, twin, run(1, 4)[-1:]) == 1
    lease.release()
    read(there, twin)
    twin.release()
    assert there.lookup(run(1, 4)).tokens == 4 * PAGE, "its pages are cached there like any others"
    assert here.lookup(run(1, 4)).tokens == 3 * PAGE
    for cache in both:
        cache.check_integrity()


def read_partly(cache: TieredKVCache, lease: Any, tokens: list[int]) -> None:
    """As `read`, for a lease whose last page is open."""
    engine = Engine(cache)
    found = engine.finish(engine.read(lease))[:, :, : len(tokens)]
    assert torch.equal(found, kv_of(tokens))


def test_pages_that_the_other_cache_has_on_its_device_are_shared_and_the_others_come(both):
    here, there = both
    gpu_of(here).friends.append(gpu_of(there))
    put(here, run(1, 4))
    put(there, run(1, 2))
    with hold(here, run(1, 4)) as lease:
        before = gpu_of(here).copies
        with here.fork(lease, onto=there) as twin:
            assert gpu_of(here).copies - before <= 2
            read(there, twin)
        assert there.stats()["tiers"]["device"]["pages"] == 4


def test_a_fork_waits_on_the_gpu_for_what_engines_have_yet_to_write_and_read(both):
    here, there = both
    gpu_of(here).friends.append(gpu_of(there))
    put(there, run(9, 8))
    there.flush()
    late = Engine(there)
    with hold(there, run(9, 8)) as lease:
        number = late.read(lease)
    gpu_of(here).engine = stream = gpu_of(here).new_stream()
    put(here, run(1, 4))
    assert stream.pending, "what is forked is not even written"
    with hold(here, run(1, 4)) as lease, here.fork(lease, onto=there) as twin:
        read(there, twin)
        late.assert_found(number, run(9, 8))


def test_a_fork_onto_a_device_without_room_covers_what_fits(monkeypatch):
    with gpu_cache(monkeypatch) as here, gpu_cache(monkeypatch, device_pages=4) as there:
        put(here, run(1, 4))
        put(there, run(2, 2))
        with hold(there, run(2, 2)), hold(here, run(1, 4)) as lease, here.fork(lease, onto=there) as twin:
            assert (twin.tokens, twin.full) == (2 * PAGE, True)
            read(there, twin)
        there.check_integrity()


def test_a_copy_that_fails_leaves_nothing_of_the_fork(both, monkeypatch):
    here, there = both
    gpu_of(here).friends.append(gpu_of(there))
    put(here, run(1, 4))
    put(there, run(1, 1))
    gpu_of(here).fail_in_stream = DeviceError("a cosmic ray")
    with hold(here, run(1, 4)) as lease:
        with pytest.raises(DeviceError, match="a cosmic ray"):
            here.fork(lease, onto=there)
        there.check_integrity()
        assert there.stats()["leased_pages"] == 0
        assert there.stats()["tiers"]["device"]["bytes_used"] == LAYOUT.page_bytes
        assert there.lookup(run(1, 4)).tokens == PAGE
        with here.fork(lease, onto=there) as twin:
            read(there, twin)


def test_forks_go_between_cpu_and_gpu_too_and_only_between_caches_of_one_model(monkeypatch, both):
    here, _ = both
    with make_cache() as on_cpu:
        put(here, run(1, 3))
        with hold(here, run(1, 3)) as lease, here.fork(lease, onto=on_cpu) as twin:
            assert twin.tokens == 3 * PAGE
            with on_cpu.fork(twin, onto=here) as back, pytest.raises(LeaseError, match="belongs to another cache"):
                on_cpu.fork(back)
    wrong = pytest.raises(LayoutError, match="another model, revision or layout")
    with make_cache(model__name="another") as other, hold(here, run(1, 3)) as lease, wrong:
        here.fork(lease, onto=other)
