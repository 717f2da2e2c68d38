"""Laws checked: in a forked child, where threads are not, nothing hangs: what has threads says so, its end leaves all to the parent, a new
one works, and the parent goes on as if nothing had been."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtier.errors import StoreLocked
from kvtier.io import native_pool
from kvtier.io.async_files import AsyncFilesEngine
from kvtier.io.buffered import BufferedEngine
from kvtier.io.files import BLOCK_BYTES, Request, page_aligned
from kvtier.io.native_pool import NativePool
from kvtier.io.pool import RequestPool
from kvtier.numa.binding import this_machine
from kvtier.numa.executor import NodeExecutor, usable_nodes
from kvtier.testing.engines import filled, pieces
from kvtier.testing.tiers import page_id, payload
from kvtier.tiers.disk.directory import read_description
from tests.blocks.rig import get, keys, open_store
from tests.blocks.rig import put as put_blocks
from tests.cache.rig import assert_right, hold, make_cache, put, run, tiers_of
from tests.children import in_child
from tests.tiers.disk import open_disk, recovered

pytestmark = pytest.mark.timeout(240)
ROOT = Path(__file__).parent.parent


@pytest.fixture
def file(tmp_path):
    number = os.open(tmp_path / "data", os.O_RDWR | os.O_CREAT)
    os.pwrite(number, filled(16).data, 0)
    yield number
    os.close(number)


@contextmanager
def held(lock: AbstractContextManager[Any]) -> Iterator[None]:
    """A lock in the hands of another thread, which a child has not."""
    taken, enough = threading.Event(), threading.Event()

    def hold_it() -> None:
        with lock:
            taken.set()
            enough.wait(120)

    holder = threading.Thread(target=hold_it)
    holder.start()
    assert taken.wait(20)
    try:
        yield
    finally:
        enough.set()
        holder.join()


class Pool:
    """A pool of storage threads, compiled or Python's, that reads."""

    def __init__(self, native: bool, file: int) -> None:
        self.pool: NativePool | RequestPool | None = native_pool.make(3, 1) if native else RequestPool(3, "test")
        self._requests = pieces(file, page_aligned(16 * BLOCK_BYTES))

    def read(self) -> Iterator[tuple[int, int | OSError]]:
        if isinstance(self.pool, NativePool):
            return self.pool.each(self._requests, False, False)
        assert self.pool is not None
        return self.pool.each(lambda request: os.preadv(request.file, [request.buffer.data], request.offset), self._requests, False)

    def stop(self) -> None:
        assert self.pool is not None
        self.pool.stop()

    def forget(self) -> None:
        """Let the pool go; without threads its end must not wait for them."""
        self.pool = None
        gc.collect()


KINDS = [
    pytest.param(True, id="compiled", marks=pytest.mark.skipif(bool(native_pool.why_missing()), reason="the extension is not built")),
    pytest.param(False, id="python"),
]
ALL_READ = [(index, BLOCK_BYTES) for index in range(16)]


@pytest.mark.parametrize("native", KINDS)
def test_a_pool_of_threads_refuses_batches_in_a_child_and_goes_on_in_the_parent(native, file):
    pool = Pool(native, file)
    assert sorted(pool.read()) == ALL_READ, "its threads run"
    said = in_child(lambda: list(pool.read()))
    assert said.startswith(f"Closed: this pool of storage threads was made in process {os.getpid()}"), said
    assert "make a new one" in said
    assert in_child(pool.stop) == "None"
    assert in_child(pool.forget) == "None"
    assert sorted(pool.read()) == ALL_READ
    pool.stop()


class Blocked:
    """Compiled code that threads are in until `opened`."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Semaphore(0), threading.Event()
        self._compiled = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int64)(self._called)

    def function(self) -> tuple[int, int]:
        return ctypes.cast(self._compiled, ctypes.c_void_p).value or 0, id(self)

    def _called(self, context: int, index: int, read: int) -> bool:
        self.entered.release()
        return self.opened.wait(120)


@pytest.mark.skipif(bool(native_pool.why_missing()), reason="the extension is not built")
def test_a_batch_that_compiled_threads_are_at_ends_in_the_child_and_goes_on_in_the_parent(file):
    pool, blocked = native_pool.make(3, 1), Blocked()
    assert pool is not None
    batch = pool.then(pieces(file, page_aligned(16 * BLOCK_BYTES)), blocked, 2)  # type: ignore[arg-type]
    assert next(batch) == []
    try:
        assert blocked.entered.acquire(timeout=20)
        check_in_children(batch)
    finally:
        blocked.opened.set()
    assert sorted(each for group in batch for each in group) == ALL_READ
    pool.stop()


def test_a_batch_that_threads_are_at_ends_in_the_child_and_goes_on_in_the_parent(file):
    pool, opened = RequestPool(3, "test"), threading.Event()

    def work(request: Request) -> int:
        assert request.offset == 0 or opened.wait(120)
        return request.buffer.nbytes

    batch = pool.each(work, pieces(file, page_aligned(16 * BLOCK_BYTES)), False)
    first = next(batch)
    try:
        check_in_children(batch)
    finally:
        opened.set()
    assert sorted([first, *batch]) == ALL_READ
    pool.stop()


def check_in_children(batch: Generator[object, None, None]) -> None:
    """That nobody waits there for a batch whose threads are not there, nor for its end."""
    assert in_child(lambda: list(batch)).startswith("Closed: this pool")
    assert in_child(batch.close) == "None"


def test_a_lock_that_a_thread_held_at_the_fork_keeps_no_child_waiting(file):
    pool = RequestPool(3, "test")
    requests = [Request(file, 0, np.zeros(BLOCK_BYTES, np.uint8)) for _ in range(4)]

    def read() -> list[tuple[int, int | OSError]]:
        return list(pool.each(lambda request: request.buffer.nbytes, requests, False))

    assert len(read()) == 4
    with held(pool._wake):
        assert in_child(read).startswith("Closed: this pool")
        assert in_child(pool.stop) == "None"
    pool.stop()


@pytest.mark.parametrize("make", [BufferedEngine, AsyncFilesEngine])
def test_an_engine_refuses_batches_in_a_child(make, tmp_path):
    engine, memory = make(3), page_aligned(16 * BLOCK_BYTES)
    file = engine.open(tmp_path / "data")
    assert engine.write_all(pieces(file, filled(16))) == [None] * 16
    assert sorted(engine.read_each(pieces(file, memory))) == ALL_READ
    for work in (lambda: list(engine.read_each(pieces(file, memory))), lambda: engine.write_all(pieces(file, memory))):
        assert in_child(work).startswith("Closed: this ")
    assert in_child(lambda: (engine.close(file), engine.stop())) == "(None, None)"
    batch = engine.read_each(pieces(file, memory))
    first = next(batch)
    assert in_child(lambda: list(batch)).startswith("Closed: this ")
    assert in_child(batch.close) == "None"
    assert sorted([first, *batch]) == ALL_READ
    engine.close(file)
    engine.stop()


def test_an_executor_takes_no_work_in_a_child():
    with NodeExecutor({usable_nodes(this_machine())[0]: 2}) as executor:
        assert executor.submit(0, os.getpid).result(20) == os.getpid()
        with held(executor._lock):
            assert in_child(lambda: executor.submit(0, os.getpid).result()).startswith("Closed: this executor")
            assert in_child(executor.shutdown) == "None"
        assert executor.submit(0, os.getpid).result(20) == os.getpid()


def test_a_cache_says_in_a_child_that_it_stayed_behind_and_its_end_there_leaves_all_to_the_parent(tmp_path):
    tokens = run(1, 6)
    with make_cache(tmp_path / "d", device_pages=8, host_pages=8) as cache:
        put(cache, tokens)
        lease, match = hold(cache, tokens), cache.lookup(tokens)
        hint = cache.prefetch(run(9, 2))
        works: list[Callable[[], object]] = [
            lambda: cache.lookup(tokens),
            lambda: put(cache, run(2, 2)),
            lambda: cache.acquire(match),
            cache.stats,
            cache.flush,
            cache.settle,
            lambda: cache.prefetch(tokens),
            hint.wait,
            hint.cancel,
            lease.wait,
            lambda: lease.layer(0),
            lambda: lease.block_table,
            lambda: cache.fork(lease),
        ]
        with held(cache._residency.lock):
            said = [in_child(work) for work in works]
            moved = in_child(lambda: cache._residency.mover.queued_bytes(0, 1))
            ends = [in_child(end) for end in (lease.release, cache.close, lambda: cache.__exit__())]
        assert not [each for each in said if not each.startswith(f"Closed: this cache was made in process {os.getpid()}, from which")]
        assert moved.startswith("Closed: this mover"), "for those who ask it without the lock of the cache"
        assert ends == ["None"] * 3
        assert_right(lease, tokens)
        lease.release()
        put(cache, run(2, 6))
        cache.settle(20)
        cache.check_integrity()
    with make_cache(tmp_path / "d", device_pages=8, host_pages=8) as cache:
        assert tiers_of(cache, tokens) == [{2}] * 6, "the child took nothing from the store"
        with hold(cache, tokens) as lease:
            assert_right(lease, tokens)


def test_a_child_that_forks_inside_a_lease_and_ends_in_order_is_no_concern_of_the_parent(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from typing import Any
from tests.cache.rig import assert_right, hold, make_cache, put, run
with make_cache(Path(sys.argv[1]), device_pages=4) as cache:
    put(cache, run(1, 4))
    with hold(cache, run(1, 4)) as lease:
        child = os.fork()
        if not child:
            signal.alarm(60)
            sys.exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert_right(lease, run(1, 4))
    assert put(cache, run(2, 4)) == 16
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "d"], cwd=ROOT, check=True)
    with make_cache(tmp_path / "d") as cache:
        assert tiers_of(cache, run(1, 4)) == [{2}] * 4


def test_a_child_may_make_a_cache_of_its_own(tmp_path):
    tokens = run(1, 4)

    def use() -> str:
        with make_cache(tmp_path / "child", device_pages=4, host_pages=8) as own:
            put(own, tokens)
            put(own, run(2, 4))
            with hold(own, tokens) as lease:
                assert_right(lease, tokens)
                return f"{lease.tokens} tokens"

    with make_cache(tmp_path / "parent") as cache:
        put(cache, tokens)
        assert in_child(use) == f"{len(tokens)} tokens"


def test_the_end_of_a_disk_tier_in_a_child_leaves_the_store_locked_and_in_use(tmp_path):
    tier = open_disk(tmp_path / "d")
    slots = tier.reserve(2)
    assert slots is not None
    with held(tier._calls._quiet):
        assert in_child(lambda: tier.reserve(1)) == "None"
        assert in_child(lambda: tier.store(slots[:1], [page_id(0)], [payload(tier, 0)])) == "[Refused(reason='closed')]"
        assert in_child(tier.close) == "None"
    assert not read_description(tmp_path / "d").clean  # type: ignore[union-attr]
    with pytest.raises(StoreLocked):
        open_disk(tmp_path / "d")
    assert tier.store(slots, [page_id(0), page_id(1)], [payload(tier, 0), payload(tier, 1)]) == [None, None]
    tier.close()
    tier = open_disk(tmp_path / "d")
    assert sorted(recovered(tier)) == [0, 1]
    tier.close()


def test_a_block_store_says_in_a_child_that_it_stayed_behind(tmp_path):
    with open_store(tmp_path) as store:
        assert put_blocks(store, 1, 2) == [True, True]
        with held(store._lock):
            assert in_child(lambda: store.lookup(keys(1))).startswith("Closed: this store was made in process")
            assert in_child(lambda: get(store, 1)).startswith("Closed: this store")
            assert in_child(store.close) == "None"
        assert put_blocks(store, 3) == [True]
        assert get(store, 1, 2, 3) == [True] * 3
