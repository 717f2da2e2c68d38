"""Laws checked: attention over pages that stay in host memory equals attention over all of them; it holds, routes and ends as it should."""

from __future__ import annotations

import pytest
import torch

from kvtier.attention.partial import attend, merge
from kvtier.errors import ConfigError, LayoutError, LeaseError
from kvtier.formats import get_format
from kvtier.layout import PageLayout
from tests.cache.rig import (
    DEVICE,
    HOST,
    LAYOUT,
    PAGE,
    assert_right,
    flip_in_host,
    hold,
    kv_of,
    kvtier_threads,
    make_cache,
    put,
    run,
    tiers_of,
)

HEADS = 2
WIDE = PageLayout(layers=3, planes=2, page_tokens=16, kv_heads=2, head_dim=64, dtype="bf16")


def queries(tokens: int = 1, layout: PageLayout = LAYOUT, heads: int = HEADS, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, heads, layout.head_dim, generator=torch.Generator().manual_seed(seed))


def over_all(asked: torch.Tensor, kv: torch.Tensor, layer: int) -> torch.Tensor:
    return attend(asked, kv[layer, 0], kv[layer, 1]).out


def split_cache(**more):
    """The first pages of run(1) in host memory only, the last ones on the device."""
    cache = make_cache(device_pages=8, host_pages=32, **more)
    put(cache, run(1, 8))
    put(cache, run(2, 5))
    cache.settle(20)
    return cache


@pytest.mark.parametrize("mode", ["in_place", "fetch"])
def test_the_parts_merge_to_attention_over_everything(mode):
    with split_cache(routing__mode=mode) as cache:
        with cache.acquire_in_place(cache.lookup(run(1, 8))) as lease:
            assert lease.tokens == 8 * PAGE
            assert (lease.pages_in_place > 0) == (mode == "in_place")
            assert lease.decision.why == f"routing.mode is {mode}"
            for layer in range(LAYOUT.layers):
                asked = queries(3, seed=layer)
                found = lease.attend(layer, asked)
                torch.testing.assert_close(found.out, over_all(asked, kv_of(run(1, 8)), layer), atol=1e-5, rtol=1e-5)
            new = kv_of(run(9, 1))
            whole = merge([found, attend(asked, new[1, 0], new[1, 1])])
            both = torch.cat((kv_of(run(1, 8)), new), 2)
            torch.testing.assert_close(whole.out, over_all(asked, both, 1), atol=1e-5, rtol=1e-5)
        assert cache.stats()["routing"][{"in_place": "in_place", "fetch": "fetched"}[mode]] == 1
        cache.check_integrity()
    assert not [name for name in kvtier_threads() if "node" in name]


@pytest.mark.parametrize("mode", ["in_place", "fetch"])
def test_engines_that_infer_and_those_that_train_may_ask(mode):
    """Under torch.inference_mode, as engines run, and with queries that want gradients; also for a cache that was made so."""
    with torch.inference_mode(), split_cache(routing__mode=mode) as cache:
        right = over_all(queries(), kv_of(run(1, 8)), 0)
        with cache.acquire_in_place(cache.lookup(run(1, 8))) as lease:
            assert lease.tokens == 8 * PAGE
            torch.testing.assert_close(lease.attend(0, queries()).out, right, atol=1e-5, rtol=1e-5)
            with torch.inference_mode(mode=False):
                found = lease.attend(0, queries().requires_grad_())
            assert not found.out.requires_grad
            torch.testing.assert_close(found.out, right, atol=1e-5, rtol=1e-5)


def test_quantised_pages_are_decoded_on_the_fly():
    """q8 in host memory: what is attended to is exactly what decoding gives."""
    tokens = list(range(20 * 16))
    kv = torch.randn(3, 2, len(tokens), 2, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    with make_cache(
        layout=WIDE, device_pages=20, host_pages=64, host__format="q8", pages__page_tokens=16, routing__mode="in_place"
    ) as cache:
        cache.put(tokens, kv)
        cache.put(list(range(10**6, 10**6 + 20 * 16)), kv)
        cache.settle(20)
        with cache.acquire_in_place(cache.lookup(tokens)) as lease:
            assert lease.pages_in_place == lease.pages == 20
            pages = kv.view(3, 2, 20, 16, 2, 64).permute(2, 0, 1, 3, 4, 5).contiguous()
            q8 = get_format("q8")
            seen = q8.decode(q8.encode(pages, WIDE, first=[0]), WIDE).permute(1, 2, 0, 3, 4, 5).reshape(kv.shape)
            for layer in range(3):
                asked = queries(2, WIDE, 8, layer)
                torch.testing.assert_close(lease.attend(layer, asked).out, over_all(asked, seen, layer), atol=1e-5, rtol=1e-5)


def test_held_pages_stay_and_are_let_go():
    with split_cache(routing__mode="in_place") as cache:
        lease = cache.acquire_in_place(cache.lookup(run(1, 8)))
        for start in range(10, 20):
            put(cache, run(start, 4))
        cache.settle(20)
        asked = queries()
        torch.testing.assert_close(lease.attend(0, asked).out, over_all(asked, kv_of(run(1, 8)), 0), atol=1e-5, rtol=1e-5)
        lease.release()
        lease.release()
        with pytest.raises(LeaseError, match="released"):
            lease.attend(0, asked)
        cache.check_integrity()
        for start in range(20, 40):
            put(cache, run(start, 4))
        cache.settle(20)
        assert cache.lookup(run(1, 8)).tokens == 0


def test_a_damaged_copy_ends_the_lease_before_it():
    with split_cache(routing__mode="in_place") as cache:
        in_host = [page for page, tiers in enumerate(tiers_of(cache, run(1, 8))) if DEVICE not in tiers]
        match = cache.lookup(run(1, 8))
        row = cache._residency.table.row(match.keys[in_host[2]])
        flip_in_host(cache, row)
        with cache.acquire_in_place(match) as lease:
            assert lease.tokens == in_host[2] * PAGE
            asked = queries()
            torch.testing.assert_close(lease.attend(0, asked).out, over_all(asked, kv_of(run(1, in_host[2])), 0), atol=1e-5, rtol=1e-5)
        assert cache.stats()["tiers"]["host"]["refused"] == {"checksum": 1}
        cache.check_integrity()


def test_a_copy_that_turns_out_damaged_while_another_reads_it_is_buried_when_that_one_ends(caplog):
    with split_cache(routing__mode="in_place") as cache:
        in_host = [page for page, tiers in enumerate(tiers_of(cache, run(1, 8))) if DEVICE not in tiers]
        match = cache.lookup(run(1, 8))
        row = cache._residency.table.row(match.keys[in_host[2]])
        with cache.acquire_in_place(match) as first:
            flip_in_host(cache, row)
            with cache.acquire_in_place(match) as second:
                assert (first.tokens, second.tokens) == (8 * PAGE, in_host[2] * PAGE)
            assert HOST in tiers_of(cache, run(1, 8))[in_host[2]], "it is being read"
        assert cache.lookup(run(1, 8)).tokens == in_host[2] * PAGE
        assert "page refused by tier host: checksum" in caplog.text
        cache.check_integrity()


def test_what_only_the_disk_has_comes_up(tmp_path):
    with make_cache(tmp_path / "d", device_pages=8, host_pages=4, routing__mode="in_place") as cache:
        put(cache, run(1, 8))
        cache.flush()
        put(cache, run(2, 8))
        cache.settle(20)
        with cache.acquire_in_place(cache.lookup(run(1, 6))) as lease:
            assert lease.tokens == 6 * PAGE
            asked = queries()
            torch.testing.assert_close(lease.attend(1, asked).out, over_all(asked, kv_of(run(1, 6)), 1), atol=1e-5, rtol=1e-5)
        assert_right(hold(cache, run(1, 6)), run(1, 6))


def test_attention_workload_and_load_decide():
    def told(mass_in_host: float, workload: str = "default", device: float | None = 0.0) -> str:
        with split_cache() as cache:
            lease = cache.acquire_in_place(cache.lookup(run(1, 8)))
            lease.release()
            match = cache.lookup(run(1, 8))
            table = cache._residency.table
            rows = table.find(match.keys)
            away = table.state[DEVICE][rows] != 2
            table.attention[rows] = [mass_in_host / away.sum() if far else (1 - mass_in_host) / (~away).sum() for far in away]
            with cache.acquire_in_place(match, workload, device) as lease:
                choice: str = lease.decision.choice
                return choice

    assert told(0.9) == "fetch"
    assert told(0.1) == "in_place"
    assert told(0.6, "simple_qa") == "in_place"
    assert told(0.4, "creative_writing") == "fetch"
    assert told(0.6, device=1.0) == "in_place"


def test_both_ways_are_learned_and_the_faster_one_is_taken():
    """The document's balancer goes in place here, always; so fetching is tried as well, and then what both took decides."""
    with split_cache() as cache:
        decisions = []
        for _ in range(6):
            with cache.acquire_in_place(cache.lookup(run(1, 8)), device_utilisation=1.0) as lease:
                for layer in range(LAYOUT.layers):
                    lease.attend(layer, queries())
                decisions.append(lease.decision)
            with hold(cache, run(2, 5)):  # and run 1 gives way to it
                pass
            cache.settle(20)
        assert [decision.choice for decision in decisions[:4]] == ["in_place", "in_place", "fetch", "fetch"]
        assert [decision.why for decision in decisions[:4]] == ["", "", *["to learn what fetch takes"] * 2]
        learned = cache.stats()["routing"]["learned"]
        assert min(side["requests"] for side in learned["sides"].values()) >= 2
        assert all(side["s_per_call"] > 0 for side in learned["sides"].values())
        assert learned["calls_per_request"] == {"default": LAYOUT.layers}
        for decision in decisions[4:]:
            took = {"fetch": decision.expected.fetch_s, "in_place": decision.expected.in_place_s}
            assert not decision.why
            if max(took.values()) > 1.3 * min(took.values()):
                assert decision.choice == min(took, key=took.__getitem__)


def test_a_device_without_room_is_not_fetched_to():
    with (
        split_cache() as cache,
        hold(cache, run(2, 5)),
        cache.acquire_in_place(cache.lookup(run(1, 8)), device_utilisation=0.0) as lease,
    ):
        assert lease.decision.why == "the device has no room"
        assert lease.tokens == 8 * PAGE


def test_bad_input_is_one_clear_error():
    with split_cache(routing__mode="in_place") as cache:
        match = cache.lookup(run(1, 8))
        with pytest.raises(ConfigError, match="workload 'poetry'"):
            cache.acquire_in_place(match, "poetry")
        with pytest.raises(LeaseError, match="device_utilisation is 2"):
            cache.acquire_in_place(match, device_utilisation=2)
        assert cache.stats()["leased_pages"] == 0
        with cache.acquire_in_place(match) as lease:
            with pytest.raises(LeaseError, match="layer 2; this model has layers 0 to 1"):
                lease.attend(2, queries())
            with pytest.raises(LayoutError, match="expected"):
                lease.attend(0, torch.zeros(1, 1, 5))
        cache.check_integrity()
        assert int((cache._residency.table.readers[HOST] != 0).sum()) == 0
    with make_cache(host_pages=None) as cache:
        put(cache, run(1, 1))
        with pytest.raises(LeaseError, match="needs a host tier"):
            cache.acquire_in_place(cache.lookup(run(1, 1)))
        assert cache.stats()["leased_pages"] == 0
    with pytest.raises(ConfigError, match="expected one called default"):
        make_cache(routing__workloads=[{"name": "a", "fetch_above": 0.5}])
