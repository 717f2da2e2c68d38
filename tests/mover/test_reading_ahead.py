"""Reads that go on before a worker takes up their transfer: the same outcome, and scratch memory that always comes back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from kvtier.errors import Closed
from kvtier.formats import get_format
from kvtier.mover.mover import Mover
from kvtier.mover.transfer import Move, Priority, Transfer
from kvtier.tiers.base import PageId, Placed, Refused
from kvtier.tiers.device import DevicePool
from kvtier.tiers.host import HostTier
from tests.cache.rig import LAYOUT, kv_of, kvtier_threads

RAW = get_format("raw")
WORKERS = 2


def page(number: int) -> PageId:
    return PageId(bytes([number]) * 32, bytes(32), 0)


def pages_of(*numbers: int) -> torch.Tensor:
    return torch.stack([kv_of([number] * LAYOUT.page_tokens) for number in numbers])


class Ahead(HostTier):
    """Reads ahead as often as `allowed` says, and notes on which thread that begins and what is closed."""

    in_memory = False

    def __init__(self) -> None:
        super().__init__(LAYOUT, RAW, 16 * LAYOUT.page_bytes, mlock="off", pin="off")
        self.allowed = 100
        self.begun_on: list[str] = []
        self.closed = 0
        self.fault: Exception | None = None

    def place_ahead(self, slots: Any, keys: Any, staging: Any, memory: Any, rows: Any) -> Placed | None:
        self.begun_on.append(threading.current_thread().name)
        if self.fault:
            raise self.fault
        if len(self.begun_on) > self.allowed:
            return None
        groups = self._groups(slots, keys, staging, memory, rows)
        next(groups)
        return groups

    def _groups(self, slots: Any, keys: Any, staging: Any, memory: Any, rows: Any) -> Placed:
        try:
            yield []
            for index, copy in self.load_each(slots, keys, staging):
                if index % 2 or isinstance(copy, Refused):
                    yield [(index, copy)]
                else:
                    RAW.decode([copy], LAYOUT, out=memory, rows=[rows[index]])
                    yield [(index, len(copy))]
        finally:
            self.closed += 1


class Rig:
    def __init__(self) -> None:
        self.device, self.tier = DevicePool(LAYOUT, 16 * LAYOUT.page_bytes), Ahead()
        tiers = [self.device, self.tier]
        self.mover = Mover(tiers, WORKERS, 64 * LAYOUT.page_bytes, 1 << 30, lambda *_: None)
        for each in tiers:
            assert each.reserve(16) is not None
        assert self.tier.store(list(range(6)), [page(n) for n in range(6)], RAW.encode(pages_of(*range(6)), LAYOUT)) == [None] * 6

    def restore(self, *numbers: int) -> Transfer:
        moves = tuple(Move(number, page(number), number, number) for number in numbers)
        transfer = Transfer(1, 0, moves, Priority.DEMAND, len(moves) * LAYOUT.page_bytes)
        assert self.mover.submit(transfer)
        return transfer

    def scratch_at_rest(self) -> int:
        return self.mover.staging._idle[None].qsize()


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.mover.close()
    assert made.scratch_at_rest() == WORKERS
    assert kvtier_threads() == []


def whole(rig: Rig, *numbers: int) -> None:
    outcome = rig.restore(*numbers).future.result(10)
    assert outcome.refused == {}
    assert outcome.link_bytes == len(numbers) * LAYOUT.page_bytes
    assert torch.equal(rig.device.gather(list(numbers)), pages_of(*numbers))


def test_what_was_begun_on_the_loop_is_finished_by_a_worker(rig):
    for _ in range(2 * WORKERS):
        whole(rig, 0, 1, 2, 3, 4)
    assert rig.tier.begun_on == ["kvtier-mover"] * 2 * WORKERS
    assert rig.tier.closed == 2 * WORKERS


def test_law_1_what_does_not_verify_is_refused_and_the_others_come(rig):
    rig.tier._bytes[2][7] ^= 1
    outcome = rig.restore(1, 2, 3, 9).future.result(10)
    assert outcome.refused == {1: Refused("checksum"), 3: Refused("key")}
    assert outcome.lost == {1, 3}
    assert torch.equal(rig.device.gather([1, 3]), pages_of(1, 3))


def test_where_nothing_can_begin_ahead_workers_read(rig):
    rig.tier.allowed = 1
    for _ in range(3):
        whole(rig, 0, 1, 2)
    assert rig.tier.closed == 1


def test_a_tier_that_cannot_begin_for_a_fault_is_asked_again_by_the_worker(rig, caplog):
    rig.tier.fault = RuntimeError("boom")
    whole(rig, 0, 1, 2)
    assert "cannot begin ahead" in caplog.text
    rig.tier.fault = None
    whole(rig, 0, 1, 2)
    assert rig.tier.closed == 1


def test_a_worker_that_fails_ends_what_was_begun(rig, monkeypatch):
    whole(rig, 5)
    monkeypatch.setattr(type(rig.tier), "load_each", lambda *_: iter([(0, None)]))
    outcome = rig.restore(1).future.result(10)
    assert set(outcome.refused) == {0}
    assert rig.tier.closed == 2
    monkeypatch.undo()
    whole(rig, 1)


def test_what_no_worker_takes_any_more_is_ended(rig, monkeypatch):
    def no_more(*_: object) -> Callable[[], None]:
        raise Closed("the workers have ended")

    monkeypatch.setattr(rig.mover.workers, "submit", no_more)
    assert rig.restore(1, 2).future.result(10).cancelled
    assert rig.tier.closed == 1
    monkeypatch.undo()
    whole(rig, 1, 2)
