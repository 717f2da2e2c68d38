"""A budgeted lease on a GPU that does everything late: what its engine has yet to read is nobody else's."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from kvtier.cache import TieredKVCache
from kvtier.leases.budget import BudgetedLease
from kvtier.leases.parked import Parked
from tests.cache.rig import PAGE, kv_of, push_out, put, run
from tests.cuda.rig import gpu_cache, gpu_of

OTHERS = run(9, 3)


def open_lease(cache: TieredKVCache, device_pages: int, pages: int) -> BudgetedLease:
    """A lease on a sequence, beside pages of somebody else that are below the device, and a device with room for them."""
    put(cache, OTHERS)
    push_out(cache)
    cache.flush()
    cache.settle(20)
    lease = cache.acquire_within(cache.lookup([]), device_pages, choosing=False)
    lease.append(run(1, pages), kv_of(run(1, pages)))
    gpu_of(cache).engine_stream().record().wait()
    with cache._residency.lock:
        cache._residency.eviction.vacate(cache._residency.table.ready(0))
    return lease


def reading(cache: TieredKVCache, slots: list[int]) -> Callable[[], torch.Tensor]:
    """Launches the read of a layer of these slots on the engine's stream, which is in no hurry; what it found, once it is over."""
    pool, found, stream = cache._residency.device.layer(0), [], gpu_of(cache).engine_stream()
    stream.run(lambda: found.append(pool[torch.tensor(slots)].clone()))

    def finish() -> torch.Tensor:
        stream.record().wait()
        return found[0]

    return finish


def restore_others(cache: TieredKVCache) -> None:
    """Another request on another thread brings up what it wants, into whatever is free."""

    def work() -> int:
        with cache.acquire(cache.lookup(OTHERS)) as lease:
            lease.wait(20)
            return lease.tokens

    with ThreadPoolExecutor(1) as another:
        assert another.submit(work).result(20) > 0


def test_a_page_that_is_parked_is_overwritten_only_after_the_engine_read_it(monkeypatch):
    with gpu_cache(monkeypatch, device_pages=6, host_pages=64, mover__restore="always") as cache:
        lease = open_lease(cache, device_pages=6, pages=4)
        finish = reading(cache, lease._slots(range(4)))
        look = Parked._look

        def others_first(parked: Parked, *more) -> None:
            restore_others(cache)
            look(parked, *more)

        monkeypatch.setattr(Parked, "_look", others_first)
        lease._parked.park(3)  # as `append` does when the budget is full
        assert torch.equal(finish(), kv_of(run(1, 4))[0].unflatten(1, (-1, PAGE)).transpose(0, 1))
        lease.release()


def test_frames_that_are_let_go_are_overwritten_only_after_the_engine_read_them(monkeypatch):
    with gpu_cache(monkeypatch, device_pages=8, host_pages=64, mover__restore="always") as cache:
        lease = open_lease(cache, device_pages=7, pages=8)
        frames = lease._take_frames()
        parked = list(lease.parked)[: len(frames)]
        lease._parked.read_into(parked, 0, frames)
        wanted = kv_of(run(1, 8))[0].unflatten(1, (-1, PAGE)).transpose(0, 1)[parked]
        finish = reading(cache, frames)
        release = lease._lease.release

        def others_first() -> None:
            restore_others(cache)
            release()

        monkeypatch.setattr(lease._lease, "release", others_first)
        lease.release()
        assert torch.equal(finish(), wanted)
