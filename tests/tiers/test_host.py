"""The host tier: the contract, and what it promises about memory."""

from __future__ import annotations

import errno
import gc
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from kvtier.errors import ConfigError
from kvtier.formats import get_format
from kvtier.layout import PageLayout
from kvtier.memory.region import Region
from kvtier.testing.tiers import LAYOUT, TierContract, get, page_id, put
from kvtier.tiers import host
from kvtier.tiers.base import Refused
from kvtier.tiers.host import HostTier
from tests.memory.kernel import is_mapped, locked_bytes, resident

RAW, Q8 = get_format("raw"), get_format("q8")


class TestHostContract(TierContract):
    def make_tier(self, tmp_path: Path, layout: PageLayout) -> HostTier:
        return HostTier(layout, Q8, 16 * Q8.payload_bytes(layout) + 999)

    def corrupt(self, tier, slot) -> None:
        tier._bytes[slot, 17] ^= 1


def test_slots_are_cache_line_aligned_and_the_arena_has_exactly_their_size():
    tier = HostTier(PageLayout(1, 1, 3, 1, 5), RAW, 1000, mlock="off")
    assert tier.slot_bytes == 64
    assert tier.capacity_slots == 15
    assert tier.report()["arena_bytes"] == 15 * 64
    slots = put(tier, range(15))
    for number, slot in enumerate(slots):
        found = get(tier, slot, page_id(number).key)
        assert not isinstance(found, Refused)
        assert found.ctypes.data % 64 == 0
    tier.close()


def test_load_gives_views_that_stay_readable_after_close():
    tier = HostTier(LAYOUT, RAW, 8 * 4096)
    view = get(tier, put(tier, [1])[0], page_id(1).key)
    assert not isinstance(view, Refused)
    assert np.shares_memory(view, tier._arena.bytes)
    before = view.copy()
    tier.close()
    gc.collect()
    np.testing.assert_array_equal(view, before)


@pytest.mark.parametrize("capacity", [1, 4095])
def test_capacity_below_one_page_is_refused_with_both_numbers(capacity):
    with pytest.raises(ConfigError, match=rf"host\.capacity_bytes is {capacity}, .* 4096 bytes"):
        HostTier(LAYOUT, RAW, capacity)


@pytest.mark.parametrize("capacity", [1 << 50, 1 << 60])
def test_capacity_beyond_what_can_be_had_is_refused(capacity):
    with pytest.raises(ConfigError, match=r"host\.capacity_bytes is \d+, but only \d+ bytes of memory can be had"):
        HostTier(LAYOUT, RAW, capacity)


def test_formats_of_variable_size_are_refused_and_sent_to_disk():
    with pytest.raises(ConfigError, match=r"q4\+lz4.*saves nothing in fixed slots.*on disk"):
        HostTier(LAYOUT, get_format("q4+lz4"), 1 << 20)


def refuse_lock(_: Region) -> None:
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


def test_mlock_on_that_cannot_be_met_is_an_error_naming_the_limit(monkeypatch):
    monkeypatch.setattr(Region, "lock", refuse_lock)
    with pytest.raises(ConfigError, match=r"host\.mlock is on.*RLIMIT_MEMLOCK.*host\.mlock to auto"):
        HostTier(LAYOUT, RAW, 1 << 20, mlock="on")
    tier = HostTier(LAYOUT, RAW, 1 << 20)
    assert tier.report()["mlock"] is False
    tier.close()


def test_report_says_what_the_kernel_says():
    before = locked_bytes()
    tier = HostTier(LAYOUT, RAW, 8 << 20, huge_pages="off")
    report = tier.report()
    assert report["mlock"] is (locked_bytes() - before >= 8 << 20)
    assert (report["huge_pages"], report["huge_page_bytes"]) == ("none", 0)
    tier.close()


def test_the_memory_is_there_from_the_start_and_goes_with_close():
    tier = HostTier(LAYOUT, RAW, 8 << 20, huge_pages="off")
    region = tier._arena._region
    assert region is not None
    assert resident(region).all()
    address = region.address
    del region
    tier.close()
    assert not is_mapped(address)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_pin_on_without_cuda_is_an_error_and_auto_is_not():
    with pytest.raises(ConfigError, match=r"host\.pin is on"):
        HostTier(LAYOUT, RAW, 1 << 20, pin="on")
    tier = HostTier(LAYOUT, RAW, 1 << 20, pin="auto")
    assert tier.report()["pinned"] is False
    tier.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_arena_copies_from_the_device_as_pinned_memory():
    tier = HostTier(LAYOUT, RAW, 1 << 20, pin="on")
    assert tier.report()["pinned"] is True
    assert torch.from_numpy(tier._arena.bytes).is_pinned()
    tier.close()


class FakeCuda:
    """Counts registrations; the one numbered `fail_at` is refused."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.registered: dict[int, int] = {}
        self.calls = 0
        self.fail_at = fail_at

    def cudaHostRegister(self, address, size, flags):
        self.calls += 1
        if self.calls == self.fail_at:
            return 2
        self.registered[address] = size
        return 0

    def cudaHostUnregister(self, address):
        del self.registered[address]
        return 0


def with_fake_cuda(monkeypatch: pytest.MonkeyPatch, fake: FakeCuda) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(host, "_cuda_runtime", lambda: fake)
    monkeypatch.setattr(host, "_PIN_CHUNK_BYTES", 1 << 20)


def test_pinning_covers_the_arena_in_chunks_and_ends_with_close(monkeypatch):
    fake = FakeCuda()
    with_fake_cuda(monkeypatch, fake)
    tier = HostTier(LAYOUT, RAW, (2 << 20) + 4096, pin="on")
    assert sorted(fake.registered.values()) == [4096, 1 << 20, 1 << 20]
    assert tier.report()["pinned"] is True
    tier.close()
    tier.close()
    assert not fake.registered


def test_pinning_that_fails_half_way_is_undone(monkeypatch, caplog):
    fake = FakeCuda(fail_at=2)
    with_fake_cuda(monkeypatch, fake)
    with caplog.at_level(logging.INFO, "kvtier.tiers.host"):
        tier = HostTier(LAYOUT, RAW, 2 << 20, mlock="off")
    assert not fake.registered
    assert tier.report()["pinned"] is False
    assert sum("not pinned" in record.message for record in caplog.records) == 1
    tier.close()
    fake.calls = 0
    with pytest.raises(ConfigError, match=r"host\.pin is on, but cudaHostRegister failed with error 2"):
        HostTier(LAYOUT, RAW, 2 << 20, pin="on")
    assert not fake.registered


def test_an_arena_that_cannot_be_pinned_as_asked_does_not_stay(monkeypatch):
    with_fake_cuda(monkeypatch, FakeCuda(fail_at=1))
    before = locked_bytes()
    with pytest.raises(ConfigError, match=r"host\.pin is on") as kept:  # an exception keeps what its frames hold
        HostTier(LAYOUT, RAW, 2 << 20, mlock="auto", pin="on", huge_pages="off")
    assert locked_bytes() == before
    del kept
