"""How the mover has pages coded: which of them begin a sequence (a silent loss of quality if it did not say), and where the bytes go."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from kvtier.formats import get_format
from kvtier.layout import PageLayout
from kvtier.mover.stage import carry
from kvtier.mover.staging import StagingPool
from kvtier.mover.transfer import Move, Priority, Transfer
from kvtier.tiers.base import PageId
from kvtier.tiers.device import DevicePool
from kvtier.tiers.host import HostTier

LAYOUT = PageLayout(2, 2, 16, 2, 64)
Q4 = get_format("q4")
SLOTS = [0, 1]
IDS = [PageId(bytes([number + 1]) * 32, bytes(32), depth=number) for number in SLOTS]
WAYS = ["from the device", "from a warmer tier"]


@dataclass
class Rig:
    """Two pages on the device and in a raw tier, and a q4 tier below with slots for them."""

    pages: torch.Tensor
    tiers: tuple[DevicePool, HostTier, HostTier]

    def carry(self, way: str) -> Transfer:
        moves = tuple(Move(number, IDS[number], number, number) for number in SLOTS)
        transfer = Transfer(WAYS.index(way), 2, moves, Priority.DEMAND, 0)
        carry(transfer, self.tiers, StagingPool(1, 1 << 20, self.tiers))
        return transfer

    def stored(self) -> list[object]:
        cold = self.tiers[2]
        return [*cold.load(SLOTS, [page.key for page in IDS], np.zeros((2, cold.slot_bytes), np.uint8))]


@pytest.fixture
def rig() -> Rig:
    pages = torch.randn(2, *LAYOUT.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    device = DevicePool(LAYOUT, 2 * LAYOUT.page_bytes)
    warm = HostTier(LAYOUT, get_format("raw"), 4 * LAYOUT.page_bytes, mlock="off", pin="off")
    cold = HostTier(LAYOUT, Q4, 4 * LAYOUT.page_bytes, mlock="off", pin="off")
    warm.name = "warm"
    for tier in (device, warm, cold):
        assert tier.reserve(2) is not None
    device.scatter(SLOTS, pages)
    assert warm.store(SLOTS, IDS, get_format("raw").encode(pages, LAYOUT)) == [None, None]
    return Rig(pages, (device, warm, cold))


@pytest.mark.parametrize("way", WAYS)
def test_a_page_of_depth_0_is_coded_as_one_that_begins_a_sequence(rig, way):
    assert rig.carry(way).refused == {}
    wanted = Q4.encode(rig.pages, LAYOUT, first=[0])
    assert not np.array_equal(wanted[0], Q4.encode(rig.pages, LAYOUT)[0]), "the first page is coded differently"
    for found, payload in zip(rig.stored(), wanted, strict=True):
        assert isinstance(found, np.ndarray)
        assert np.array_equal(found, payload)


@pytest.mark.parametrize("way", WAYS)
def test_what_goes_to_memory_is_made_where_it_stays(rig, way, monkeypatch):
    """Not in the worker's memory first."""
    cold = rig.tiers[2]
    made: list[int] = []
    store = cold.store

    def seen(slots, pages, payloads, digests=None):
        made.extend(payload.ctypes.data for payload in payloads)
        before = [payload.copy() for payload in payloads]
        outcome = store(slots, pages, payloads, digests)
        for payload, bytes_ in zip(payloads, before, strict=True):
            assert np.array_equal(payload, bytes_)
        return outcome

    monkeypatch.setattr(cold, "store", seen)
    assert rig.carry(way).refused == {}
    assert made == [cold._address + slot * cold.slot_bytes for slot in SLOTS]


@pytest.mark.parametrize("way", WAYS)
def test_a_tier_that_closes_while_pages_come_refuses_them(rig, way, monkeypatch):
    cold = rig.tiers[2]
    rooms = cold.rooms

    def then_closed(slots):
        given = rooms(slots)
        cold.close()
        return given

    monkeypatch.setattr(cold, "rooms", then_closed)
    refused = rig.carry(way).refused
    assert {index: reason.reason for index, reason in refused.items()} == {0: "closed", 1: "closed"}
    assert rooms(SLOTS) is None
