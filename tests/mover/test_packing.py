"""A packer writes what its tier's format writes, and lets a byte stage rest only where that is allowed and measured to pay."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvtier.formats import get_format
from kvtier.formats.digests import digests_of
from kvtier.formats.economy import BEFORE_JUDGING
from kvtier.formats.lossless import Staged
from kvtier.layout import PageLayout
from kvtier.mover.packing import Packer
from kvtier.mover.transfer import Move
from kvtier.tiers.base import PageId, Refused
from kvtier.tiers.disk import DiskTier
from tests.tiers.faults import NoHolesEngine

LAYOUT = PageLayout(2, 2, 16, 2, 64)
PAGES = torch.randn(4, *LAYOUT.shape, generator=torch.Generator().manual_seed(0)).bfloat16()


class Memory:
    """A tier that keeps payloads in a dictionary and takes `seconds` (of a clock that the test moves) to store them."""

    name, layout, refunds = "memory", LAYOUT, True

    def __init__(self, format: str, compress: str, clock: list[float], seconds: float) -> None:
        self.format, self.compress = get_format(format), compress
        self.clock, self.seconds = clock, seconds
        self.copies: dict[int, np.ndarray] = {}

    def store(self, slots, pages, payloads, digests):
        self.clock[0] += self.seconds
        self.copies.update({slot: payload.copy() for slot, payload in zip(slots, payloads, strict=True)})
        return [None] * len(slots)


def written(monkeypatch, format: str, compress: str, seconds: float, batches: int = 3 * BEFORE_JUDGING) -> list[int]:
    """Bytes of the first page in each of some batches that are written to a tier which takes `seconds` for each; packing takes one."""
    clock = [0.0]

    def pack(self, *given):
        clock[0] += 1.0
        return really(self, *given)

    really = Staged.pack
    monkeypatch.setattr(Staged, "pack", pack)
    monkeypatch.setattr("kvtier.mover.packing.time.perf_counter", lambda: clock[0])
    tier = Memory(format, compress, clock, seconds)
    packer = Packer(tier)  # type: ignore[arg-type]
    moves = [Move(n, PageId(bytes(32), bytes(32), 1), n, n) for n in range(4)]
    sizes = []
    for _ in range(batches):
        room = [np.empty(tier.format.payload_bytes(LAYOUT), np.uint8) for _ in range(4)]
        payloads, digests = packer.encode(PAGES, [0, 1, 2, 3], room, [])
        assert packer.begin(moves, payloads, digests, ahead=False)() == [None] * 4
        decoded = tier.format.decode(tier.format.unpack([tier.copies[n] for n in range(4)], LAYOUT), LAYOUT)
        assert torch.equal(decoded, PAGES)
        sizes.append(len(tier.copies[0]))
    return sizes


def test_payloads_come_with_their_digests_unless_a_stage_makes_them():
    for name, known in (("q4", True), ("q4+zstd", False)):
        tier = Memory(name, "always", [0.0], 0.0)
        payloads, digests = Packer(tier).encode(PAGES, [2, 0], list(np.zeros((2, 1 << 14), np.uint8)), [1])  # type: ignore[arg-type]
        assert digests == (digests_of(payloads) if known else None)


@pytest.mark.parametrize("compress", ["always", "auto"])
def test_a_format_without_stage_is_written_as_it_is(monkeypatch, compress):
    assert set(written(monkeypatch, "raw", compress, 1.0)) == {LAYOUT.page_bytes}


def test_a_stage_that_is_asked_for_always_works_however_fast_the_tier_is(monkeypatch):
    assert max(written(monkeypatch, "raw+zstd", "always", 0.01)) < LAYOUT.page_bytes


def test_a_stage_rests_where_writing_is_faster_than_packing(monkeypatch):
    sizes = written(monkeypatch, "raw+zstd", "auto", 0.01)
    assert max(sizes[: BEFORE_JUDGING - 1]) < LAYOUT.page_bytes < sizes[-1]


def test_a_stage_goes_on_where_writing_is_slow(monkeypatch):
    assert max(written(monkeypatch, "raw+zstd", "auto", 100.0)) < LAYOUT.page_bytes


@pytest.mark.parametrize("packs_elsewhere", [False, True])
def test_where_small_copies_take_the_room_of_large_ones_there_is_nothing_to_gain(tmp_path, caplog, packs_elsewhere):
    """A file system without holes: said once, and the byte stage rests unless it is there to save time."""
    tier = DiskTier(tmp_path, LAYOUT, get_format("raw+zstd"), 1 << 20, bytes(32), engine=NoHolesEngine())
    assert len([record for record in caplog.records if "raw+zstd gains no room" in record.message]) == 1
    packer = Packer(tier)
    room = [np.empty(tier.format.payload_bytes(LAYOUT), np.uint8) for _ in range(4)]

    def sizes() -> list[int]:
        if packs_elsewhere:
            return [len(payload) for payload in packer.pack(get_format("raw").encode(PAGES, LAYOUT), room)]
        return [len(payload) for payload in packer.encode(PAGES, [0, 1, 2, 3], room, [])[0]]

    assert sizes() == [tier.format.payload_bytes(LAYOUT)] * 4
    slots = tier.reserve(4)
    assert slots is not None
    pages = [PageId(bytes([n] * 32), bytes(32), 0) for n in range(4)]
    assert tier.store(slots, pages, packer.encode(PAGES, [0, 1, 2, 3], room, [])[0]) == [None] * 4
    loaded = tier.load(slots, [page.key for page in pages], np.empty((4, tier.slot_bytes), np.uint8))
    payloads = [payload for payload in loaded if not isinstance(payload, Refused)]
    assert torch.equal(tier.format.decode(tier.format.unpack(payloads, LAYOUT), LAYOUT), PAGES)
    tier.compress = "auto"
    assert max(sizes()) < tier.format.payload_bytes(LAYOUT)
    tier.close()
