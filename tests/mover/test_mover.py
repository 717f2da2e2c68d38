"""The mover: who goes first, what can be taken back, what is bounded, and that it survives whatever a tier does."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from kvtier.errors import Closed, ConfigError
from kvtier.formats import get_format
from kvtier.memory.limits import Room
from kvtier.mover import stage, staging
from kvtier.mover.mover import Mover
from kvtier.mover.staging import StagingPool
from kvtier.mover.transfer import Move, Outcome, Priority, Transfer, ended
from kvtier.tiers.base import PageId, Refused
from kvtier.tiers.device import DevicePool
from kvtier.tiers.host import HostTier
from tests.cache.rig import DEEP, LAYOUT, kv_of, kvtier_threads

DEVICE, HOST, LOWER = 0, 1, 2


def page(number: int) -> PageId:
    return PageId(bytes([number]) * 32, bytes(32), 0)


def pages_of(*numbers: int, layout=LAYOUT) -> torch.Tensor:
    """`[n, *layout.shape]`, each page with content of its own."""
    return torch.stack([kv_of([number] * layout.page_tokens, layout=layout) for number in numbers])


class SlowTier(HostTier):
    """A host tier whose `store` and `load` wait until `gate` is open, and that notes what it was asked."""

    def __init__(self, layout, name="host", slots=32):
        super().__init__(layout, get_format("raw"), slots * layout.page_bytes, mlock="off", pin="off")
        self.name = name
        self.gate = threading.Event()
        self.gate.set()
        self.reached = threading.Semaphore(0)
        self.asked: list[tuple[str, list[int]]] = []
        self.fails: Exception | None = None

    def store(self, slots, pages, payloads, digests=None):
        self._pass("store", slots)
        return super().store(slots, pages, payloads, digests)

    def load(self, slots, keys, staging):
        assert len(slots) <= len(staging)
        self._pass("load", slots)
        return super().load(slots, keys, staging)

    def _pass(self, what, slots):
        self.asked.append((what, list(slots)))
        self.reached.release()
        assert self.gate.wait(30)
        if self.fails:
            raise self.fails


class Rig:
    """A device, two slow tiers and a mover over them, without a cache."""

    def __init__(self, workers=1, staging_pages=64, queue_pages=64, layout=LAYOUT, lower_in_memory=True):
        self.layout = layout
        self.device = DevicePool(layout, 32 * layout.page_bytes)
        self.host = SlowTier(layout)
        self.lower = SlowTier(layout, "lower")
        self.lower.in_memory = lower_in_memory
        self.finished: list[tuple[Transfer, Outcome]] = []
        tiers = [self.device, self.host, self.lower]
        self.mover = Mover(tiers, workers, staging_pages * layout.page_bytes, queue_pages * layout.page_bytes, self.note)
        for tier in tiers:
            tier.reserve(32)

    def note(self, transfer, outcome):
        assert threading.current_thread().name == "kvtier-mover"
        assert not transfer.future.done(), "whoever waits must find the outcome already written down"
        self.finished.append((transfer, outcome))

    def fill_host(self, *numbers):
        """Page n in host slot n."""
        payloads = self.host.format.encode(pages_of(*numbers, layout=self.layout), self.layout)
        HostTier.store(self.host, list(numbers), [page(number) for number in numbers], payloads)

    def transfer(self, source, target, numbers, priority=Priority.DEMAND):
        moves = tuple(Move(number, page(number), number, number) for number in numbers)
        return Transfer(source, target, moves, priority, len(moves) * self.layout.page_bytes)

    def send(self, source, target, numbers, priority=Priority.DEMAND):
        transfer = self.transfer(source, target, numbers, priority)
        assert self.mover.submit(transfer)
        return transfer

    def block(self, *numbers):
        """Shut the host and occupy one worker with a restore of these pages."""
        self.host.gate.clear()
        transfer = self.send(HOST, DEVICE, numbers)
        assert self.host.reached.acquire(timeout=10)
        return transfer


@pytest.fixture
def make_rig() -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(*args, **more):
        rigs.append(Rig(*args, **more))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.host.gate.set()
        rig.lower.gate.set()
        rig.mover.close()
    assert kvtier_threads() == []


@pytest.fixture
def rig(make_rig):
    return make_rig()


def test_pages_go_down_across_and_up_unchanged(rig):
    rig.device.scatter([3, 4, 5], pages_of(3, 4, 5))
    assert rig.send(DEVICE, HOST, [3, 4, 5]).future.result(10).refused == {}
    across = rig.send(HOST, LOWER, [3, 4, 5]).future.result(10)
    assert (across.refused, across.link_bytes) == ({}, 3 * LAYOUT.page_bytes)
    rig.device.scatter([3, 4, 5], torch.zeros(3, *LAYOUT.shape))
    assert rig.send(LOWER, DEVICE, [5, 3, 4]).future.result(10).refused == {}
    assert torch.equal(rig.device.gather([3, 4, 5]), pages_of(3, 4, 5))


def test_demand_goes_before_prefetch_before_demotion_and_the_older_first(rig):
    rig.fill_host(*range(10))
    rig.device.scatter([20], pages_of(20))
    rig.block(0)
    order = [
        rig.send(DEVICE, HOST, [20], Priority.DEMOTION),
        rig.send(HOST, DEVICE, [1], Priority.PREFETCH),
        rig.send(HOST, LOWER, [2], Priority.DEMAND),
        rig.send(HOST, DEVICE, [3], Priority.PREFETCH),
        rig.send(HOST, DEVICE, [4], Priority.DEMAND),
    ]
    rig.host.gate.set()
    for transfer in order:
        transfer.future.result(10)
    assert [slots for _, slots in rig.host.asked] == [[0], [2], [4], [1], [3], [20]]


def test_urge_lets_a_queued_transfer_overtake_and_carries_it_once(rig):
    rig.fill_host(*range(10))
    rig.block(0)
    transfers = [rig.send(HOST, DEVICE, [number], Priority.PREFETCH) for number in (1, 2, 3)]
    for _ in range(2):
        rig.mover.urge(transfers[2])
    assert rig.mover.queued_bytes(HOST, DEVICE) == 3 * LAYOUT.page_bytes
    rig.host.gate.set()
    for transfer in transfers:
        transfer.future.result(10)
    assert [slots for _, slots in rig.host.asked] == [[0], [3], [1], [2]]
    rig.mover.urge(transfers[0])
    assert rig.mover.queued_bytes(HOST, DEVICE) == 0


def test_cancel_takes_out_what_is_queued_and_lets_run_what_runs(rig):
    rig.fill_host(0, 1, 2)
    running = rig.block(0)
    queued = rig.send(HOST, DEVICE, [1], Priority.PREFETCH)
    urged = rig.send(HOST, DEVICE, [2], Priority.PREFETCH)
    rig.mover.urge(urged)
    assert not rig.mover.cancel(running)
    assert not rig.mover.cancel(urged, only=Priority.PREFETCH), "somebody waits for it by now"
    assert rig.mover.cancel(queued, only=Priority.PREFETCH)
    assert not rig.mover.cancel(queued)
    assert queued.future.result(10) == Outcome(cancelled=True)
    rig.mover.urge(queued)
    rig.host.gate.set()
    assert running.future.result(10).refused == urged.future.result(10).refused == {}
    assert [slots for _, slots in rig.host.asked] == [[0], [2]]
    assert len(rig.finished) == 3


def test_a_full_queue_turns_away_what_can_wait_but_never_a_demand(make_rig):
    rig = make_rig(queue_pages=3)
    rig.fill_host(*range(10))
    rig.block(0)
    rig.send(HOST, DEVICE, [1, 2], Priority.PREFETCH)
    late = rig.transfer(HOST, DEVICE, [3, 4], Priority.PREFETCH)
    assert not rig.mover.submit(late)
    assert rig.mover.queued_bytes(HOST, DEVICE) == 2 * LAYOUT.page_bytes, "nothing of it was queued"
    rig.send(HOST, DEVICE, [5], Priority.PREFETCH)
    rig.send(HOST, LOWER, [6], Priority.DEMOTION)  # another link has a bound of its own
    demand = rig.send(HOST, DEVICE, [7, 8], Priority.DEMAND)
    rig.host.gate.set()
    assert demand.future.result(10).refused == {}
    deadline = time.monotonic() + 10
    while rig.mover.queued_bytes(HOST, DEVICE) and time.monotonic() < deadline:
        time.sleep(0.005)
    again = rig.send(HOST, DEVICE, [3, 4], Priority.PREFETCH)  # there is room again
    assert again.future.result(10).refused == {}


def test_what_was_turned_away_is_never_carried_whoever_urges_or_cancels_it(make_rig):
    rig = make_rig(queue_pages=1)
    rig.fill_host(*range(4))
    rig.block(0)
    rig.send(HOST, DEVICE, [1], Priority.PREFETCH)
    turned_away = rig.transfer(HOST, DEVICE, [2], Priority.PREFETCH)
    assert not rig.mover.submit(turned_away)
    rig.mover.urge(turned_away)
    assert not rig.mover.cancel(turned_away)
    last = rig.send(HOST, DEVICE, [3], Priority.DEMAND)
    rig.host.gate.set()
    assert not last.future.result(10).refused
    asked = [slot for what, slots in rig.host.asked for slot in slots if what == "load"]
    assert sorted(asked) == [0, 1, 3]
    assert turned_away not in [transfer for transfer, _ in rig.finished]
    assert turned_away.coming() == []


def test_what_is_urged_before_it_is_queued_comes_as_a_demand_and_cannot_be_taken_back_before(make_rig):
    rig = make_rig(queue_pages=1)
    rig.fill_host(*range(4))
    transfers = [rig.transfer(HOST, DEVICE, [number], Priority.PREFETCH) for number in range(4)]
    assert not rig.mover.cancel(transfers[3])
    rig.mover.urge(transfers[3])
    rig.block(0)
    for transfer in (transfers[1], transfers[3]):
        assert rig.mover.submit(transfer), "a demand is never turned away"
    assert not rig.mover.cancel(transfers[3], only=Priority.PREFETCH)
    rig.host.gate.set()
    assert all(transfer.future.result(10) for transfer in (transfers[1], transfers[3]))
    assert [transfer.moves[0].row for transfer, _ in rig.finished] == [0, 3, 1]


def test_a_transfer_larger_than_the_queue_is_taken_when_the_link_is_idle(make_rig):
    rig = make_rig(queue_pages=1)
    rig.fill_host(1, 2, 3)
    assert rig.send(HOST, LOWER, [1, 2, 3], Priority.DEMOTION).future.result(10).refused == {}


def test_scratch_memory_is_bounded_by_carrying_rounds(make_rig):
    rig = make_rig(workers=2, staging_pages=8)
    rig.fill_host(*range(10))
    assert rig.mover.staging.pages_per_round == 3, "one page of four is for decoded pages"
    assert rig.send(HOST, DEVICE, range(10)).future.result(10).refused == {}
    assert [len(slots) for _, slots in rig.host.asked] == [3, 3, 3, 1]
    assert rig.send(HOST, LOWER, range(10)).future.result(10).refused == {}
    assert max(len(slots) for _, slots in rig.lower.asked) == 1
    rig.lower.asked.clear()
    rig.lower.free(range(10))
    rig.lower.reserve(10)
    assert rig.send(DEVICE, LOWER, range(10)).future.result(10).refused == {}
    assert [len(slots) for _, slots in rig.lower.asked] == [1] * 10


def test_staging_has_room_for_one_page_however_small_it_is_and_says_when_it_is_too_large(rig):
    assert StagingPool(4, 1, rig.mover.tiers).pages_per_round == 1
    with pytest.raises(ConfigError, match="staging_bytes"):
        StagingPool(1, 2**61, rig.mover.tiers)


@pytest.mark.parametrize("fault", [RuntimeError("boom"), MemoryError(), ValueError("strange bytes")])
def test_a_worker_that_fails_refuses_the_transfer_and_works_on(rig, fault):
    rig.fill_host(1, 2)
    rig.host.fails = fault
    outcome = rig.send(HOST, DEVICE, [1, 2]).future.result(10)
    assert set(outcome.refused) == {0, 1}
    assert not outcome.lost, "the copies are not to blame"
    assert "internal" in outcome.refused[0].reason
    rig.host.fails = None
    assert rig.send(HOST, DEVICE, [1, 2]).future.result(10).refused == {}
    assert torch.equal(rig.device.gather([1, 2]), pages_of(1, 2))


def test_an_owner_that_raises_on_finished_leaves_nobody_waiting(rig):
    rig.fill_host(1, 2, 3)
    failing = [rig.transfer(HOST, DEVICE, [number]) for number in (1, 2, 3)]
    complaints: list[dict[str, object]] = []
    rig.mover.loop.set_exception_handler(lambda _, context: complaints.append(context))
    rig.mover._on_finished = lambda *_: 1 / 0
    for transfer in failing:
        rig.mover.submit(transfer)
    for transfer in failing:
        assert transfer.future.result(10).refused == {}
    assert len(complaints) == 3


def test_a_waiter_that_is_cancelled_takes_no_transfer_and_no_other_waiter_with_it(rig):
    rig.fill_host(0, 1)
    running = rig.block(0)
    behind = rig.send(HOST, DEVICE, [1])

    async def give_up():
        await asyncio.wait_for(running.ending(), 0.02)

    with pytest.raises(TimeoutError):
        rig.mover.spawn(give_up()).result(10)
    patient = rig.mover.spawn(ended([running]))
    rig.host.gate.set()
    patient.result(10)
    assert running.future.result(10).refused == {}
    assert behind.future.result(10).refused == {}, "the mover went on"


def test_copies_that_do_not_verify_are_refused_one_by_one(rig):
    rig.fill_host(1, 2, 3)
    rig.host._bytes[2][7] ^= 1
    outcome = rig.send(HOST, DEVICE, [1, 2, 3, 4]).future.result(10)
    assert outcome.refused == {1: Refused("checksum"), 3: Refused("key")}
    assert outcome.lost == {1, 3}
    assert torch.equal(rig.device.gather([1, 3]), pages_of(1, 3))
    across = rig.send(HOST, LOWER, [1, 2, 3]).future.result(10)
    assert across.lost == {1}
    assert across.link_bytes == 2 * LAYOUT.page_bytes


def test_layers_are_there_in_order_before_the_transfer_ends_and_refusals_before_the_first(monkeypatch, make_rig):
    at_once = 3
    monkeypatch.setattr(stage, "layers_per_step", lambda *_: at_once)
    rig = make_rig(layout=DEEP)
    rig.fill_host(1, 2, 3)
    rig.host._bytes[2][7] ^= 1
    steps = [threading.Event() for _ in range(0, DEEP.layers, at_once)]
    scatter = rig.device.scatter

    def stepwise(slots, pages, layers=slice(None)):
        assert steps[layers.start // at_once].wait(20)
        scatter(slots, pages, layers)

    monkeypatch.setattr(rig.device, "memory", lambda: None)
    monkeypatch.setattr(rig.device, "scatter", stepwise)
    transfer = rig.send(HOST, DEVICE, [1, 2, 3])
    wanted = pages_of(1, 3, layout=DEEP)
    assert not transfer.wait_layers(1, 0.05)
    for number, step in enumerate(steps):
        assert not transfer.future.done()
        step.set()
        layers = min((number + 1) * at_once, DEEP.layers)
        assert transfer.wait_layers(layers, 10)
        assert transfer.refused == {1: Refused("checksum")}
        assert transfer.coming() == [1, 3]
        assert torch.equal(rig.device.gather([1, 3])[:, :layers], wanted[:, :layers])
        assert layers == DEEP.layers or not transfer.wait_layers(layers + 1, 0.02)
    assert transfer.future.result(10).lost == {1}
    assert transfer.wait_layers(DEEP.layers + 1, 0), "the end wakes everybody"


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("reachable", [True, False])
def test_every_way_up_and_down_carries_the_same_bytes(monkeypatch, make_rig, in_memory, reachable):
    monkeypatch.setattr(HostTier, "in_memory", in_memory)
    rig = make_rig(layout=DEEP)
    if not reachable:
        monkeypatch.setattr(rig.device, "memory", lambda: None)
    wanted = pages_of(*range(7), layout=DEEP)
    rig.device.scatter(list(range(7)), wanted)
    rig.host.reserve(7)
    assert rig.send(DEVICE, HOST, range(7)).future.result(10).refused == {}
    rig.device.scatter(list(range(7)), torch.zeros_like(wanted))
    outcome = rig.send(HOST, DEVICE, range(7)).future.result(10)
    assert outcome.refused == {}
    assert outcome.link_bytes == 7 * DEEP.page_bytes
    assert torch.equal(rig.device.gather(list(range(7))), wanted)


def test_while_files_are_read_nothing_is_announced_before_every_page_is_verified(monkeypatch, make_rig):
    monkeypatch.setattr(HostTier, "in_memory", False)
    rig = make_rig(layout=DEEP)
    rig.fill_host(1, 2, 3)
    rig.host._bytes[3][7] ^= 1
    announced: list[tuple[int, dict[int, Refused]]] = []
    monkeypatch.setattr(Transfer, "placed", lambda self, layers: announced.append((layers, dict(self.refused))))
    assert rig.send(HOST, DEVICE, [1, 2, 3]).future.result(10).lost == {2}
    assert announced == [(DEEP.layers, {2: Refused("checksum")})]
    assert torch.equal(rig.device.gather([1, 2]), pages_of(1, 2, layout=DEEP))


def test_close_cancels_what_is_queued_lets_run_what_runs_and_leaves_no_thread(make_rig):
    rig = make_rig(workers=2)
    rig.fill_host(*range(10))
    running = [rig.block(0), rig.block(1)]
    queued = [rig.send(HOST, DEVICE, [number], priority) for number, priority in ((2, Priority.DEMAND), (3, Priority.PREFETCH))]
    rig.mover.urge(queued[1])
    closing = threading.Thread(target=rig.mover.close)
    closing.start()
    for transfer in queued:
        assert transfer.future.result(10) == Outcome(cancelled=True)
    assert not running[0].future.done()
    rig.host.gate.set()
    closing.join(10)
    assert not closing.is_alive()
    assert all(transfer.future.result(0).refused == {} for transfer in running)
    assert len(rig.finished) == 4
    assert kvtier_threads() == []
    with pytest.raises(Closed):
        rig.mover.submit(rig.transfer(HOST, DEVICE, [5]))
    with pytest.raises(Closed):
        rig.mover.spawn(asyncio.sleep(0))
    rig.mover.call(print)
    rig.mover.close()


def test_close_waits_for_jobs_that_start_other_jobs(make_rig):
    rig = make_rig()
    done: list[int] = []

    async def job(left):
        await asyncio.sleep(0.01)
        done.append(left)
        if left:
            rig.mover.spawn(job(left - 1))

    rig.mover.spawn(job(3))
    rig.mover.close()
    assert done == [3, 2, 1, 0]


def test_work_runs_beside_the_transfers(rig):
    assert rig.mover.spawn(rig.mover.work(lambda number: number + 1, 41)).result(10) == 42


def test_workers_use_one_torch_thread_and_leave_the_callers_number_alone(make_rig):
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        rig = make_rig(workers=3)
        assert torch.get_num_threads() == 3
        for _ in range(2):
            assert rig.mover.spawn(rig.mover.work(torch.get_num_threads)).result(10) == 1
    finally:
        torch.set_num_threads(usual)


def test_staging_beyond_what_can_be_had_is_refused_before_it_is_taken(rig, monkeypatch):
    page_bytes = LAYOUT.page_bytes
    monkeypatch.setattr(staging, "available_memory", lambda: Room(64 * page_bytes, "the container's limit is near"))
    monkeypatch.setattr(staging, "aligned_array", lambda size_bytes: pytest.fail("memory was asked for"))
    wanted = rf"mover\.staging_bytes is {100 * page_bytes}, .* only {64 * page_bytes} bytes .* the container's limit is near; lower it"
    with pytest.raises(ConfigError, match=wanted):
        StagingPool(2, 100 * page_bytes, rig.mover.tiers)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_in_memory_does_not_wait_for_files_that_are_stuck(make_rig, workers):
    rig = make_rig(workers, lower_in_memory=False)
    rig.device.scatter([3, 4, 5], pages_of(3, 4, 5))
    rig.fill_host(*range(10, 14))
    rig.lower.gate.clear()
    stuck = [rig.send(HOST, LOWER, [number], Priority.DEMOTION) for number in range(10, 10 + workers)]
    for _ in stuck:
        assert rig.lower.reached.acquire(timeout=10)
    queued = rig.send(HOST, LOWER, [13])
    for number in (3, 4, 5):
        assert rig.send(DEVICE, HOST, [number]).future.result(10).refused == {}
        assert rig.send(HOST, DEVICE, [number]).future.result(10).refused == {}
    assert not queued.started, "files are never read and written by more than the workers"
    assert rig.mover.utilisation == 1.0
    rig.lower.gate.set()
    for transfer in [*stuck, queued]:
        assert transfer.future.result(10).refused == {}


def test_the_spare_thread_rests_while_workers_carry_what_is_in_memory(make_rig):
    rig = make_rig(1, lower_in_memory=False)
    rig.fill_host(1, 2, 3)
    busy = rig.block(1)
    waiting = rig.send(HOST, DEVICE, [2])
    assert not rig.host.reached.acquire(timeout=0.2)
    assert not waiting.started
    rig.host.gate.set()
    assert busy.future.result(10).refused == waiting.future.result(10).refused == {}
