"""What copies take on disk, and when it is given back."""

from __future__ import annotations

import json

import numpy as np

from kvtier.testing.tiers import LAYOUT, holds, page_id, payload, put, staging
from tests.tiers.disk import CAPACITY, SLOT, VARIABLE, disk_bytes, open_disk


def test_variable_sizes_are_charged_what_they_take_and_the_disk_agrees(tmp_path):
    tier = open_disk(tmp_path, format=VARIABLE)
    slots = []
    while (taken := tier.reserve(1)) is not None:
        assert tier.store(taken, [page_id(taken[0])], [np.full(100, taken[0], dtype=np.uint8)]) == [None]
        slots += taken
    assert len(slots) == CAPACITY // 4096 - 1  # the last reservation would need a whole slot
    assert tier.bytes_used == len(slots) * 4096 == disk_bytes(tmp_path)
    tier.free(slots[:20])
    big = tier.reserve(10)
    assert big is not None
    full = np.random.default_rng(0).integers(0, 256, 4200, dtype=np.uint8)[: VARIABLE.payload_bytes(LAYOUT)]
    assert tier.store(big, [page_id(100 + n) for n in range(10)], [full] * 10) == [None] * 10
    assert disk_bytes(tmp_path) <= CAPACITY
    tier.tidy()
    assert disk_bytes(tmp_path) == tier.bytes_used == len(slots[20:]) * 4096 + 10 * SLOT
    tier.free(big)
    small = tier.reserve(10)
    assert small is not None
    assert tier.store(small, [page_id(n) for n in range(10)], [full[:10]] * 10) == [None] * 10
    tier.tidy()
    assert disk_bytes(tmp_path) == tier.bytes_used
    tier.check_integrity()
    tier.close()


def test_tidy_gives_the_disk_its_blocks_back(tmp_path):
    tier = open_disk(tmp_path)
    slots = put(tier, range(16))
    assert disk_bytes(tmp_path) == CAPACITY
    tier.free(slots[4:])
    assert tier.tidy() == 12
    assert disk_bytes(tmp_path) == 4 * SLOT
    tier.close()


def test_a_slot_that_is_reserved_again_before_tidy_is_not_punched(tmp_path):
    tier = open_disk(tmp_path)
    tier.free(put(tier, range(8)))
    slots = tier.reserve(4)
    assert slots is not None
    assert tier.store(slots[:2], [page_id(20), page_id(21)], [payload(tier, 20), payload(tier, 21)]) == [None] * 2
    assert tier.tidy() == 4
    assert tier.store(slots[2:], [page_id(22), page_id(23)], [payload(tier, 22), payload(tier, 23)]) == [None] * 2
    assert all(holds(tier, slot, n) for n, slot in enumerate(slots, 20))
    tier.close()


def test_segments_are_created_in_order_when_needed(tmp_path, monkeypatch):
    monkeypatch.setattr("kvtier.tiers.disk.opening.SEGMENT_BYTES", 4 * SLOT)
    tier = open_disk(tmp_path)

    def names() -> list[str]:
        return sorted(path.name for path in tmp_path.glob("segment-*"))

    assert names() == []
    slots = put(tier, range(5))
    assert names() == ["segment-00000.kvt", "segment-00001.kvt"]
    put(tier, range(5, 16))
    assert len(names()) == 4
    assert all(holds(tier, slot, n) for n, slot in enumerate(slots))
    tier.close()
    again = open_disk(tmp_path)
    assert len(list(again.recover())) == 16
    again.close()


def test_report_is_plain_data(tmp_path):
    tier = open_disk(tmp_path)
    put(tier, [1])
    tier.load([0], [page_id(1).key], staging(tier, 1))
    report = tier.report()
    assert json.loads(json.dumps(report)) == report
    assert report["bytes_used"] == SLOT
    assert report["engine"] in ("direct", "buffered")
    tier.close()
