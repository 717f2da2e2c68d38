"""The compiled threads: no more than asked for, none left behind. That they carry bytes right is the engines' contract."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest

from kvtier.io import native_pool
from kvtier.io.files import BLOCK_BYTES, Bytes, Request, page_aligned
from kvtier.testing.engines import Told, ended, filled, pieces, threads

pytestmark = pytest.mark.skipif(bool(native_pool.why_missing()), reason=f"the extension is {native_pool.why_missing()}")

WITHOUT = """
import sys, tempfile
sys.modules["kvtier.io._requests"] = None
from pathlib import Path
from kvtier.io import native_pool
from kvtier.io.buffered import BufferedEngine
from kvtier.testing.engines import filled, pieces
assert native_pool.make(2, 1) is None
assert "compiler" in native_pool.why_missing(), native_pool.why_missing()
with tempfile.TemporaryDirectory() as folder:
    engine = BufferedEngine(3)
    file = engine.open(Path(folder) / "data")
    assert engine.write_all(pieces(file, filled(8))) == [None] * 8
    assert sorted(engine.read_each(pieces(file, filled(8)))) == [(i, 4096) for i in range(8)]
    engine.close(file)
    engine.stop()
"""


@pytest.fixture
def file(tmp_path):
    number = os.open(tmp_path / "data", os.O_RDWR | os.O_CREAT)
    os.pwrite(number, filled(64).data, 0)
    yield number
    os.close(number)


@pytest.fixture
def pool():
    made = native_pool.make(3, 1)
    assert made is not None
    yield made
    made.stop()


def test_threads_start_when_needed_as_many_as_are_needed_and_end_with_the_pool(pool, file):
    others = threads()
    list(pool.each(pieces(file, page_aligned(BLOCK_BYTES)), False, False))
    assert threads() == others, "one request is carried by who asked for it"
    list(pool.each(pieces(file, page_aligned(2 * BLOCK_BYTES)), False, True))
    assert len(threads() - others) == 1, "two requests, one of them the caller's"
    list(pool.each(pieces(file, page_aligned(64 * BLOCK_BYTES)), False, False))
    assert len(threads() - others) == 3
    pool.stop()
    assert ended(others)
    assert sorted(pool.each(pieces(file, page_aligned(4 * BLOCK_BYTES)), False, False)) == [(i, BLOCK_BYTES) for i in range(4)]
    assert threads() <= others, "after the end, callers carry their own"


def test_at_depth_1_the_caller_does_it_all(file):
    alone, others = native_pool.make(1, 1), threads()
    assert alone is not None
    assert sorted(alone.each(pieces(file, page_aligned(9 * BLOCK_BYTES)), False, False)) == [(i, BLOCK_BYTES) for i in range(9)]
    assert threads() == others


def test_a_batch_keeps_its_memory_until_nobody_writes_there(pool, file):
    for taken in range(3):
        batch = pool.each([Request(file, 0, np.empty(64 * BLOCK_BYTES, np.uint8)) for _ in range(20)], False, False)
        for _ in range(taken):
            next(batch)
        del batch
        gc.collect()


def test_threads_that_may_tell_no_more_go_on_reading_and_all_is_told_at_the_end(pool, file):
    class Gated(Told):
        def take(self, index: int, read: int, memory: Bytes, /) -> None:
            entered.release()
            assert opened.wait(10)
            super().take(index, read, memory)

    memory, others = page_aligned(64 * BLOCK_BYTES), page_aligned(64 * BLOCK_BYTES)
    entered, opened = threading.Semaphore(0), threading.Event()
    told, groups = Gated(), []
    waiting = threading.Thread(target=lambda: groups.extend(pool.then(pieces(file, memory), told, 2)))
    waiting.start()
    try:
        for _ in range(2):
            assert entered.acquire(timeout=10)
        carried = sorted(pool.each(pieces(file, others), False, False))
        assert carried == [(i, BLOCK_BYTES) for i in range(64)], "the third thread reads"
        assert not entered.acquire(blocking=False)
        assert groups == [[]], "begun, and nothing ended"
    finally:
        opened.set()
    waiting.join()
    assert [sorted(group) for group in groups] == [[], [(i, BLOCK_BYTES) for i in range(64)]]
    assert sorted(told.found) == list(range(64))
    assert told.most_at_once == 2


def test_two_batches_tell_no_more_at_once_than_one(pool, file):
    memory = page_aligned(64 * BLOCK_BYTES)
    told = Told(0.001)
    callers = [threading.Thread(target=lambda: [*pool.then(pieces(file, memory)[:32], told, 2)]) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert sorted(told.found) == sorted(told.twice) == list(range(32))
    assert told.most_at_once == 2


def test_a_batch_that_was_left_waits_until_nobody_is_told_of_it(pool, file):
    memory = page_aligned(64 * BLOCK_BYTES)
    told = Told(0.002)
    batch = pool._threads.begin(pieces(file, memory), False, False, *told.function(), told, 1)
    while not told.found:
        time.sleep(0.001)
    batch.withdraw()
    before = len(told.found)
    time.sleep(0.05)
    assert len(told.found) == before


@pytest.mark.parametrize("then", [(0, 0, None, 1), (1, 0, None, 0), (1,), ("", 0, None, 1)])
def test_what_is_no_function_is_refused_and_nothing_is_begun(pool, file, then):
    memory = page_aligned(4 * BLOCK_BYTES)
    with pytest.raises((TypeError, ValueError)):
        pool._threads.begin(pieces(file, memory), False, False, *then)
    assert not memory.any()


def test_a_list_of_requests_may_change_while_it_is_looked_at(pool, file):
    memory = page_aligned(3 * BLOCK_BYTES)

    class Number:
        def __index__(self) -> int:
            requests.clear()
            return int(file)

    requests: list[Any] = pieces(file, memory)
    requests[1] = (Number(), *requests[1][1:])
    batch = pool._threads.begin(requests, False, False)
    found = []
    while ended_now := batch.ended():
        found += ended_now
    assert sorted(found) == [(i, BLOCK_BYTES) for i in range(3)]
    assert np.array_equal(memory, filled(64)[: 3 * BLOCK_BYTES])


def test_a_pool_that_is_forgotten_ends_its_threads(file):
    others, forgotten = threads(), native_pool.make(4, 1)
    assert forgotten is not None
    list(forgotten.each(pieces(file, page_aligned(16 * BLOCK_BYTES)), False, False))
    assert len(threads() - others) == 4
    del forgotten
    gc.collect()
    assert ended(others)


def test_stopping_while_batches_run_lets_them_finish(pool, file):
    found: list[list[tuple[int, int | OSError]]] = []
    callers = [
        threading.Thread(target=lambda: found.append(list(pool.each(pieces(file, page_aligned(64 * BLOCK_BYTES)), False, False))))
        for _ in range(4)
    ]
    for caller in callers:
        caller.start()
    pool.stop()
    for caller in callers:
        caller.join(20)
    assert [sorted(each) for each in found] == [[(i, BLOCK_BYTES) for i in range(64)]] * 4


@pytest.mark.parametrize(
    "request_", [(1, 2), (1, "x", bytearray(8)), (1, 0, b"read only"), (1, 0, np.zeros((4, 4), np.uint8)[:, :2]), [1, 0, bytearray(8)]]
)
def test_what_is_no_request_is_a_type_or_value_error_and_nothing_is_begun(pool, request_):
    others = threads()
    with pytest.raises((TypeError, ValueError, BufferError)):
        next(pool.each([request_, request_], False, False))
    assert threads() == others


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0), (-1, 4096)])
def test_impossible_pools_are_refused(sizes):
    with pytest.raises(ValueError, match="expected 1 or more"):
        native_pool.make(*sizes)


def test_without_the_extension_python_threads_do_the_work_and_the_reason_is_told():
    subprocess.run([sys.executable, "-c", WITHOUT], check=True)
