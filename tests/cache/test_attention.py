"""Laws checked: queries reach the scorer as the attention their pages get, through digests made at commit, and bad ones do no harm."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvtier.attention.digest import digest_page_bytes
from kvtier.errors import ConfigError, LayoutError, LeaseError
from kvtier.layout import PageLayout
from tests.cache.rig import Clock, make_cache

LAYOUT = PageLayout(layers=3, planes=2, page_tokens=4, kv_heads=2, head_dim=32, dtype="fp32")
ROOM = 16 * digest_page_bytes(LAYOUT)


def make_kv(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(LAYOUT.layers, 2, tokens, LAYOUT.kv_heads, LAYOUT.head_dim, generator=torch.Generator().manual_seed(seed))


def open_cache(digest_bytes=ROOM, **more):
    return make_cache(layout=LAYOUT, attention__digest_bytes=digest_bytes, **more)


def queries_for(kv: torch.Tensor, layer: int, token: int) -> torch.Tensor:
    """Queries `[heads, head_dim]`, two heads for each of the keys', that look at one token."""
    return (kv[layer, 0, token] * 4).repeat_interleave(2, 0)


def true_mass(kv, layer, queries):
    keys = kv[layer, 0].repeat_interleave(2, 1)
    shares = (torch.einsum("hd,thd->ht", queries, keys) * LAYOUT.head_dim**-0.5).softmax(1).mean(0)
    return np.array([float(part.sum()) for part in shares.split(LAYOUT.page_tokens)])


def recorded(cache, lease):
    return cache._residency.table.attention[lease.rows]


@pytest.mark.parametrize("at_once", [22, 3])
@pytest.mark.parametrize("token", [0, 9, 19, 21])
def test_the_page_a_query_looks_at_gets_the_attention(token, at_once):
    """Full pages through their digests, whether they came at once or token by token, and the open page (tokens 20 and 21) by its keys."""
    kv = make_kv(22)
    with open_cache() as cache, cache.begin() as lease:
        for start in range(0, 22, at_once):
            cache.append(lease, list(range(start, min(start + at_once, 22))), kv[:, :, start : start + at_once])
        assert len(cache._residency.digests) == 5
        queries = queries_for(kv, 1, token)
        cache.record_queries(lease, 1, queries)
        np.testing.assert_allclose(recorded(cache, lease), true_mass(kv, 1, queries), atol=0.15)
        assert recorded(cache, lease).argmax() == token // 4
        assert recorded(cache, lease).sum() == pytest.approx(1.0)
        assert cache.stats()["attention_ignored"] == 0


def test_several_tokens_are_averaged_and_layers_too():
    kv = make_kv(16)
    with open_cache() as cache, cache.begin() as lease:
        cache.append(lease, list(range(16)), kv)
        both = torch.stack((queries_for(kv, 0, 1), queries_for(kv, 0, 14)))
        cache.record_queries(lease, 0, both)
        one = recorded(cache, lease).copy()
        assert set(one.argsort()[-2:]) == {0, 3}
        cache.record_queries(lease, 2, queries_for(kv, 2, 6))
        cache.record_queries(lease, 1, queries_for(kv, 1, 6))
        mean = recorded(cache, lease)
        assert mean.argmax() == 1
        assert mean.sum() == pytest.approx(1.0)
        for _ in range(12):
            cache.record_queries(lease, 2, queries_for(kv, 2, 6))
        assert recorded(cache, lease)[0] < one[0] / 10  # older calls fade


def test_attention_from_queries_decides_who_leaves_as_reported_attention_does():
    """The same path: under `a2cr-classic` the page that queries look at outlives the others."""
    clock = Clock()
    kv = make_kv(24)
    scorer = {
        "policy__name": "a2cr-classic",
        "policy__attention_weight": 1.0,
        "policy__frequency_weight": 0.0,
        "policy__recency_weight": 0.0,
    }
    with open_cache(device_pages=6, host_pages=None, clock=clock, **scorer) as cache:
        for page in range(6):
            cache.put(list(range(4 * page, 4 * page + 4)), kv[:, :, 4 * page : 4 * page + 4], salt=str(page))
        for page in range(6):
            with cache.acquire(cache.lookup(list(range(4 * page, 4 * page + 4)), str(page))) as lease:
                lease.wait()
                cache.record_attention(lease, [0.0])
                if page == 2:
                    cache.record_queries(lease, 0, queries_for(kv, 0, 8))
                    assert recorded(cache, lease)[0] == pytest.approx(1.0)
        cache.put(list(range(100, 120)), make_kv(20, 1), salt="new")
        assert [bool(cache.lookup(list(range(4 * page, 4 * page + 4)), str(page))) for page in range(6)] == [page == 2 for page in range(6)]


def test_restored_pages_are_digested_when_they_are_first_asked_about(tmp_path):
    kv = make_kv(16)
    with open_cache(disk=tmp_path) as cache:
        cache.put(list(range(16)), kv)
    with open_cache(disk=tmp_path) as cache:
        assert len(cache._residency.digests) == 0
        with cache.acquire(cache.lookup(list(range(16)))) as lease:
            lease.wait()
            cache.record_queries(lease, 0, queries_for(kv, 0, 9))
            assert recorded(cache, lease).argmax() == 2
            assert len(cache._residency.digests) == 4


def test_digests_go_with_their_pages_and_stay_bounded():
    with open_cache(digest_bytes=3 * digest_page_bytes(LAYOUT), device_pages=6, host_pages=None) as cache:
        for number in range(20):
            cache.put([1000 + number] * 8, make_kv(8, number))
            assert len(cache._residency.digests) <= 3
        assert len(cache._residency.digests) == 3
        cache.clear()
        assert len(cache._residency.digests) == 0
        cache.check_integrity()


def test_bad_queries_are_counted_or_refused():
    kv = make_kv(8)
    with open_cache() as cache, cache.begin() as lease:
        cache.record_queries(lease, 0, torch.zeros(4, 32))  # no pages yet: nothing to tell
        cache.append(lease, list(range(8)), kv)
        cache.record_queries(lease, 0, torch.full((4, 32), torch.nan))
        assert cache.stats()["attention_ignored"] == 2
        assert np.isnan(recorded(cache, lease)).all()
        for shape in [(3, 32), (4, 31), (32,), (1, 1, 4, 32), (0, 4, 32), (0, 32)]:
            with pytest.raises(
                LayoutError, match=r"expected \[heads, head_dim\] or \[tokens, heads, head_dim\] with a multiple of 2 heads"
            ):
                cache.record_queries(lease, 0, torch.zeros(shape))
        with pytest.raises(LeaseError, match="layer 3; this model has layers 0 to 2"):
            cache.record_queries(lease, 3, torch.zeros(4, 32))
        with open_cache() as other, pytest.raises(LeaseError, match="another cache"):
            other.record_queries(lease, 0, torch.zeros(4, 32))
        lease.release()
        cache.record_queries(lease, 0, torch.zeros(4, 32))
        assert cache.stats()["attention_ignored"] == 4


def test_without_digests_queries_are_refused():
    with make_cache(layout=LAYOUT) as cache, cache.begin() as lease, pytest.raises(ConfigError, match=r"set attention\.digest_bytes"):
        cache.record_queries(lease, 0, torch.zeros(4, 32))
