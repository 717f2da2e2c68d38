"""Arguments that make no sense: one clear error each, and nothing changed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvtier.errors import LayoutError, LeaseError
from tests.cache.rig import (
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
        for wrong in (good[:1], good[:, :1], good[:, :, :-1], good[..., :-1], good.to(torch.float16), good.double()):
            with pytest.raises(LayoutError, match="kv"):
                cache.put(tokens, wrong)
            with cache.begin() as lease, pytest.raises(LayoutError):
                cache.append(lease, tokens, wrong)
        assert counters(cache)["pages"] == 0


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
