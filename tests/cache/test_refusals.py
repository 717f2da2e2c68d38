"""Arguments that make no sense: one clear error each, and nothing changed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvtier.errors import LayoutError, LeaseError
from tests.cache.rig import (
    PAGE,
    counters,
    hold,
    kv_of,
    make_cache,
    put,
    run,
)


def test_kv_of_another_shape_or_dtype_is_refused_before_anything_is_written():
    with make_cache() as cache:
        tokens = run(1, 2)
        good = kv_of(tokens)
        inside_a_number = torch.frombuffer(bytearray(1) + good.numpy().tobytes(), dtype=good.dtype, offset=1).view(good.shape)
        for wrong in (good[:1], good[:, :1], good[:, :, :-1], good[..., :-1], good.to(torch.float16), good.double(), inside_a_number):
            with pytest.raises(LayoutError, match="kv"):
                cache.put(tokens, wrong)
            with cache.begin() as lease, pytest.raises(LayoutError):
                cache.append(lease, tokens, wrong)
        assert counters(cache)["pages"] == 0


@pytest.mark.parametrize("make", [torch.Tensor.to_sparse, lambda kv: kv.to("meta")])
def test_kv_without_numbers_in_plain_memory_is_refused_and_takes_no_room(make):
    with make_cache() as cache:
        tokens = run(1, 2)
        with pytest.raises(LayoutError, match="expected a dense tensor"):
            cache.put(tokens, make(kv_of(tokens)))
        assert cache.stats()["tiers"]["device"]["bytes_used"] == 0


def test_a_device_that_fails_in_a_write_keeps_no_room_and_no_hold(monkeypatch):
    tokens = run(1, 8)
    with make_cache(device_pages=8, host_pages=None) as cache:
        put(cache, tokens[: 2 * PAGE])
        with monkeypatch.context() as broken:
            broken.setattr(type(cache._residency.device), "scatter", lambda *_: (_ for _ in ()).throw(MemoryError("no memory for a copy")))
            with pytest.raises(MemoryError):
                cache.put(tokens, kv_of(tokens))
        other = run(9, 8)
        assert cache.put(other, kv_of(other)) == len(other), "all of the device can be had again"
        cache.check_integrity()


@pytest.mark.parametrize("shared", [False, True])
def test_a_device_that_fails_in_an_open_page_leaves_the_lease_as_it_was(monkeypatch, shared):
    tokens = run(1, 3)
    kv, half = kv_of(tokens), PAGE + PAGE // 2 if shared else PAGE
    with make_cache(device_pages=8, host_pages=None) as cache, cache.begin() as lease:
        cache.append(lease, tokens[:half], kv[:, :, :half])
        fork = cache.fork(lease)
        used = cache.stats()["tiers"]["device"]["bytes_used"]
        with monkeypatch.context() as broken:
            broken.setattr(type(cache._residency.device), "write_tokens", lambda *_: (_ for _ in ()).throw(MemoryError("no memory")))
            with pytest.raises(MemoryError):
                cache.append(lease, tokens[half : half + 1], kv[:, :, half : half + 1])
        assert (lease.tokens, cache.stats()["tiers"]["device"]["bytes_used"]) == (half, used)
        fork.release()
        for index in range(half, len(tokens)):
            assert cache.append(lease, tokens[index : index + 1], kv[:, :, index : index + 1]) == 1
        stored = lease.layer(1)[torch.from_numpy(lease.block_table)]
        assert torch.equal(stored.transpose(0, 1).flatten(1, 2), kv[1])
        cache.check_integrity()


def test_signs_that_torch_has_put_off_are_stored():
    tokens = run(1, 2)
    kv = torch.complex(kv_of(tokens), kv_of(tokens)).conj().imag
    assert kv.is_neg()
    with make_cache() as cache:
        cache.put(tokens, kv)
        with cache.acquire(cache.lookup(tokens)) as lease:
            stored = lease.layer(0)[torch.from_numpy(lease.wait())]  # [pages, planes, page_tokens, kv_heads, head_dim]
            assert torch.equal(stored[:, 0].flatten(0, 1), -kv_of(tokens)[0, 0])


@pytest.mark.parametrize(
    "tokens", [[9.9] * 4, np.zeros((2, 4), np.int64), np.array([2**63] * 4, np.uint64), [None] * 4, "abcd", [2**70] * 4]
)
def test_what_is_no_flat_sequence_of_whole_numbers_is_refused_and_leaves_nothing(tokens):
    with make_cache() as cache:
        for use in (cache.lookup, cache.prefetch, lambda ids: cache.put(ids, kv_of([1, 2, 3, 4])), lambda ids: cache.fits([ids])):
            with pytest.raises(LayoutError, match="whole numbers"):
                use(tokens)
        assert cache.stats()["pages"] == 0


def test_a_lease_of_another_cache_is_refused():
    with make_cache() as cache, make_cache() as other:
        lease = other.begin()
        uses = [
            lambda: cache.append(lease, [1], kv_of([1])),
            lambda: cache.put([1, 2, 3, 4], kv_of([1, 2, 3, 4]), after=lease),
            lambda: cache.truncate(lease, 0),
            lambda: cache.fork(lease),
            lambda: cache.record_attention(lease, []),
        ]
        for use in uses:
            with pytest.raises(LeaseError, match="another cache"):
                use()
        lease.release()


@pytest.mark.parametrize("index", [-1, 99])
def test_a_layer_the_model_does_not_have_is_refused(index):
    with make_cache() as cache:
        put(cache, run(1, 2))
        with hold(cache, run(1, 2)) as lease, pytest.raises(LeaseError, match="has layers 0 to"):
            lease.layer(index)


def test_a_sequence_goes_on_as_the_tenant_that_began_it():
    tokens = run(1, 2)
    with make_cache() as cache, cache.begin("north") as lease:
        assert cache.put(tokens[:PAGE], kv_of(tokens[:PAGE], "north"), after=lease, salt="north") == PAGE
        with pytest.raises(LeaseError, match="another tenant"):
            cache.put(tokens[PAGE:], kv_of(tokens, "south")[:, :, PAGE:], after=lease, salt="south")
        assert cache.put(tokens[PAGE:], kv_of(tokens, "north")[:, :, PAGE:], after=lease) == PAGE
        assert cache.lookup(tokens, "north").tokens == 2 * PAGE
        assert cache.lookup(tokens, "south").tokens == cache.lookup(tokens).tokens == 0
