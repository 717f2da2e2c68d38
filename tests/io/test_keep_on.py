"""Laws checked: an engine's threads stay on the CPUs they are told to, and run anywhere where the system refuses; batches never fail."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvtier.io import native_pool
from kvtier.io.async_files import AsyncFilesEngine
from kvtier.io.buffered import BufferedEngine
from kvtier.io.files import BLOCK_BYTES, FileEngine, Request, page_aligned
from kvtier.io.probe import choose_engine

CPU = max(os.sched_getaffinity(0))


class PythonThreads(BufferedEngine):
    native = False


def affinities(engine: FileEngine, folder: Path) -> list[set[int]]:
    """Of the threads that a batch starts, once it is done."""
    before = set(os.listdir("/proc/self/task"))
    file = engine.open(folder / "file")
    try:
        requests = [Request(file, place * BLOCK_BYTES, page_aligned(BLOCK_BYTES)) for place in range(32)]
        assert engine.write_all(requests) == [None] * 32
        assert sorted(engine.read_each(requests)) == [(place, BLOCK_BYTES) for place in range(32)]
        return [os.sched_getaffinity(int(thread)) for thread in set(os.listdir("/proc/self/task")) - before]
    finally:
        engine.close(file)
        engine.stop()


@pytest.mark.parametrize("make", [BufferedEngine, PythonThreads, AsyncFilesEngine])
def test_threads_stay_on_their_cpus(make, tmp_path):
    engine = make(4)
    engine.keep_on([CPU])
    assert engine.cpus == (CPU,)
    assert {CPU} in affinities(engine, tmp_path)


@pytest.mark.parametrize("make", [BufferedEngine, PythonThreads, AsyncFilesEngine])
def test_cpus_that_are_not_there_cost_nothing_but_the_binding(make, tmp_path):
    engine = make(4)
    engine.keep_on([4095])
    found = affinities(engine, tmp_path)
    assert found
    assert all(each == os.sched_getaffinity(0) for each in found)


def test_the_chosen_engine_is_told(tmp_path):
    chosen = choose_engine(tmp_path, "buffered", 2, [CPU])
    assert chosen.engine.cpus == (CPU,)
    assert all(each == {CPU} for each in affinities(chosen.engine, tmp_path))
    assert choose_engine(tmp_path, "buffered").engine.cpus == ()


def test_what_is_no_cpu_is_refused():
    pool = native_pool.make(2, 1)
    if pool is None:
        pytest.skip(native_pool.why_missing())
    for wrong in ([-1], [1 << 20]):
        with pytest.raises(ValueError, match="there is no CPU"):
            pool.keep_on(wrong)
    with pytest.raises(TypeError):
        pool.keep_on(["0"])  # type: ignore[list-item]
    pool.keep_on([])
    pool.stop()
