"""The mover tells the codecs which pages begin a sequence: a silent loss of quality if it did not."""

from __future__ import annotations

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


@pytest.mark.parametrize("way", ["from the device", "from a warmer tier"])
def test_a_page_of_depth_0_is_coded_as_one_that_begins_a_sequence(way):
    pages = torch.randn(2, *LAYOUT.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    device = DevicePool(LAYOUT, 2 * LAYOUT.page_bytes)
    warm = HostTier(LAYOUT, get_format("raw"), 4 * LAYOUT.page_bytes, mlock="off", pin="off")
    cold = HostTier(LAYOUT, Q4, 4 * LAYOUT.page_bytes, mlock="off", pin="off")
    warm.name = "warm"
    ids = [PageId(bytes([number + 1]) * 32, bytes(32), depth=number) for number in range(2)]
    for tier in (device, warm, cold):
        assert tier.reserve(2) is not None
    slots = [0, 1]
    device.scatter(slots, pages)
    assert warm.store(slots, ids, get_format("raw").encode(pages, LAYOUT)) == [None, None]
    tiers = (device, warm, cold)
    moves = tuple(Move(number, ids[number], number, number) for number in slots)
    transfer = Transfer(0 if way == "from the device" else 1, 2, moves, Priority.DEMAND, 0)
    carry(transfer, tiers, StagingPool(1, 1 << 20, tiers))
    assert transfer.refused == {}
    stored = cold.load(slots, [page.key for page in ids], np.zeros((2, cold.slot_bytes), np.uint8))
    wanted = Q4.encode(pages, LAYOUT, first=[0])
    assert not np.array_equal(wanted[0], Q4.encode(pages, LAYOUT)[0]), "the first page is coded differently"
    for found, payload in zip(stored, wanted, strict=True):
        assert isinstance(found, np.ndarray)
        assert np.array_equal(found, payload)
