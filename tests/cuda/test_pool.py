"""The pool in GPU memory: its size, its order of uses, its bookkeeping; the chunks that host memory is registered in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.cuda import find
from kvtier.cuda.registration import Registration
from kvtier.errors import ConfigError, DeviceError, LayoutError
from kvtier.layout import PageLayout
from kvtier.testing.accelerator import UNMAPPED, LateAccelerator, LateStream
from kvtier.tiers.gpu import GpuPool, open_pool
from tests.cache.rig import LAYOUT, PAGE, grow, hold, push_out, put, run, tiers_of
from tests.cuda.rig import Engine, gpu_cache, gpu_of, on_gpu

PAGE_BYTES = LAYOUT.page_bytes


def pool_of(pages=8, **gpu):
    return GpuPool(LAYOUT, pages * PAGE_BYTES, LateAccelerator(**{"total_bytes": 64 * PAGE_BYTES, "step_bytes": PAGE_BYTES, **gpu}))


def page(number):
    return torch.full((1, *LAYOUT.shape), float(number))


def test_writes_and_reads_of_several_streams_keep_their_order():
    pool = pool_of()
    gpu = pool.accelerator
    first, second = gpu.new_stream(), gpu.new_stream()
    gpu.engine = first
    pool.scatter([3], page(1))
    gpu.engine = second
    assert torch.equal(pool.gather([3]), page(1)), "a read waits for another stream's write"
    gpu.engine = first
    found = []
    pool.enter()
    first.run(lambda: found.append(pool.layer(0)[3].clone()))
    pool.leave()
    gpu.engine = second
    pool.scatter([3], page(2))
    second.record().wait()
    first.record().wait()
    assert torch.equal(found[0], page(1)[0, 0]), "a write waits for another stream's read"


def test_kv_that_wants_gradients_is_kept_without_them():
    pool = pool_of()
    given = page(1).requires_grad_() * 1
    pool.scatter([3], given)
    pool.write_tokens(4, 1, given[0, :, :, :2])
    assert torch.equal(pool.gather([3]), page(1))
    assert torch.equal(pool.gather([4])[0, :, :, 1:3], page(1)[0, :, :, :2])
    assert not pool.layer(0).requires_grad


def test_a_copy_between_pools_that_fails_half_way_is_over_before_anybody_else_gets_its_slots(monkeypatch):
    source, target = pool_of(), pool_of()
    source.accelerator.friends.append(target.accelerator)
    source.scatter([1, 3], page(1).repeat_interleave(2, 0))
    copy = LateStream.copy

    def fails_half_way(stream, targets, sources, size_bytes):
        copy(stream, targets[:1], sources[:1], size_bytes)
        raise DeviceError("a cosmic ray")

    monkeypatch.setattr(LateStream, "copy", fails_half_way)
    with pytest.raises(DeviceError, match="a cosmic ray"):
        source.copy_to([1, 3], target, [5, 7])
    assert torch.equal(target._pool[5], page(1)[0]), "what was launched is over"


def test_a_write_waits_for_keys_that_another_stream_has_yet_to_read():
    pool = pool_of()
    gpu = pool.accelerator
    pool.scatter([3], page(1))
    gpu.engine = first = gpu.new_stream()
    found = []
    first.result = lambda work: first.run(lambda: found.append(work()))  # as on a GPU: later
    pool.keys([3])
    gpu.engine = gpu.new_stream()
    pool.scatter([3], page(2))
    gpu.engine.record().wait()
    assert torch.equal(found[0], page(1)[:, :, 0])


def test_a_page_of_a_lease_that_is_still_held_is_seen_by_other_streams(monkeypatch):
    with gpu_cache(monkeypatch) as cache:
        gpu = gpu_of(cache)
        gpu.engine = gpu.new_stream()
        with cache.begin() as writing:
            grow(cache, writing, run(1, 2))
            gpu.engine = gpu.new_stream()
            engine = Engine(cache, gpu.engine)
            with hold(cache, run(1, 2)) as reading:
                engine.assert_found(engine.read(reading), run(1, 2))


def test_a_pool_takes_bytes_or_a_share_of_what_is_free_and_says_what_does_not_fit(monkeypatch):
    gpu = on_gpu(monkeypatch, total_bytes=100 * PAGE_BYTES)
    assert open_pool(LAYOUT, 1, "cuda", free_memory_fraction=0.5).capacity_slots == 50
    assert open_pool(LAYOUT, 20 * PAGE_BYTES, "cuda").capacity_slots == 20
    with pytest.raises(ConfigError, match=r"capacity_bytes: \d+ bytes cannot be allocated .* are free"):
        open_pool(LAYOUT, 101 * PAGE_BYTES, "cuda")
    with pytest.raises(ConfigError, match="free_memory_fraction is 0.001"):
        open_pool(LAYOUT, 1, "cuda", free_memory_fraction=0.001)
    with pytest.raises(ConfigError, match="one page of this model takes"):
        open_pool(LAYOUT, 1, "cuda")
    gpu.can_grow = False
    fixed = open_pool(LAYOUT, 10 * PAGE_BYTES, "cuda")
    assert "cannot map memory" in str(fixed.report()["why_fixed"])
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="is in CPU memory"):
        open_pool(LAYOUT, 10 * PAGE_BYTES, "cpu", free_memory_fraction=0.5)


def test_a_gpu_that_is_not_there_or_not_usable_is_refused_with_a_reason(monkeypatch):
    assert find.find_accelerator("cpu") is None
    assert find.find_accelerator("auto") is None
    with pytest.raises(ConfigError, match="torch sees no CUDA device here; use 'cpu' or 'auto'"):
        find.find_accelerator("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(ConfigError, match="only 1 CUDA devices"):
        find.find_accelerator("cuda:1")
    with pytest.raises(ConfigError, match="torch cannot compute on cuda:0: .*; install a torch built for this GPU"):
        find.find_accelerator("auto")


def test_kv_that_no_gpu_can_reach_is_refused():
    with pytest.raises(LayoutError, match="the KV is on meta; this pool takes KV on cpu"):
        pool_of().scatter([0], torch.empty((1, *LAYOUT.shape), device="meta"))


def test_pages_go_to_another_gpu_where_there_is_a_way_and_only_there():
    here, there = pool_of(), pool_of()
    gpu, other = here.accelerator, there.accelerator
    here.scatter([2, 5], torch.cat([page(1), page(2)]))
    with pytest.raises(DeviceError, match="no direct way"):
        here.copy_to([2, 5], there, [7, 0])
    gpu.friends.append(other)
    here.copy_to([2, 5], there, [7, 0])
    assert torch.equal(there.gather([7, 0]), torch.cat([page(1), page(2)]))
    with pytest.raises(LayoutError, match="do not fit"):
        here.copy_to([2], GpuPool(PageLayout(1, 2, 4, 1, 32), 4096, other), [0])


def test_growing_gives_slots_and_shrinking_takes_memory_but_never_a_taken_slot():
    pool = pool_of(pages=4)
    gpu = pool.accelerator
    first = pool.reserve(4)
    assert first == [0, 1, 2, 3]
    assert pool.reserve(1) is None
    pool.reach(6)
    pool.extend(6)
    pool.check_integrity()
    assert (pool.capacity_slots, pool.reserve(2)) == (6, [4, 5])
    pool.scatter([4], page(9))
    pool.free([0, 1, 5])
    pool.retire(2)
    assert pool.free_slots == 2
    pool.free([2])
    assert pool.free_slots == 2, "what is freed behind the end is given to nobody"
    assert pool.bytes_used == 2 * PAGE_BYTES
    pool.check_integrity()
    pool.end()
    pool.give_back()
    assert (pool.capacity_slots, gpu.used_bytes) == (5, 5 * PAGE_BYTES), "slot 4 is still taken"
    assert torch.equal(pool.gather([4]), page(9))
    assert pool.free_slots == 3
    pool.check_integrity()
    with pytest.raises(DeviceError, match="can have 1 to"):
        pool.reach(65)


def test_slots_are_exchanged_for_themselves_unless_they_are_to_go():
    pool = pool_of(pages=4)
    assert pool.reserve(3) == [0, 1, 2]
    assert pool.exchange([1, 2], 2) == [1, 2]
    pool.reach(6)
    pool.retire(2)
    assert pool.exchange([1, 2], 2) is None, "slot 2 is behind the end from now on"
    pool.check_integrity()
    assert pool.exchange([0], 1) == [0]
    assert pool.reserve(1) == [1]
    pool.check_integrity()


def test_memory_is_given_back_only_when_no_stream_uses_it():
    pool = pool_of(pages=4)
    gpu = pool.accelerator
    gpu.engine = gpu.new_stream()
    pool.scatter([3], page(4))
    found = []
    gpu.engine.run(lambda: found.append(pool.layer(0)[3].clone()))
    pool.leave()
    pool.retire(2)
    pool.end()
    pool.give_back()
    assert torch.equal(found[0], page(4)[0, 0])
    assert int(pool._pool.view(torch.uint8)[3].max()) == UNMAPPED


def test_a_cache_shrinks_by_moving_pages_and_letting_others_leave_and_grows_again(monkeypatch):
    with gpu_cache(monkeypatch, device_pages=16, host_pages=64, gpu={"step_bytes": PAGE_BYTES}) as cache:
        pool = cache._residency.device
        for number in (1, 2, 3, 4):
            put(cache, run(number, 4))
        held = hold(cache, run(1, 4))
        assert cache.resize_device(8 * PAGE_BYTES) == 8 * PAGE_BYTES
        assert gpu_of(cache).used_bytes >= pool.capacity_bytes == 8 * PAGE_BYTES
        cache.check_integrity()
        engine = Engine(cache)
        engine.assert_found(engine.read(held), run(1, 4))
        held.release()
        for number in (1, 2, 3, 4):
            assert cache.lookup(run(number, 4)).tokens == 4 * PAGE, "what left went down"
            with hold(cache, run(number, 4)) as lease:
                engine.assert_found(engine.read(lease), run(number, 4))
        assert cache.resize_device(16 * PAGE_BYTES) == 16 * PAGE_BYTES
        for number in (1, 2, 3, 4):
            with hold(cache, run(number, 4)) as lease:
                engine.assert_found(engine.read(lease), run(number, 4))
        assert sum(len(tiers & {0}) for tiers in tiers_of(cache, [*run(1, 4)])) == 4
        cache.check_integrity()


def test_shrinking_moves_what_fits_without_copying_it_to_a_colder_tier(monkeypatch):
    with gpu_cache(monkeypatch, device_pages=16, gpu={"step_bytes": PAGE_BYTES}) as cache:
        put(cache, run(1, 4))
        put(cache, run(2, 4))
        cache.clear()
        put(cache, run(3, 6))
        pool = cache._residency.device
        slots = cache._residency.table.slot[0, [cache._residency.table.row(key) for key in cache.lookup(run(3, 6)).keys]]
        smallest = int(slots.max())
        assert cache.resize_device(smallest * PAGE_BYTES) == smallest * PAGE_BYTES
        assert cache.stats()["links"] == {}
        with hold(cache, run(3, 6)) as lease:
            assert lease.tokens == 6 * PAGE
            engine = Engine(cache)
            engine.assert_found(engine.read(lease), run(3, 6))
        assert pool.capacity_slots == smallest
        cache.check_integrity()


def test_leased_pages_stay_where_they_are_and_bound_the_pool(monkeypatch):
    with gpu_cache(monkeypatch, device_pages=8, gpu={"step_bytes": PAGE_BYTES}) as cache:
        put(cache, run(1, 4))
        put(cache, run(2, 4))
        with hold(cache, run(2, 4)) as lease:
            before = lease.block_table.tolist()
            assert cache.resize_device(2 * PAGE_BYTES) == (max(before) + 1) * PAGE_BYTES
            assert lease.block_table.tolist() == before
            engine = Engine(cache)
            engine.assert_found(engine.read(lease), run(2, 4))
        assert cache.resize_device(2 * PAGE_BYTES) == 2 * PAGE_BYTES
        cache.check_integrity()
        push_out(cache)


def test_sizes_that_cannot_be_are_refused_and_change_nothing(monkeypatch):
    with gpu_cache(monkeypatch, gpu={"total_bytes": 16 * PAGE_BYTES + (1 << 21), "step_bytes": PAGE_BYTES}) as cache:
        gpu_of(cache).total_bytes = gpu_of(cache).used_bytes + 2 * PAGE_BYTES
        for size, why in ((0, "can have 1 to"), (1 << 40, "can have 1 to"), (12 * PAGE_BYTES, "out of memory")):
            with pytest.raises(ConfigError, match=f"resize_device to .*{why}"):
                cache.resize_device(size)
        assert cache.stats()["tiers"]["device"]["capacity_bytes"] == 8 * PAGE_BYTES
        cache.check_integrity()
    from tests.cache.rig import make_cache

    monkeypatch.undo()
    with make_cache() as cache, pytest.raises(ConfigError, match="in CPU memory, which has a fixed size"):
        cache.resize_device(PAGE_BYTES)


@settings(max_examples=50)
@given(st.integers(1, 9000), st.integers(1, 60), st.integers(1, 1 << 16), st.none() | st.integers(0, 1 << 18))
def test_registered_chunks_touch_but_never_overlap_and_no_direct_slot_crosses_two(slot_bytes, slots, chunk_bytes, refuse_after):
    gpu, start = LateAccelerator(refuse_after=refuse_after), 1 << 30
    size = slots * slot_bytes
    made = Registration(gpu, start, size, slot_bytes, max(4096, chunk_bytes))
    assert sum(gpu.registered.values()) == made.registered_bytes
    assert bool(made.why) == (made.registered_bytes < size)
    ends = [address + length for address, length in sorted(gpu.registered.items())]
    assert sorted(gpu.registered) == [start, *ends[:-1]][: len(ends)]
    assert max(gpu.registered.values(), default=0) <= max(4096, chunk_bytes)
    places = start + np.arange(slots) * slot_bytes
    for address, direct in zip(places.tolist(), made.covers(places, slot_bytes).tolist(), strict=True):
        whole = any(begin <= address and address + slot_bytes <= begin + length for begin, length in gpu.registered.items())
        assert direct == whole
    made.undo()
    assert gpu.registered == {}
    assert not made.covers(places, slot_bytes).any()


def test_a_page_that_is_leased_while_it_is_being_moved_stays_where_its_lease_says(monkeypatch):
    with gpu_cache(monkeypatch, device_pages=8, gpu={"step_bytes": PAGE_BYTES}) as cache:
        put(cache, run(1, 2))
        put(cache, run(2, 2))
        put(cache, run(3, 2))
        pool = cache._residency.device
        assert isinstance(pool, GpuPool)
        copy_to = pool.copy_to
        held: list[Any] = []

        def and_lease(*copies):
            copy_to(*copies)
            held.append(hold(cache, run(3, 2)))
            held.append(held[0].block_table.tolist())

        monkeypatch.setattr(pool, "copy_to", and_lease)
        end = cache.resize_device(4 * PAGE_BYTES) // PAGE_BYTES
        lease, slots = held
        assert max(slots) >= 4, "these are pages that were to be moved"
        assert lease.block_table.tolist() == slots
        assert end == max(slots) + 1
        engine = Engine(cache)
        engine.assert_found(engine.read(lease), run(3, 2))
        lease.release()
        cache.check_integrity()
