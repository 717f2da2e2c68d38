"""The suite every file engine must pass, ours or a third party's: subclass `FileEngineContract` and name it `Test...`.

    class TestMyEngine(FileEngineContract):
        def make_engine(self, depth):
            return MyEngine(depth)

Needs pytest and Hypothesis (`pip install kvtier[test]`).
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from abc import abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtier.errors import AlignmentError, Closed
from kvtier.io.files import BLOCK_BYTES, Bytes, FileEngine, Request, page_aligned

BLOCKS = 16
_step = st.tuples(st.sampled_from(["write", "punch", "allocate"]), st.integers(0, BLOCKS - 1), st.integers(1, 4))
# Every subclass is an executor of its own.
_few = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.differing_executors])


def filled(blocks: int, seed: int = 0) -> Bytes:
    """Page-aligned random bytes, none of them zero."""
    buffer = page_aligned(blocks * BLOCK_BYTES)
    buffer[:] = np.random.default_rng(seed).integers(1, 256, buffer.nbytes, dtype=np.uint8)
    return buffer


def contents(engine: FileEngine, file: int, blocks: int = BLOCKS) -> Bytes:
    """The first bytes of a file, up to its end."""
    buffer = page_aligned(blocks * BLOCK_BYTES)
    return buffer[: engine.pread_into(file, 0, buffer)]


def pieces(file: int, memory: Bytes, blocks: int = 1, start: int = 0) -> list[Request]:
    """`memory` as requests of `blocks` blocks each, side by side from byte `start` of the file."""
    step = blocks * BLOCK_BYTES
    return [Request(file, start + first, memory[first : first + step]) for first in range(0, memory.nbytes, step)]


def threads() -> set[str]:
    """The threads of this process, Python's and others, by number."""
    return set(os.listdir("/proc/self/task"))


class Told:
    """What an engine tells of requests that were read (`FileEngine.read_then`): what was read, and how many threads told at once.
    `pause_s`: how long it takes to be told."""

    def __init__(self, pause_s: float = 0.0) -> None:
        self.found: dict[int, tuple[int, bytes]] = {}
        self.twice: list[int] = []
        self.most_at_once = 0
        self._pause_s = pause_s
        self._now = 0
        self._lock = threading.Lock()
        kinds = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int64, ctypes.c_void_p)
        self._compiled = ctypes.CFUNCTYPE(None, *kinds)(self._called)

    def take(self, index: int, read: int, memory: Bytes, /) -> None:
        """Note it."""
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        time.sleep(self._pause_s)
        with self._lock:
            self.twice += [index] if index in self.found else []
            self.found[index] = read, memory[: max(0, read)].tobytes()
            self._now -= 1

    def function(self) -> tuple[int, int]:
        """The same for compiled code."""
        return ctypes.cast(self._compiled, ctypes.c_void_p).value or 0, id(self)

    def _called(self, context: int, index: int, read: int, address: int) -> None:
        assert context == id(self)
        self.take(index, read, np.frombuffer(ctypes.string_at(address, max(0, read)), np.uint8))


def ended(others: Collection[str]) -> bool:
    """Whether all threads but `others` end; those that were joined may take the system a moment longer."""
    end = time.monotonic() + 10
    while not (left := threads() <= set(others)) and time.monotonic() < end:
        time.sleep(0.001)
    return left


class FileEngineContract:
    """What is written is read, alone and in batches; what is punched is gone; nothing runs on after a batch or a `stop`."""

    @abstractmethod
    def make_engine(self, depth: int) -> FileEngine:
        """A new engine."""

    @contextmanager
    def opened(self, directory: Path, depth: int = 4) -> Iterator[tuple[FileEngine, int]]:
        """A new engine and a new file."""
        engine = self.make_engine(depth)
        file = engine.open(directory / "data")
        try:
            yield engine, file
        finally:
            engine.close(file)
            engine.stop()

    @_few
    @given(operations=st.lists(_step, max_size=12))
    def test_any_writes_and_punches_read_back_as_written(
        self, operations: Sequence[tuple[str, int, int]], tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        model = np.zeros(BLOCKS * BLOCK_BYTES, dtype=np.uint8)
        size = 0
        directory = tmp_path_factory.mktemp("files")
        with self.opened(directory) as (engine, file):
            for seed, (kind, block, count) in enumerate(operations):
                start, end = block * BLOCK_BYTES, min(block + count, BLOCKS) * BLOCK_BYTES
                if kind == "write":
                    data = filled((end - start) // BLOCK_BYTES, seed)
                    engine.pwrite(file, start, data)
                    model[start:end] = data
                    size = max(size, end)
                elif kind == "punch":
                    assert engine.punch(file, start, end - start) is engine.can_punch(directory)
                    model[start:end] = 0
                elif engine.allocate(file, start, end - start):
                    size = max(size, end)
            engine.sync(file)
            assert engine.size(file) == size
            np.testing.assert_array_equal(contents(engine, file), model[:size])

    @_few
    @given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=4), depth=st.integers(1, 9), data=st.data())
    def test_batches_of_any_size_are_carried_out_whole(
        self, counts: list[int], depth: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        with self.opened(tmp_path_factory.mktemp("files"), depth) as (engine, file):
            for seed, count in enumerate(counts):
                written, read = filled(max(1, count), seed), page_aligned(max(1, count) * BLOCK_BYTES)
                order = data.draw(st.permutations(range(count)))
                writes, reads = pieces(file, written), pieces(file, read)
                assert engine.write_all([writes[i] for i in order]) == [None] * count
                outcomes = list(engine.read_each([reads[i] for i in order]))
                assert sorted(outcomes) == [(i, BLOCK_BYTES) for i in range(count)]
                np.testing.assert_array_equal(read[: count * BLOCK_BYTES], written[: count * BLOCK_BYTES])
                read[:] = 0
                groups = list(engine.read_some([reads[i] for i in order]))
                assert all(groups)
                assert sorted(outcome for group in groups for outcome in group) == [(i, BLOCK_BYTES) for i in range(count)]
                np.testing.assert_array_equal(read[: count * BLOCK_BYTES], written[: count * BLOCK_BYTES])

    def test_batches_of_several_threads_do_not_meet(self, tmp_path: Path) -> None:
        with self.opened(tmp_path, depth=3) as (engine, file):
            wrong: list[int] = []

            def work(number: int) -> None:
                start = number * 32 * BLOCK_BYTES
                for turn in range(5):
                    written, read = filled(32, 10 * number + turn), page_aligned(32 * BLOCK_BYTES)
                    engine.write_all(pieces(file, written, 2, start))
                    for _ in engine.read_each(pieces(file, read, 1, start)):
                        pass
                    if not np.array_equal(read, written):
                        wrong.append(number)

            threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert wrong == []

    def test_reads_are_short_only_at_the_end_of_the_file(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as (engine, file):
            engine.pwrite(file, 0, filled(2))
            buffer = page_aligned(4 * BLOCK_BYTES)
            assert engine.pread_into(file, BLOCK_BYTES, buffer) == BLOCK_BYTES
            assert engine.pread_into(file, 8 * BLOCK_BYTES, buffer) == 0
            assert sorted(engine.read_each(pieces(file, buffer, 1, BLOCK_BYTES))) == [(0, BLOCK_BYTES), (1, 0), (2, 0), (3, 0)]
            os.truncate(tmp_path / "data", BLOCK_BYTES + 1000)
            assert engine.pread_into(file, 0, buffer) == BLOCK_BYTES + 1000
            assert list(engine.read_each([Request(file, 0, buffer)])) == [(0, BLOCK_BYTES + 1000)]

    def test_a_request_that_fails_says_why_and_does_not_stop_the_others(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as (engine, file):
            written, read = filled(4), page_aligned(4 * BLOCK_BYTES)
            nowhere = 1 << 20  # no file has this number
            writes, reads = pieces(file, written), pieces(file, read)
            results = engine.write_all([*writes, Request(nowhere, 0, written[:BLOCK_BYTES])])
            assert results[:4] == [None] * 4
            assert isinstance(results[4], OSError)
            outcomes = dict(engine.read_each([Request(nowhere, 0, read[:BLOCK_BYTES]), *reads[1:]]))
            assert isinstance(outcomes.pop(0), OSError)
            assert outcomes == dict.fromkeys(range(1, 4), BLOCK_BYTES)
            np.testing.assert_array_equal(read[BLOCK_BYTES:], written[BLOCK_BYTES:])

    @pytest.mark.parametrize("count", [0, 1, 2, 40])
    @pytest.mark.parametrize("depth", [1, 4])
    @pytest.mark.parametrize("at_once", [1, 2])
    def test_what_was_read_is_told_of_once_each_before_it_is_yielded(self, tmp_path: Path, count: int, depth: int, at_once: int) -> None:
        with self.opened(tmp_path, depth) as (engine, file):
            written, read = filled(max(1, count)), page_aligned(max(1, count) * BLOCK_BYTES)
            engine.write_all(pieces(file, written))
            told, reads = Told(0.001), pieces(file, read)[:count]
            for group in engine.read_then(reads, told, at_once):
                assert {index for index, _ in group} <= set(told.found)
            assert told.found == {i: (BLOCK_BYTES, written[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES].tobytes()) for i in range(count)}
            assert told.twice == []
            assert told.most_at_once <= at_once

    def test_a_read_that_fails_is_told_of_as_less_than_0_bytes_and_a_short_one_as_what_came(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as (engine, file):
            engine.pwrite(file, 0, filled(3))
            os.truncate(tmp_path / "data", 2 * BLOCK_BYTES + 100)
            read = page_aligned(4 * BLOCK_BYTES)
            told, reads = Told(), pieces(file, read)
            nowhere = 1 << 20  # no file has this number
            outcomes = dict(
                each for group in engine.read_then([reads[0], Request(nowhere, 0, reads[1].buffer), *reads[2:]], told, 2) for each in group
            )
            assert {index: got for index, (got, _) in told.found.items() if index != 1} == {0: BLOCK_BYTES, 2: 100, 3: 0}
            assert told.found[1][0] < 0
            assert isinstance(outcomes.pop(1), OSError)
            assert outcomes == {0: BLOCK_BYTES, 2: 100, 3: 0}
            assert told.found[2] == (100, read[2 * BLOCK_BYTES :][:100].tobytes())

    def test_after_a_batch_was_left_early_nobody_is_told_of_it(self, tmp_path: Path) -> None:
        with self.opened(tmp_path, depth=3) as (engine, file):
            engine.write_all(pieces(file, filled(64), 16))
            read = page_aligned(64 * BLOCK_BYTES)
            told = Told(0.001)
            batch = engine.read_then(pieces(file, read), told, 2)
            next(batch)
            batch.close()
            before = dict(told.found)
            list(engine.read_each(pieces(file, page_aligned(64 * BLOCK_BYTES))))
            assert told.found == before

    def test_after_a_batch_was_left_early_nobody_writes_into_its_buffers(self, tmp_path: Path) -> None:
        with self.opened(tmp_path, depth=3) as (engine, file):
            engine.write_all(pieces(file, filled(256), 16))
            read = page_aligned(256 * BLOCK_BYTES)
            for taken in range(4):
                batch = (engine.read_some if taken % 2 else engine.read_each)(pieces(file, read))
                for _ in range(taken):
                    next(batch, None)  # all may have ended at once
                batch.close()
                read[:] = 0
                list(engine.read_each(pieces(file, page_aligned(64 * BLOCK_BYTES))))
                assert not read.any()

    def test_stopping_ends_all_threads(self, tmp_path: Path) -> None:
        before = threads()
        with self.opened(tmp_path) as (engine, file):
            engine.write_all(pieces(file, filled(8)))
            list(engine.read_each(pieces(file, page_aligned(8 * BLOCK_BYTES))))
            assert 0 < len(threads() - before) <= engine.depth + 1
        engine.stop()
        assert ended(before)

    def test_batches_of_a_stopped_engine_raise_closed_and_begin_nothing(self, tmp_path: Path) -> None:
        engine = self.make_engine(3)
        file = engine.open(tmp_path / "data")
        engine.pwrite(file, 0, filled(4))
        engine.close(file)
        engine.stop()
        before, read = threads(), page_aligned(4 * BLOCK_BYTES)
        file = os.open(tmp_path / "data", os.O_RDWR)
        try:
            for count in (1, 4):
                with pytest.raises(Closed, match="stopped"):
                    engine.write_all(pieces(file, filled(4, 1))[:count])
                with pytest.raises(Closed, match="stopped"):
                    list(engine.read_each(pieces(file, read)[:count]))
        finally:
            os.close(file)
        assert threads() <= before
        assert not read.any()
        assert (tmp_path / "data").read_bytes() == filled(4).tobytes()
        engine.stop()

    def test_memory_that_no_system_call_can_take_is_refused_before_anything_is_done(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as (engine, file):
            engine.pwrite(file, 0, filled(4))
            odd = filled(8, 1)
            strided, square, fixed = odd[::2], odd.reshape(2, -1), odd.view()
            words: Any = odd.view(np.uint32)
            fixed.flags.writeable = False
            good = Request(file, 0, odd[:BLOCK_BYTES])
            for buffer in (strided, square, words, odd[::-1]):
                with pytest.raises(AlignmentError, match="1-D contiguous memory, of bytes; got"):
                    engine.pwrite(file, 0, buffer)
                with pytest.raises(AlignmentError, match="1-D contiguous memory, of bytes; got"):
                    engine.write_all([good, Request(file, 0, buffer)])
            for buffer in (strided, square, words, odd[::-1], fixed):
                with pytest.raises(AlignmentError, match="1-D contiguous, writable memory to fill, of bytes; got"):
                    engine.pread_into(file, 0, buffer)
                with pytest.raises(AlignmentError, match="1-D contiguous, writable memory to fill, of bytes; got"):
                    engine.read_each([good, Request(file, 0, buffer)])
            np.testing.assert_array_equal(contents(engine, file), filled(4))
            np.testing.assert_array_equal(odd, filled(8, 1))
            assert engine.write_all([Request(file, 0, fixed)]) == [None], "what is only read may be read-only"
            np.testing.assert_array_equal(contents(engine, file), odd)

    def test_what_is_not_aligned_is_refused_before_anything_is_done(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as (engine, file):
            if engine.alignment_bytes == 1:
                pytest.skip("this engine takes any alignment")
            engine.pwrite(file, 0, filled(4))
            odd = filled(4, 1)
            bad = [
                Request(file, 0, odd[1 : BLOCK_BYTES + 1]),
                Request(file, 0, odd[: BLOCK_BYTES - 8]),
                Request(file, engine.alignment_bytes // 2, odd[:BLOCK_BYTES]),
            ]
            good = Request(file, 0, odd[:BLOCK_BYTES])
            refusal = rf"multiples of {engine.alignment_bytes}; got .* at offset"
            for request in bad:
                with pytest.raises(AlignmentError, match=refusal):
                    engine.pwrite(request.file, request.offset, request.buffer)
                with pytest.raises(AlignmentError, match=refusal):
                    engine.pread_into(request.file, request.offset, request.buffer)
                with pytest.raises(AlignmentError, match=refusal):
                    engine.write_all([good, request])
                with pytest.raises(AlignmentError, match=refusal):
                    engine.read_each([good, request])
            np.testing.assert_array_equal(contents(engine, file), filled(4))
            np.testing.assert_array_equal(odd, filled(4, 1))

    def test_punching_gives_the_disk_its_blocks_back(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as (engine, file):
            if not engine.can_punch(tmp_path):
                pytest.skip("this file system cannot punch holes")
            engine.pwrite(file, 0, filled(64))
            engine.sync(file)
            before = os.stat(tmp_path / "data").st_blocks
            assert engine.punch(file, 0, 48 * BLOCK_BYTES) is True
            assert os.stat(tmp_path / "data").st_blocks <= before - 48 * BLOCK_BYTES // 512
            assert engine.size(file) == 64 * BLOCK_BYTES

    def test_allocated_blocks_are_there_and_read_as_zeros_or_as_before(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as (engine, file):
            engine.pwrite(file, 0, filled(1))
            if not engine.allocate(file, 0, 8 * BLOCK_BYTES):
                pytest.skip("this file system cannot allocate ahead")
            assert engine.size(file) == 8 * BLOCK_BYTES
            assert os.stat(tmp_path / "data").st_blocks * 512 >= 8 * BLOCK_BYTES
            found = contents(engine, file)
            np.testing.assert_array_equal(found[:BLOCK_BYTES], filled(1))
            assert not found[BLOCK_BYTES:].any()
            assert engine.allocate(file, 0, 1 << 62) is False

    def test_a_file_that_exists_is_kept(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as (engine, file):
            engine.write_all(pieces(file, filled(3)))
        with self.opened(tmp_path) as (engine, file):
            np.testing.assert_array_equal(contents(engine, file), filled(3))

    def test_probing_for_holes_leaves_nothing_behind(self, tmp_path: Path) -> None:
        engine = self.make_engine(1)
        engine.can_punch(tmp_path)
        assert list(tmp_path.iterdir()) == []
        assert engine.can_punch(tmp_path / "missing") is False
        engine.stop()
