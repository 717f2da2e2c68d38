"""The host tier: the contract, and what it promises about memory."""

from __future__ import annotations

import errno
import gc
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from kvtier.cuda.find import find_accelerator
from kvtier.cuda.registration import Registration
from kvtier.errors import ConfigError
from kvtier.formats import get_format
from kvtier.layout import PageLayout
from kvtier.memory.region import Region
from kvtier.testing.accelerator import LateAccelerator
from kvtier.testing.tiers import LAYOUT, TierContract, get, page_id, put
from kvtier.tiers.base import Refused
from kvtier.tiers.host import HostTier
from tests.memory.kernel import is_mapped, locked_bytes, resident
from tests.tiers.disk import judged_by_digests

RAW, Q8 = get_format("raw"), get_format("q8")


class TestHostContract(TierContract):
    def make_tier(self, tmp_path: Path, layout: PageLayout) -> HostTier:
        return HostTier(layout, Q8, 16 * Q8.payload_bytes(layout) + 999)

    def corrupt(self, tier, slot) -> None:
        tier._bytes[slot, 17] ^= 1

    def test_law_1_a_copy_is_judged_by_the_digest_that_came_with_it(self, tmp_path) -> None:
        judged_by_digests(self, tmp_path)


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


def test_pin_on_without_a_gpu_is_an_error_and_auto_is_not():
    with pytest.raises(ConfigError, match=r"host\.pin is on, but there is no GPU"):
        HostTier(LAYOUT, RAW, 1 << 20, pin="on")
    tier = HostTier(LAYOUT, RAW, 1 << 20, pin="auto")
    assert tier.report()["pinned"] is False
    tier.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_arena_copies_from_the_device_as_pinned_memory():
    tier = HostTier(LAYOUT, RAW, 1 << 20, pin="on", accelerator=find_accelerator("cuda"))
    assert tier.report()["pinned"] is True
    assert torch.from_numpy(tier._arena.bytes).is_pinned()
    tier.close()


def with_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Registration.__init__, "__defaults__", (1 << 20,))


def test_pinning_covers_the_arena_in_chunks_and_ends_with_close(monkeypatch):
    with_small_chunks(monkeypatch)
    gpu = LateAccelerator()
    tier = HostTier(LAYOUT, RAW, (2 << 20) + 4096, pin="on", accelerator=gpu)
    report = tier.report()
    assert (report["pinned"], report["pinned_bytes"], report["pinned_chunks"]) == (True, tier._arena.bytes.nbytes, len(gpu.registered))
    assert len(gpu.registered) >= 2
    assert tier.all_direct
    tier.close()
    tier.close()
    assert not gpu.registered


def test_pinning_goes_as_far_as_it_can_and_says_how_far(monkeypatch, caplog):
    with_small_chunks(monkeypatch)
    gpu = LateAccelerator(refuse_after=(1 << 20) + 4096)
    with caplog.at_level(logging.INFO, "kvtier.tiers.host"):
        tier = HostTier(LAYOUT, RAW, 2 << 20, mlock="off", accelerator=gpu)
    pinned = sum(gpu.registered.values())
    report = tier.report()
    assert 0 < pinned < 2 << 20
    assert (report["pinned"], report["pinned_bytes"]) == (True, pinned)
    assert "the stand-in registers no more, after" in str(report["why_not_pinned"])
    assert not tier.all_direct
    assert sum("bytes pinned" in record.message for record in caplog.records) == 1
    tier.close()
    assert not gpu.registered


def test_an_arena_that_cannot_be_pinned_as_asked_does_not_stay(monkeypatch):
    gpu = LateAccelerator(refuse_after=0)
    before = locked_bytes()
    with pytest.raises(ConfigError, match=r"host\.pin is on, but the stand-in registers no more") as kept:  # it keeps what its frames hold
        HostTier(LAYOUT, RAW, 2 << 20, mlock="auto", pin="on", huge_pages="off", accelerator=gpu)
    assert locked_bytes() == before
    assert not gpu.registered
    del kept


def test_a_slot_that_a_gpu_wrote_itself_is_proven_not_copied():
    tier = HostTier(LAYOUT, RAW, 1 << 20, accelerator=LateAccelerator())
    slots = tier.reserve(2)
    assert slots is not None
    rooms = tier.rooms(slots)
    assert rooms is not None
    assert tier.direct(slots).tolist() == [room.ctypes.data for room in rooms]
    payload = rooms[0]
    payload[:] = 7
    assert tier.load([slots[0]], [page_id(0).key], np.zeros((1, 1), np.uint8)) == [Refused("key")], "not visible before store"
    assert tier.store([slots[0]], [page_id(0)], [payload]) == [None]
    found = tier.load([slots[0]], [page_id(0).key], np.zeros((1, 1), np.uint8))[0]
    assert isinstance(found, np.ndarray)
    assert bool((found == 7).all())
    assert tier.store([slots[1]], [page_id(1)], [found]) == [None], "another slot's memory is copied as any other"
    payload[3] = 8
    assert tier.load(slots, [page_id(0).key, page_id(1).key], np.zeros((2, 1), np.uint8))[0] == Refused("checksum")
    assert isinstance(tier.load([slots[1]], [page_id(1).key], np.zeros((1, 1), np.uint8))[0], np.ndarray)
    tier.close()
