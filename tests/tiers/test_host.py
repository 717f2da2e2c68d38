"""The host tier: the contract, and what it promises about memory."""

from __future__ import annotations

import ctypes
import gc
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kvtier.errors import ConfigError
from kvtier.formats import get_format
from kvtier.layout import PageLayout
from kvtier.testing.tiers import LAYOUT, TierContract, get, page_id, put
from kvtier.tiers import host
from kvtier.tiers.base import Refused
from kvtier.tiers.host import HostTier

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


def test_capacity_beyond_physical_memory_is_refused():
    with pytest.raises(ConfigError, match=r"host\.capacity_bytes is \d+, but the physical memory .* is \d+ bytes"):
        HostTier(LAYOUT, RAW, 1 << 50)


def test_capacity_beyond_the_container_limit_is_refused(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("1048576\n")
    monkeypatch.setattr(host, "_CGROUPS", tmp_path)
    with pytest.raises(ConfigError, match=r"host\.capacity_bytes is 2097152, but the limit in .*memory\.max is 1048576 bytes"):
        HostTier(LAYOUT, RAW, 2 << 20)
    (tmp_path / "memory.max").write_text("max\n")
    HostTier(LAYOUT, RAW, 2 << 20).close()


def test_formats_of_variable_size_are_refused_and_sent_to_disk():
    with pytest.raises(ConfigError, match=r"q4\+lz4.*saves nothing in fixed slots.*on disk"):
        HostTier(LAYOUT, get_format("q4+lz4"), 1 << 20)


@pytest.fixture
def no_mlock(monkeypatch):
    def refuse(*_):
        ctypes.set_errno(12)
        return -1

    monkeypatch.setattr(host, "_libc", SimpleNamespace(mlock=refuse, munlock=lambda *_: 0))


@pytest.mark.usefixtures("no_mlock")
def test_mlock_auto_degrades_with_one_log_line(caplog):
    with caplog.at_level(logging.INFO, "kvtier.tiers.host"):
        tier = HostTier(LAYOUT, RAW, 1 << 20)
    assert tier.report()["mlock"] is False
    assert len([r for r in caplog.records if "not locked" in r.message and "RLIMIT_MEMLOCK" in r.message]) == 1
    tier.close()


@pytest.mark.usefixtures("no_mlock")
def test_mlock_on_that_cannot_be_met_is_an_error_naming_the_limit():
    with pytest.raises(ConfigError, match=r"host\.mlock is on.*RLIMIT_MEMLOCK"):
        HostTier(LAYOUT, RAW, 1 << 20, mlock="on")


def test_report_says_what_the_kernel_says():
    tier = HostTier(LAYOUT, RAW, 8 << 20)
    report = tier.report()
    locked_kib = sum(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmLck:"))
    assert report["mlock"] is (locked_kib * 1024 >= 8 << 20)
    assert isinstance(report["huge_page_bytes"], int)
    assert 0 <= report["huge_page_bytes"] <= 8 << 20
    tier.close()


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
