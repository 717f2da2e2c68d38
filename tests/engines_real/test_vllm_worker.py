"""Laws checked of the connector's worker, without an engine: what it keeps, what it brings back, and that a reset reaches the disk."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvtier.config import load_config
from kvtier.cuda.surface import Event
from kvtier.engines.vllm.layouts import BlockPages, readings
from kvtier.engines.vllm.messages import LoadJob, StepPlan, StoreJob
from kvtier.engines.vllm.metrics import LEVELS
from kvtier.engines.vllm.scheduler import SchedulerSide
from kvtier.engines.vllm.settings import Settings
from kvtier.engines.vllm.worker import Keeping, WorkerSide
from kvtier.errors import DeviceError
from kvtier.io import probe
from kvtier.layout import PageLayout
from tests.tiers.faults import StuckEngine

LAYOUT = PageLayout(layers=2, planes=2, page_tokens=4, kv_heads=2, head_dim=32, dtype="fp32")
KEYS = [bytes([number]) * 32 for number in range(40)]
ROOT = bytes([255]) * 32


def settings(path: Path, workers: int = 1, disk_pages: int = 64, host_pages: int | None = 8) -> Settings:
    sizes = {"device": 16, "disk": 2 * disk_pages} | ({} if host_pages is None else {"host": host_pages})
    asked: dict[str, Any] = {f"{tier}.capacity_bytes": pages * LAYOUT.page_bytes for tier, pages in sizes.items()}
    asked |= {"disk.path": str(path), "device.place": "cpu", "disk.format": "raw", "disk.write_policy": "write_through"}
    asked |= {"host": None} if host_pages is None else {"host.format": "raw", "host.write_policy": "write_through"}
    return Settings(load_config(env={}, overrides=asked), LAYOUT, b"namespace", workers)


class Engine:
    """vLLM's blocks and a worker behind them."""

    def __init__(self, settings: Settings, rank: int = 0) -> None:
        self.worker = WorkerSide(settings, rank)
        self.tensors = [torch.zeros(40, LAYOUT.kv_heads, LAYOUT.page_tokens, 2 * LAYOUT.head_dim) for _ in range(LAYOUT.layers)]
        self.worker._blocks = BlockPages([readings(tensor, LAYOUT.head_dim)["K and V side by side"] for tensor in self.tensors])
        self.jobs = 0

    def store(self, first: int, count: int) -> None:
        """Blocks of these numbers, full of their numbers, are kept under the keys of these numbers, 4 a job."""
        for number in range(first, first + count):
            for tensor in self.tensors:
                tensor[number] = number
        for start in range(first, first + count, 4):
            numbers = list(range(start, min(start + 4, first + count)))
            job = StoreJob(self.jobs, [KEYS[each] for each in numbers], KEYS[start - 1] if start else ROOT, start, numbers)
            self.jobs += 1
            self.worker.start_stores(StepPlan(self.worker._generation, [job]))
        while self.worker.report()[0].stored or self.worker._keeping:
            self.worker.cache.settle()

    def load(self, count: int) -> int:
        """Pages that came, of the first `count`, into blocks that held nothing."""
        for tensor in self.tensors:
            tensor.zero_()
        self.worker.start_loads(StepPlan(self.worker._generation, loads=[LoadJob("request", KEYS[:count], list(range(count)), 60.0)]))
        loads: list[Any] = []
        while not loads:
            loads = self.worker.report()[0].loads
        came: int = loads[0].pages
        assert self.worker.unloaded_blocks() == set(range(came, count))
        assert all(bool((tensor[number] == number).all()) for tensor in self.tensors for number in range(came))
        return came


def test_a_store_that_is_full_keeps_what_it_has_room_for_and_brings_that_back(tmp_path):
    engine = Engine(settings(tmp_path, disk_pages=12))
    engine.store(0, 36)
    counts = engine.worker.taken_counts()
    assert counts is not None
    assert sum(counts.data["evicted_pages"].get(tier, 0) for tier in ("host", "disk")) > 0
    assert 0 < engine.load(36) < 36
    engine.worker.cache.check_integrity()
    engine.worker.close()


def test_how_full_the_tiers_are_is_told_when_it_is_asked(tmp_path):
    engine = Engine(settings(tmp_path), rank=0)
    engine.store(0, 4)
    counts = engine.worker.taken_counts()
    assert counts is not None
    assert LEVELS not in counts.data
    engine.worker.start_loads(StepPlan(0, levels=True))
    counts = engine.worker.taken_counts()
    assert counts is not None
    told = counts.data[LEVELS]["0"]
    stats = engine.worker.cache.stats()
    assert [told["tiers"][name]["used_slots"] for name in ("host", "disk")] == [4, 4]
    assert told["tiers"] == {name: {key: stats["tiers"][name][key] for key in told["tiers"][name]} for name in stats["tiers"]}
    assert told["links"]["device->host"] == {"queued_bytes": 0}
    assert engine.worker.taken_counts() is None, "once"
    engine.worker.close()


def test_what_was_told_to_be_stored_is_stored_when_the_engine_ends_at_once(tmp_path):
    engine, go_on = Engine(settings(tmp_path)), threading.Event()
    engine.worker._storer.submit(go_on.wait)
    for tensor in engine.tensors:
        tensor[:4] = torch.arange(4).reshape(4, 1, 1, 1)
    engine.worker.start_stores(StepPlan(0, [StoreJob(0, KEYS[:4], ROOT, 0, [0, 1, 2, 3])]))
    threading.Timer(0.2, go_on.set).start()
    engine.worker.close()
    engine = Engine(settings(tmp_path))
    assert engine.load(4) == 4
    engine.worker.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_reset_that_the_workers_never_hear_of_is_carried_out_at_the_next_start(tmp_path, workers):
    about = settings(tmp_path, workers)
    engines = [Engine(about, rank) for rank in range(workers)]
    for engine in engines:
        engine.store(0, 8)
    SchedulerSide(about, events=False).reset()
    for engine in engines:
        engine.worker.close()
    for rank in range(workers):
        engine = Engine(about, rank)
        assert not any(engine.worker.hello().report.masks.values())
        assert engine.load(8) == 0
        engine.store(0, 4)
        engine.worker.close()
        engine = Engine(about, rank)
        assert engine.load(8) == 4, "a reset is carried out once"
        engine.worker.close()


def test_what_is_kept_after_a_reset_stays(tmp_path):
    about = settings(tmp_path)
    engine, scheduler = Engine(about), SchedulerSide(about, events=False)
    engine.store(0, 8)
    scheduler.reset()
    engine.worker.before_step(StepPlan(1))
    engine.store(0, 4)
    engine.worker.close()
    engine = Engine(about)
    assert engine.load(8) == 4
    engine.worker.close()


@pytest.fixture
def stuck(monkeypatch):
    """The disks' file engines, the last one opened at the end: they stop reading and writing while their gate is closed."""
    engines: list[StuckEngine] = []

    def make(depth: int) -> StuckEngine:
        engines.append(StuckEngine())
        return engines[-1]

    monkeypatch.setitem(probe._CANDIDATES, "direct", (make,))
    yield engines
    engines[-1].gate.set()


def test_no_step_waits_for_a_disk_that_is_stuck(tmp_path, stuck):
    engine = Engine(settings(tmp_path, host_pages=None))
    stuck[-1].gate.clear()
    jobs = [StoreJob(number, KEYS[4 * number : 4 * number + 4], ROOT, 4 * number, [0, 1, 2, 3]) for number in range(8)]
    engine.worker.start_stores(StepPlan(0, jobs))
    assert stuck[-1].waiting.wait(60)
    with ThreadPoolExecutor(1) as thread:
        try:
            thread.submit(engine.worker.before_step, StepPlan(0, overwritten=[job.number for job in jobs])).result(60)
        finally:
            stuck[-1].gate.set()
    engine.worker.close()


def test_a_load_that_takes_too_long_is_given_up(tmp_path, stuck):
    engine = Engine(settings(tmp_path, host_pages=None))
    engine.store(0, 8)
    engine.worker.close()
    engine = Engine(settings(tmp_path, host_pages=None))
    stuck[-1].gate.clear()
    engine.worker.start_loads(StepPlan(0, loads=[LoadJob("request", KEYS[:8], list(range(8)), 0.1)]))
    loads: list[Any] = []
    while not loads:
        loads = engine.worker.report()[0].loads
    assert (loads[0].pages, loads[0].late) == (0, True)
    assert engine.worker.unloaded_blocks() == set(range(8))
    stuck[-1].gate.set()
    assert engine.load(8) == 8
    engine.worker.close()


def test_pages_in_memory_are_loaded_though_stores_and_loads_wait_for_a_disk_that_is_stuck(tmp_path, stuck):
    engine = Engine(settings(tmp_path))
    engine.store(0, 8)
    engine.worker.close()
    engine = Engine(settings(tmp_path, host_pages=12))
    stuck[-1].gate.clear()
    done: dict[str, int] = {}

    def job(first: int) -> StoreJob:
        return StoreJob(first, KEYS[first : first + 4], KEYS[first - 1], first, [0, 1, 2, 3])

    def load(name: str, pages: slice, within_s: float) -> int:
        job = LoadJob(name, KEYS[pages], list(range(20, 20 + len(KEYS[pages]))), within_s)
        engine.worker.start_loads(StepPlan(0, loads=[job]))
        while name not in done:
            done.update({each.request_id: each.pages for each in engine.worker.report()[0].loads})
        return done[name]

    engine.worker.start_stores(StepPlan(0, [job(8), job(12)]))
    masks: dict[bytes, int] = {}
    while not all(masks.get(key, 0) & 0b10 for key in KEYS[8:16]):
        masks |= engine.worker.report()[0].masks
    assert load("first", slice(8, 16), 60.0) == 8
    engine.worker.start_stores(StepPlan(0, [job(first) for first in range(16, 40, 4)]))
    while engine.worker._pages._asked_for_room is None or engine.worker._pages._asked_for_room.done():
        assert engine.worker._keeping
    assert load("disk", slice(8), 0.1) == 0
    assert load("memory", slice(8, 16), 60.0) == 8
    stuck[-1].gate.set()
    engine.worker.close()


def test_a_load_of_pages_in_memory_does_not_queue_behind_one_that_waits_for_a_disk(tmp_path, stuck):
    engine = Engine(settings(tmp_path))
    engine.store(0, 8)
    engine.worker.close()
    engine = Engine(settings(tmp_path, host_pages=16))
    engine.store(8, 8)
    stuck[-1].gate.clear()
    loads = [LoadJob("disk", KEYS[:8], list(range(20, 28)), 600.0), LoadJob("memory", KEYS[8:16], list(range(28, 36)), 60.0)]
    engine.worker.start_loads(StepPlan(0, loads=loads))
    done: dict[str, int] = {}
    while "memory" not in done:
        done.update({each.request_id: each.pages for each in engine.worker.report()[0].loads})
    assert done == {"memory": 8}
    stuck[-1].gate.set()
    while "disk" not in done:
        done.update({each.request_id: each.pages for each in engine.worker.report()[0].loads})
    assert done["disk"] == 8
    engine.worker.close()


def test_a_load_whose_pages_went_to_the_disk_before_its_turn_keeps_no_other_waiting(tmp_path, stuck):
    engine, go_on = Engine(settings(tmp_path, host_pages=16)), threading.Event()
    engine.store(0, 8)
    engine.worker.cache.settle()
    stuck[-1].gate.clear()
    engine.worker._near_loader.submit(go_on.wait)
    loads = [LoadJob("gone", KEYS[:4], list(range(20, 24)), 60.0), LoadJob("memory", KEYS[4:8], list(range(24, 28)), 60.0)]
    engine.worker.start_loads(StepPlan(0, loads=loads))
    residency = engine.worker.cache._residency
    with residency.lock:
        for tier in range(2):
            residency.eviction.clear(residency.table.rows_of(KEYS[:4]), tier)
    assert engine.worker._pages.any_far(KEYS[:4])
    go_on.set()
    done: dict[str, int] = {}
    while "memory" not in done:
        done.update({each.request_id: each.pages for each in engine.worker.report()[0].loads})
    assert done == {"memory": 4}
    stuck[-1].gate.set()
    while "gone" not in done:
        done.update({each.request_id: each.pages for each in engine.worker.report()[0].loads})
    assert done["gone"] == 4
    assert all(bool((tensor[20 + number] == number).all()) for tensor in engine.tensors for number in range(8))
    engine.worker.close()


def test_a_load_takes_as_long_as_it_took_not_until_the_next_report(tmp_path, monkeypatch):
    engine = Engine(settings(tmp_path))
    engine.store(0, 4)
    engine.worker.start_loads(StepPlan(0, loads=[LoadJob("request", KEYS[:4], [0, 1, 2, 3], 1000.0)]))
    wait([engine.worker._loads[0][1]])
    now_s = time.monotonic() + 5000  # a step that computed a long prompt meanwhile
    monkeypatch.setattr("kvtier.engines.vllm.worker.time", SimpleNamespace(monotonic=lambda: now_s, perf_counter=lambda: now_s))
    done = engine.worker.report()[0].loads[0]
    assert (done.pages, done.late) == (4, False)
    assert done.seconds < 1000
    monkeypatch.undo()
    engine.worker.close()


def test_a_store_that_fails_in_a_step_costs_its_pages_and_not_the_engine(tmp_path, monkeypatch):
    def fail(block: int, page: torch.Tensor) -> None:
        raise RuntimeError("no")

    engine, go_on = Engine(settings(tmp_path)), threading.Event()
    engine.worker._storer.submit(go_on.wait)
    engine.worker.start_stores(StepPlan(0, [StoreJob(0, KEYS[:4], ROOT, 0, [0, 1, 2, 3])]))
    monkeypatch.setattr(engine.worker._blocks, "read", fail)
    try:
        engine.worker.before_step(StepPlan(0, overwritten=[0]))
    finally:
        go_on.set()
    monkeypatch.undo()
    while not engine.worker.report()[0].stored:
        assert engine.worker._keeping
    assert engine.load(4) == 0
    engine.store(0, 4)
    assert engine.load(4) == 4
    engine.worker.close()


def test_a_step_does_not_wait_for_ever_for_a_store_whose_device_failed(tmp_path):
    class Failing(Event):
        def done(self) -> bool:
            return False

        def wait(self) -> None:
            raise DeviceError("the device is gone")

    engine = Engine(settings(tmp_path))
    keeping = Keeping(StoreJob(0, KEYS[:1], ROOT, 0, [0]), Failing())
    with pytest.raises(DeviceError, match="gone"):
        engine.worker._keep(keeping)
    assert keeping.copied.is_set()
    engine.worker.close()
