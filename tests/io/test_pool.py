"""The threads of the engines: bounded, fair, and never running on behind somebody's back."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from kvtier.io.files import Request
from kvtier.io.pool import RequestPool


def requests(count: int, file: int = 0) -> list[Request]:
    return [Request(file, offset, np.zeros(1, dtype=np.uint8)) for offset in range(count)]


@pytest.fixture
def pool():
    pool = RequestPool(3, "test")
    yield pool
    pool.stop()


def test_a_batch_runs_depth_requests_at_once_one_of_them_on_the_callers_thread(pool):
    ran_in: set[int] = set()
    running, most, lock, all_busy = 0, 0, threading.Lock(), threading.Barrier(3)

    def work(request: Request) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            ran_in.add(threading.get_ident())
        all_busy.wait(10)  # broken unless three run at once
        with lock:
            running -= 1
        return request.offset

    assert sorted(pool.each(work, requests(6), helping=True)) == [(i, i) for i in range(6)]
    assert most == 3
    assert len(ran_in) == 3
    assert threading.get_ident() in ran_in


def test_callers_of_several_batches_share_the_threads(pool):
    running, most, lock, all_busy = 0, 0, threading.Lock(), threading.Event()

    def work(request: Request) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            if running == 4:
                all_busy.set()
        assert all_busy.wait(10)
        with lock:
            running -= 1
        return request.offset

    callers = [threading.Thread(target=lambda: list(pool.each(work, requests(6), helping=True))) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert most == 4
    assert len(pool._threads) == 2


def test_a_small_batch_does_not_wait_for_the_end_of_a_large_one():
    """The callers are held back, so that the one thread does all the work."""
    pool = RequestPool(2, "test")
    order: list[int] = []
    callers: set[int] = set()
    both_wait, done = threading.Event(), threading.Event()

    def work(request: Request) -> int:
        if threading.get_ident() in callers:
            done.wait(10)
        else:
            both_wait.wait(10)
            order.append(request.file)
            if len(order) == 8:  # all but the first of each batch, which the callers took
                done.set()
        return 0

    def call(count: int, file: int) -> None:
        callers.add(threading.get_ident())
        list(pool.each(work, requests(count, file), helping=True))

    large = threading.Thread(target=call, args=(8, 1))
    small = threading.Thread(target=call, args=(2, 2))
    large.start()
    while not pool._batches or pool._batches[0].begun < 2:
        threading.Event().wait(0.001)
    small.start()
    while len(callers) < 2 or not any(batch.requests[0].file == 2 and batch.begun for batch in pool._batches):
        threading.Event().wait(0.001)
    both_wait.set()
    large.join(20)
    small.join(20)
    assert sorted(order) == [1] * 7 + [2]
    assert order.index(2) <= 2
    pool.stop()


def test_leaving_early_begins_nothing_more_and_waits_for_what_runs(pool):
    begun: list[int] = []
    gate, stuck = threading.Event(), threading.Semaphore(0)
    caller = threading.get_ident()

    def work(request: Request) -> int:
        begun.append(request.offset)
        if threading.get_ident() == caller:
            stuck.acquire()  # until both threads are busy
            stuck.acquire()
        else:
            stuck.release()
            gate.wait(10)
        return request.offset

    batch = pool.each(work, requests(50), helping=True)
    index, outcome = next(batch)
    assert index == outcome
    closing = threading.Thread(target=batch.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    gate.set()
    closing.join()
    assert sorted(begun) == [0, 1, 2]


def test_a_caller_who_is_busy_gets_depth_threads_and_none_of_the_work_but_at_depth_1(pool):
    here, all_busy = threading.get_ident(), threading.Barrier(3)

    def work(request: Request) -> int:
        all_busy.wait(10)  # broken unless three run at once
        return threading.get_ident()

    done = dict(pool.each(work, requests(6), helping=False))
    assert here not in done.values()
    assert len(set(done.values())) == 3
    alone = RequestPool(1, "test")
    assert sorted(alone.each(lambda request: threading.get_ident(), requests(3), helping=False)) == [(i, here) for i in range(3)]
    assert alone._threads == []


def test_what_the_work_raises_is_raised_where_the_batch_is_waited_for_and_the_pool_lives_on(pool):
    def work(request: Request) -> int:
        if request.offset == 2:
            raise MemoryError("none left")
        return request.offset

    with pytest.raises(MemoryError, match="none left"):
        list(pool.each(work, requests(9), helping=True))
    assert sorted(pool.each(lambda request: request.offset, requests(9), helping=True)) == [(i, i) for i in range(9)]


def test_at_depth_1_and_for_one_request_the_caller_does_it_all(pool):
    alone = RequestPool(1, "test")
    here = threading.get_ident()
    for few, count in ((pool, 1), (alone, 5)):
        assert sorted(few.each(lambda request: threading.get_ident(), requests(count), helping=True)) == [(i, here) for i in range(count)]
        assert list(few.each(lambda request: 0, [], helping=True)) == []
        assert few._threads == []
        assert not few._batches


@pytest.mark.parametrize("helping", [True, False])
@pytest.mark.parametrize("given", [0, 1])
def test_where_the_system_gives_no_more_threads_those_there_are_and_the_caller_do_the_work(monkeypatch, caplog, pool, given, helping):
    start, asked = threading.Thread.start, []

    def start_some(thread: threading.Thread) -> None:
        asked.append(thread)
        if len(asked) > given:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_some)
    done = dict(pool.each(lambda request: threading.get_ident(), requests(9), helping))
    assert sorted(done) == list(range(9))
    assert set(done.values()) <= {threading.get_ident(), *(thread.ident for thread in pool._threads)}
    assert len(pool._threads) == given
    assert "can't start new thread" in caplog.text
    monkeypatch.undo()
    assert len(dict(pool.each(lambda request: threading.get_ident(), requests(9), helping))) == 9
    assert len(pool._threads) == 3 - helping


def test_stop_lets_a_batch_finish(pool):
    batch = pool.each(lambda request: request.offset, requests(40), helping=True)
    found = [next(batch)]
    stopping = threading.Thread(target=pool.stop)
    stopping.start()
    found += batch
    stopping.join()
    assert sorted(found) == [(i, i) for i in range(40)]
