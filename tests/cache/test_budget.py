"""Laws checked: a budgeted lease gives back the bytes it was given, within its budget, whoever else is about, and lets go of everything."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvtier.errors import Closed, ConfigError, LeaseError
from kvtier.layout import PageLayout
from kvtier.leases.budget import SINKS, shares
from kvtier.pages import READY
from kvtier.tiers.device import DevicePool
from tests.cache.rig import kv_of, make_cache

LAYOUT = PageLayout(layers=3, planes=2, page_tokens=4, kv_heads=1, head_dim=32, dtype="fp32")
TOKENS = list(range(120))
BUDGET = 8


def open_cache(**more):
    return make_cache(layout=LAYOUT, host_pages=more.pop("host_pages", 64), **more)


def pages_of(tokens, layer, salt=""):
    """What `stream` should give: `[pages, planes, page_tokens, kv_heads, head_dim]`."""
    kv = kv_of(tokens, salt, LAYOUT)[layer]
    return kv.unflatten(1, (-1, LAYOUT.page_tokens)).transpose(0, 1)


def looking_at(kv, layer, token):
    """A query that finds one token's key among keys whose numbers are all between 1 and 2."""
    return 16 * (kv[layer, 0, token] - 1.5)


def on_device(cache, lease) -> int:
    """Device pages that are the sequence's: its rows' copies and its frames."""
    table = cache._residency.table
    return int((table.state[0][lease._lease.rows] == READY).sum()) + len(lease._frames)


@pytest.mark.parametrize("at_once", [120, 16, 4])
@pytest.mark.parametrize("device_pages", [4, BUDGET, 40])
def test_streamed_layers_are_what_was_appended(device_pages, at_once):
    with open_cache(device_pages=40) as cache:
        with cache.acquire_within(cache.lookup([]), device_pages) as lease:
            for start in range(0, 120, at_once):
                lease.append(TOKENS[start : start + at_once], kv_of(TOKENS[: start + at_once], "", LAYOUT)[:, :, start:])
                assert on_device(cache, lease) <= device_pages - 1
            for _ in range(2):
                for layer in range(LAYOUT.layers):
                    assert torch.equal(lease.stream(layer), pages_of(TOKENS, layer))
            assert torch.equal(lease.stream(1), pages_of(TOKENS, 1))  # out of order: what was read ahead is not used
        assert cache.stats()["leased_pages"] == 0
        assert cache._residency.device.free_slots == 40 - on_device(cache, lease)
        cache.check_integrity()


@pytest.mark.parametrize("in_reach", [True, False])
@pytest.mark.parametrize("device_pages", [4, 5, BUDGET])
def test_chosen_pages_hold_the_bytes_of_their_layer(device_pages, in_reach, monkeypatch):
    """In memory that codecs reach, and where pages have to be carried, as to a GPU."""
    if not in_reach:
        monkeypatch.setattr(DevicePool, "memory", lambda _: None)
    recent, frames = shares(device_pages)
    kv = kv_of(TOKENS, "", LAYOUT)
    with open_cache(device_pages=device_pages - 1) as cache, cache.acquire_within(cache.lookup([]), device_pages) as lease:
        lease.append(TOKENS, kv)
        found = 0
        for step in range(12):
            for layer in range(LAYOUT.layers):
                wanted = (7 * step + 3 * layer) % 30
                query = looking_at(kv, layer, 4 * wanted + step % 4)
                chosen = lease.choose(layer, query)
                assert chosen == sorted(set(chosen))
                assert len(chosen) == SINKS + frames + recent
                assert set(chosen) >= {0, *range(30 - recent, 30)}
                found += wanted in chosen
                assert torch.equal(lease.gather(layer, chosen), pages_of(TOKENS, layer)[chosen])
                assert on_device(cache, lease) <= device_pages - 1
        assert found > 0.6 * 12 * LAYOUT.layers  # keys at random: two directions do not tell four tokens apart every time
        assert cache.stats()["recalls"] == lease.recalled > 3 * frames


def test_a_page_that_is_still_wanted_is_not_read_again():
    with open_cache(device_pages=BUDGET - 1) as cache, cache.acquire_within(cache.lookup([]), BUDGET) as lease:
        kv = kv_of(TOKENS, "", LAYOUT)
        lease.append(TOKENS, kv)
        lease.gather(0, lease.choose(0, kv[0, 0, 50]))
        before = lease.recalled
        lease.gather(0, lease.choose(0, kv[0, 0, 50]))
        assert lease.recalled == before == shares(BUDGET)[1]


def test_a_sequence_that_was_begun_in_inference_mode_goes_on_outside_of_it_and_with_queries_that_want_gradients():
    kv, half = kv_of(TOKENS, "", LAYOUT), len(TOKENS) // 2
    with open_cache(device_pages=BUDGET - 1) as cache, cache.acquire_within(cache.lookup([]), BUDGET) as lease:
        with torch.inference_mode():
            lease.append(TOKENS[:half], kv[:, :, :half])
            lease.choose(0, kv[0, 0, 5])
        lease.append(TOKENS[half:], kv[:, :, half:])
        chosen = lease.choose(0, kv[0, 0, 50].clone().requires_grad_())
        assert torch.equal(lease.gather(0, chosen), pages_of(TOKENS, 0)[chosen])


def test_another_request_shares_the_pages_and_pushes_nothing_out():
    with open_cache(device_pages=40, host_pages=40) as cache, cache.acquire_within(cache.lookup([]), BUDGET) as lease:
        lease.append(TOKENS, kv_of(TOKENS, "", LAYOUT))
        with cache.acquire(cache.lookup(TOKENS)) as other:  # lifts the parked pages to the device, on its own account
            other.wait(20)
            assert other.tokens == 120
        filler = list(range(1000, 1000 + 33 * 4))
        cache.put(filler, kv_of(filler, "x", LAYOUT), salt="x")  # host and device are full now
        cache.put(filler, kv_of(filler, "y", LAYOUT), salt="y")
        cache.settle(20)
        for layer in range(LAYOUT.layers):
            assert torch.equal(lease.stream(layer), pages_of(TOKENS, layer))


def test_what_is_on_the_device_is_parked_and_what_is_below_stays_below():
    with open_cache(device_pages=40) as cache:
        cache.put(TOKENS, kv_of(TOKENS, "", LAYOUT))
        with cache.acquire_within(cache.lookup(TOKENS), BUDGET) as lease:
            assert lease.tokens == 120
            assert on_device(cache, lease) <= BUDGET - 1
            assert lease.parked == range(1, 30 - shares(BUDGET)[0])
            assert torch.equal(lease.stream(2), pages_of(TOKENS, 2))
        with cache.acquire_within(cache.lookup(TOKENS[:16]), BUDGET) as lease:
            assert not lease.parked
            assert torch.equal(lease.stream(2), pages_of(TOKENS[:16], 2))
        cache.check_integrity()


def test_queries_feed_the_scorer():
    with open_cache(device_pages=BUDGET - 1) as cache, cache.acquire_within(cache.lookup([]), BUDGET) as lease:
        kv = kv_of([*TOKENS, 1, 2, 3, 4], "", LAYOUT)
        lease.append(TOKENS, kv[:, :, :120])
        lease.choose(0, looking_at(kv, 0, 50))
        rows = list(lease._lease.rows)
        lease.append([1, 2, 3, 4], kv[:, :, 120:])
        attention = cache._residency.table.attention[rows]
        assert attention.sum() == pytest.approx(1.0)
        assert np.argmax(attention) == 50 // 4


def test_digests_that_the_cache_keeps_are_used(monkeypatch):
    with open_cache(device_pages=40, attention__digest_bytes="1MiB") as cache:
        kv = kv_of(TOKENS, "", LAYOUT)
        cache.put(TOKENS, kv)
        monkeypatch.setattr("kvtier.leases.budget.encode", lambda *_: pytest.fail("a digest was made anew"))
        with cache.acquire_within(cache.lookup(TOKENS), BUDGET) as lease:
            assert 12 in lease.choose(0, looking_at(kv, 0, 50))


def test_bad_requests_are_refused():
    with open_cache(device_pages=20) as cache:
        with cache.acquire_within(cache.lookup([]), BUDGET) as lease:
            with pytest.raises(LeaseError, match="only whole pages of 4"):
                lease.append([1, 2], kv_of([1, 2], "", LAYOUT))
            lease.append(TOKENS, kv_of(TOKENS, "", LAYOUT))
            with pytest.raises(LeaseError, match="give the pages that choose named"):
                lease.gather(0, range(30))
        for pages, said in [(3, "at least 4"), (22, "holds 20")]:
            with pytest.raises(LeaseError, match=said):
                cache.acquire_within(cache.lookup(TOKENS), pages)
        assert cache.stats()["leased_pages"] == 0
        cache.check_integrity()
    with make_cache(layout=LAYOUT, host_pages=None) as cache, pytest.raises(ConfigError, match="configure host or disk"):
        cache.acquire_within(cache.lookup([]), 4)


def test_a_full_device_shortens_a_restored_sequence_and_stops_a_growing_one():
    with open_cache(device_pages=10) as cache:
        cache.put(TOKENS[:40], kv_of(TOKENS[:40], "", LAYOUT))
        with cache.acquire(cache.lookup(TOKENS[:40])) as greedy:
            greedy.wait(20)
            with cache.acquire_within(cache.lookup([]), BUDGET) as lease, pytest.raises(LeaseError, match="no room for another page"):
                lease.append(TOKENS, kv_of(TOKENS, "z", LAYOUT))
        cache.check_integrity()


def test_where_nothing_below_has_room_the_sequence_ends_there_and_stays_whole():
    """The host has room for 3 of the pages that would have to leave the device."""
    kv, taken = kv_of(TOKENS, "", LAYOUT), 32
    with open_cache(device_pages=16, host_pages=3) as cache, cache.acquire_within(cache.lookup([]), 6) as lease:
        for start in range(0, taken, 4):
            lease.append(TOKENS[start : start + 4], kv[:, :, start : start + 4])
        with pytest.raises(LeaseError, match="no tier below the device has room"):
            lease.append(TOKENS[taken:64], kv[:, :, taken:64])
        assert (lease.tokens, len(lease.parked)) == (taken, 3)
        for layer in range(LAYOUT.layers):
            assert torch.equal(lease.stream(layer), pages_of(TOKENS[:taken], layer))
        with pytest.raises(LeaseError, match="no tier below the device has room"):
            lease.append(TOKENS[taken : taken + 4], kv[:, :, taken : taken + 4])
        assert lease.tokens == taken
        lease.release()
        cache.check_integrity()
        assert cache.stats()["leased_pages"] == 0


def test_a_lease_of_a_cache_that_was_closed_says_so():
    cache = open_cache(device_pages=BUDGET - 1)
    lease = cache.acquire_within(cache.lookup([]), BUDGET)
    lease.append(TOKENS, kv_of(TOKENS, "", LAYOUT))
    chosen = lease.choose(0, looking_at(kv_of(TOKENS, "", LAYOUT), 0, 50))
    cache.close()
    for use in (lambda: lease.choose(0, torch.ones(1, 32)), lambda: lease.gather(0, chosen), lambda: lease.stream(0)):
        with pytest.raises(Closed):
            use()
    lease.release()
