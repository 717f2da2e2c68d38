"""Writing behind: the next piece is made while one is written, what is refused is refused for itself, nothing begun is left behind."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.formats import get_format
from kvtier.mover import plan
from kvtier.mover.behind import WriteBehind
from kvtier.mover.packing import Packer
from kvtier.mover.plan import LEAST_WRITE_BYTES, PIECES_BEHIND, pages_per_write, pieces
from kvtier.mover.stage import carry
from kvtier.mover.staging import StagingPool
from kvtier.mover.transfer import Move, Priority, Transfer
from kvtier.tiers.base import PageId, Refused
from kvtier.tiers.device import DevicePool
from kvtier.tiers.disk import DiskTier
from kvtier.tiers.host import HostTier
from tests.cache.rig import LAYOUT, kv_of

DEVICE, HOST, DISK = 0, 1, 2


def transfer_of(source: int, target: int, pages: int) -> Transfer:
    moves = tuple(Move(number, PageId(bytes([number]) * 32, bytes(32), 0), number, number) for number in range(pages))
    return Transfer(source, target, moves, Priority.DEMOTION, pages * LAYOUT.page_bytes)


class Notes:
    """A packer that notes when a piece is begun and when it is waited for; moves in `refuses` are refused."""

    def __init__(self, refuses=()):
        self.events: list[tuple[str, int]] = []
        self.refuses = refuses

    def begin(self, moves, payloads, digests, ahead):
        self.events.append(("begun" if ahead else "stored", moves[0].row))

        def finish():
            self.events.append(("waited for", moves[0].row))
            return [Refused("disk full") if move.row in self.refuses else None for move in moves]

        return finish


def test_a_piece_is_waited_for_only_when_the_next_one_is_on_its_way():
    transfer, notes = transfer_of(HOST, DISK, 6), Notes(refuses=(1, 4))
    with closing(WriteBehind(transfer, notes)) as writes:  # type: ignore[arg-type]
        for start in (0, 2, 4):
            writes.store([start, start + 1], [np.zeros(10 + start, np.uint8)] * 2, None, last=start == 4)
            assert writes.moved == {0: 0, 2: 10, 4: 10 + 24}[start], "what is being written does not count yet"
    assert writes.moved == 10 + 24 + 14
    assert transfer.refused == {1: Refused("disk full"), 4: Refused("disk full")}
    expected = [("begun", 0), ("begun", 2), ("waited for", 0), ("stored", 4), ("waited for", 2), ("waited for", 4)]
    assert notes.events == expected


def test_what_was_begun_is_waited_for_when_the_next_piece_cannot_be_made():
    transfer, notes = transfer_of(HOST, DISK, 2), Notes()
    writes = WriteBehind(transfer, notes)  # type: ignore[arg-type]
    writes.store([0], [np.zeros(10, np.uint8)], None, last=False)
    with pytest.raises(MemoryError), closing(writes):
        raise MemoryError
    assert notes.events == [("begun", 0), ("waited for", 0)]


@given(pages=st.integers(1, 4096), encoded=st.integers(1, 1 << 26), most=st.integers(1, 4096))
def test_a_piece_is_worth_a_write_and_small_enough_for_the_next_to_be_made_meanwhile(pages, encoded, most):
    count = pages_per_write(pages, encoded, most)
    assert 1 <= count <= most
    assert count == 1 or (count - 1) * encoded < LEAST_WRITE_BYTES or (count - 1) * PIECES_BEHIND < pages
    assert count == most or count * encoded >= LEAST_WRITE_BYTES


class Watched(DiskTier):
    """A disk tier that notes what it is asked while writes are under way."""

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self.under_way = 0
        self.most_under_way = 0
        self.begun = 0

    def begin_store(self, slots, pages, payloads, digests=None):
        finish = super().begin_store(slots, pages, payloads, digests)
        self.under_way += 1
        self.begun += 1
        self.most_under_way = max(self.most_under_way, self.under_way)

        def finished():
            self.under_way -= 1
            return finish()

        return finished


@pytest.fixture
def tiers(tmp_path, monkeypatch):
    """Device, host and disk of 16 pages; pieces of any size are worth a write."""
    monkeypatch.setattr(plan, "LEAST_WRITE_BYTES", 1)
    device = DevicePool(LAYOUT, 16 * LAYOUT.page_bytes)
    host = HostTier(LAYOUT, get_format("raw"), 16 * LAYOUT.page_bytes, mlock="off", pin="off")
    disk = Watched(tmp_path, LAYOUT, get_format("raw"), 1 << 20, bytes(32))
    made = [device, host, disk]
    for tier in made:
        tier.reserve(16)
    yield made
    for tier in made:
        tier.close()


def stored(tiers, number: int) -> Any:
    """What the disk holds for a page."""
    disk = tiers[DISK]
    found = disk.load([number], [bytes([number]) * 32], np.empty((1, disk.slot_bytes), np.uint8))[0]
    return found if isinstance(found, Refused) else disk.format.decode([found], LAYOUT)[0]


def page(number: int) -> torch.Tensor:
    return kv_of([number] * LAYOUT.page_tokens)


@pytest.mark.parametrize("source", [DEVICE, HOST])
def test_towards_a_disk_pieces_are_made_while_others_are_written(tiers, source):
    pages = torch.stack([page(number) for number in range(12)])
    if source == DEVICE:
        tiers[DEVICE].scatter(list(range(12)), pages)
    else:
        ids = [PageId(bytes([number]) * 32, bytes(32), 0) for number in range(12)]
        tiers[HOST].store(list(range(12)), ids, tiers[HOST].format.encode(pages, LAYOUT))
    transfer = transfer_of(source, DISK, 12)
    assert carry(transfer, tiers, StagingPool(1, 64 * LAYOUT.page_bytes, tiers)) == 12 * LAYOUT.page_bytes
    assert transfer.refused == {}
    assert all(torch.equal(stored(tiers, number), page(number)) for number in range(12))
    assert (tiers[DISK].most_under_way, tiers[DISK].under_way) == (2, 0)
    assert tiers[DISK].begun == len(list(pieces(12, -(-12 // PIECES_BEHIND)))) - 1, "the last is written by the worker itself"


def test_a_copy_that_does_not_verify_is_lost_for_itself_and_those_around_it_are_written(tiers):
    ids = [PageId(bytes([number]) * 32, bytes(32), 0) for number in range(12)]
    pages = torch.stack([page(number) for number in range(12)])
    tiers[HOST].store(list(range(12)), ids, tiers[HOST].format.encode(pages, LAYOUT))
    transfer = transfer_of(HOST, DISK, 12)
    wrong = transfer.moves[5]._replace(page=PageId(b"x" * 32, bytes(32), 0))
    transfer.moves = (*transfer.moves[:5], wrong, *transfer.moves[6:])
    assert carry(transfer, tiers, StagingPool(1, 64 * LAYOUT.page_bytes, tiers)) == 11 * LAYOUT.page_bytes
    assert (set(transfer.refused), transfer.lost) == ({5}, {5})
    assert [number for number in range(12) if not isinstance(stored(tiers, number), Refused)] == [n for n in range(12) if n != 5]


def test_a_page_that_cannot_be_encoded_fails_the_transfer_after_what_was_begun_has_ended(tiers, monkeypatch):
    really = Packer.encode

    def encode(self, pages, rows, room, first):
        if rows is not None and 6 in rows:
            raise RuntimeError("no such codec")
        return really(self, pages, rows, room, first)

    monkeypatch.setattr(Packer, "encode", encode)
    with pytest.raises(RuntimeError, match="no such codec"):
        carry(transfer_of(DEVICE, DISK, 12), tiers, StagingPool(1, 64 * LAYOUT.page_bytes, tiers))
    assert tiers[DISK].under_way == 0
    tiers[DISK].free(range(16))
    tiers[DISK].check_integrity()
