"""Laws checked: a page of KV is cut between nodes where layers end, to the nearest page of memory; what cannot be cut is refused."""

from __future__ import annotations

import numpy as np
import pytest

from kvtier.errors import ConfigError
from kvtier.formats import get_format
from kvtier.keys import root_key
from kvtier.layout import PageLayout
from kvtier.numa.topology import read_topology
from kvtier.tiers import host_layers
from kvtier.tiers.base import PageId, Refused
from kvtier.tiers.host import HostTier
from kvtier.tiers.host_layers import LayerNodes

LAYOUT = PageLayout(layers=5, planes=2, page_tokens=16, kv_heads=2, head_dim=64, dtype="bf16")
NODE = read_topology().memory_nodes[0]


@pytest.mark.parametrize("name", ["raw", "q8", "q8/q4", "q4"])
def test_layers_of_a_payload_are_apart_and_sum_up(name):
    form = get_format(name)
    sizes = form.layer_bytes(LAYOUT)
    assert len(sizes) == LAYOUT.layers
    assert sum(sizes) == form.payload_bytes(LAYOUT)
    pages = torch_pages()
    whole = form.encode(pages, LAYOUT)[0]
    changed = pages.clone()
    changed[0, 3] += 1
    other = form.encode(changed, LAYOUT)[0]
    start = sum(sizes[:3])
    assert np.array_equal(whole[:start], other[:start])
    assert np.array_equal(whole[start + sizes[3] :], other[start + sizes[3] :])
    assert not np.array_equal(whole, other)


def torch_pages():
    import torch

    return torch.randn(1, *LAYOUT.shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def test_cuts_are_where_layers_end(monkeypatch):
    monkeypatch.setattr(host_layers, "check_nodes", lambda *_: None)
    sizes = [8192 + 100] * 4
    parts = LayerNodes((NODE, NODE), sizes, 36864, 4).parts
    assert [(part.node, part.first, part.stop) for part in parts] == [(NODE, 0, 2), (NODE, 2, 4)]
    assert [(part.start, part.length) for part in parts] == [(0, 16384), (16384, 36864 - 16384)]


def test_a_tier_by_layers_holds_what_it_is_given():
    tier = HostTier(LAYOUT, get_format("q8"), 1 << 20, numa="layers", numa_nodes=(NODE,))
    try:
        assert tier.slot_bytes % 4096 == 0
        assert tier.worker_nodes == (NODE,)
        slots = tier.reserve(3)
        assert slots is not None
        payloads = get_format("q8").encode(torch_pages().expand(3, -1, -1, -1, -1, -1), LAYOUT)
        keys = [number.to_bytes(32, "big") for number in range(3)]
        assert tier.store(slots, [PageId(key, root_key(b"", ""), 0) for key in keys], payloads) == [None] * 3
        for found, payload in zip(tier.load(slots, keys, np.empty((3, 0), np.uint8)), payloads, strict=True):
            assert not isinstance(found, Refused)
            assert np.array_equal(found, payload)
        report = tier.report()
        assert report["numa"] == f"layers 0-4 on {NODE}"
        assert report["numa_segments"][0]["share_there"] == 1.0  # type: ignore[index]
        assert tier.node_of(slots[0], 2) == NODE
        assert tier.plan_moves(lambda _: True, 0.0) == []
    finally:
        tier.close()


def test_what_cannot_be_cut_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match=r"host.numa is layers, but there is no NUMA node 99"):
        LayerNodes((99,), [4096], 4096, 1)
    with pytest.raises(ConfigError, match="huge_pages is on"):
        HostTier(LAYOUT, get_format("q8"), 1 << 20, huge_pages="on", numa="layers", numa_nodes=(NODE,))
    monkeypatch.setattr(host_layers, "check_nodes", lambda *_: None)
    with pytest.raises(ConfigError, match="1 layers for 2 nodes"):
        LayerNodes((0, 1), [4096], 4096, 1)
    with pytest.raises(ConfigError, match="too few to give each of 2 nodes a page"):
        LayerNodes((0, 1), [100, 100], 4096, 1)
    with pytest.raises(ConfigError, match=rf"node {NODE} has [0-9]+ bytes left, not {4096 << 40}"):
        LayerNodes((NODE,), [4096], 4096, 1 << 40)
