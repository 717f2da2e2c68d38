"""The file engines: each passes the contract, what one wrote the others read, and short or failing system calls are covered."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from itertools import permutations

import numpy as np
import pytest

from kvtier.io import async_files, holes
from kvtier.io.async_files import AsyncFilesEngine
from kvtier.io.buffered import BufferedEngine
from kvtier.io.direct import DirectEngine
from kvtier.io.files import BLOCK_BYTES, Request, page_aligned
from kvtier.testing.engines import FileEngineContract, contents, filled, pieces

ENGINES = (BufferedEngine, DirectEngine, AsyncFilesEngine)


class TestBuffered(FileEngineContract):
    def make_engine(self, depth):
        return BufferedEngine(depth)


class PythonThreads(BufferedEngine):
    native = False


class TestBufferedOnPythonThreads(FileEngineContract):
    def make_engine(self, depth):
        return PythonThreads(depth)


class TestAsyncFiles(FileEngineContract):
    def make_engine(self, depth):
        return AsyncFilesEngine(depth)


def test_aiofiles_begins_nothing_more_once_a_batch_was_left(tmp_path, monkeypatch):
    begun, gate = [], threading.Event()
    read = async_files._read

    async def gated(handle, request):
        begun.append(request.offset)
        while request.offset and not gate.is_set():
            await asyncio.sleep(0.001)
        return await read(handle, request)

    monkeypatch.setattr(async_files, "_read", gated)
    engine = AsyncFilesEngine(2)
    file = engine.open(tmp_path / "data")
    batch = engine.read_each(pieces(file, page_aligned(50 * BLOCK_BYTES)))
    assert next(batch) == (0, 0)
    leaving = threading.Thread(target=batch.close)
    leaving.start()
    leaving.join(0.1)
    assert leaving.is_alive()
    gate.set()
    leaving.join(20)
    assert len(begun) <= 3
    engine.close(file)
    engine.stop()


@pytest.fixture
def refuse_without_direct(tmp_path):
    try:
        os.close(os.open(tmp_path, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"no O_DIRECT here: {error}")


@pytest.mark.usefixtures("refuse_without_direct")
class TestDirect(FileEngineContract):
    def make_engine(self, depth):
        return DirectEngine(depth)


@pytest.mark.usefixtures("refuse_without_direct")
@pytest.mark.parametrize(("writer", "reader"), list(permutations(ENGINES, 2)), ids=lambda engine: engine.name)
def test_what_one_engine_wrote_another_reads(tmp_path, writer, reader):
    one, other = writer(2), reader(2)
    ours, theirs = one.open(tmp_path / "data"), other.open(tmp_path / "data")
    for turn in range(3):
        assert one.write_all(pieces(ours, filled(8, turn), 2)) == [None] * 4
        np.testing.assert_array_equal(contents(other, theirs), filled(8, turn))
        other.pwrite(theirs, 0, filled(1, 9))
        np.testing.assert_array_equal(contents(one, ours)[:BLOCK_BYTES], filled(1, 9))
    for engine, file in ((one, ours), (other, theirs)):
        engine.close(file)
        engine.stop()


@pytest.mark.parametrize("engine", [BufferedEngine(2), AsyncFilesEngine(2)], ids=lambda engine: engine.name)
def test_engines_without_alignment_take_any_piece_of_memory(tmp_path, engine):
    file = engine.open(tmp_path / "data")
    memory = filled(3)[1:10_000]
    assert engine.write_all([Request(file, 7, memory[:5000]), Request(file, 5007, memory[5000:])]) == [None, None]
    back = np.zeros(9999, dtype=np.uint8)
    assert sorted(engine.read_each([Request(file, 7, back[:3]), Request(file, 10, back[3:])])) == [(0, 3), (1, 9996)]
    np.testing.assert_array_equal(back, memory)
    engine.close(file)
    engine.stop()


class TestSystemCalls:
    """What the system may do in between; through the buffered engine, whose calls are those of the direct one."""

    engine = BufferedEngine()

    @pytest.fixture
    def file(self, tmp_path):
        number = self.engine.open(tmp_path / "data")
        yield number
        self.engine.close(number)

    def test_short_writes_and_reads_are_continued(self, file, monkeypatch):
        pwrite, preadv = os.pwrite, os.preadv
        monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:1000], offset))
        monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:777]], offset))
        self.engine.pwrite(file, BLOCK_BYTES, filled(3))
        np.testing.assert_array_equal(contents(self.engine, file)[BLOCK_BYTES:], filled(3))

    def test_a_write_that_makes_no_progress_is_an_error_not_a_loop(self, file, monkeypatch):
        monkeypatch.setattr(os, "pwrite", lambda *_: 0)
        with pytest.raises(OSError, match="wrote nothing") as caught:
            self.engine.pwrite(file, 0, filled(1))
        assert caught.value.errno == errno.EIO

    @pytest.mark.parametrize("code", sorted(holes.UNSUPPORTED))
    def test_without_holes_punching_zeroes_the_first_block(self, file, tmp_path, monkeypatch, code):
        def unsupported(*_):
            raise OSError(code, "no")

        monkeypatch.setattr(holes, "_fallocate", unsupported)
        assert self.engine.can_punch(tmp_path) is False
        assert self.engine.allocate(file, 0, BLOCK_BYTES) is False
        self.engine.pwrite(file, 0, filled(4))
        assert self.engine.punch(file, BLOCK_BYTES, 3 * BLOCK_BYTES) is False
        expected = filled(4)
        expected[BLOCK_BYTES : 2 * BLOCK_BYTES] = 0
        np.testing.assert_array_equal(contents(self.engine, file), expected)

    def test_a_file_system_that_pretends_to_punch_is_found_out(self, tmp_path, monkeypatch):
        monkeypatch.setattr(holes, "_fallocate", lambda *_: None)
        assert self.engine.can_punch(tmp_path) is False

    def test_system_errors_carry_their_errno(self, file):
        with pytest.raises(OSError, match=r"\[Errno 22\]"):
            self.engine.pread_into(file, -BLOCK_BYTES, page_aligned(BLOCK_BYTES))
