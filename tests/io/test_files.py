"""The file engines: what is written is read, what is punched is gone, short calls and missing features are covered."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.io import files
from kvtier.io.files import BLOCK_BYTES, BufferedEngine, Bytes, FileEngine, page_aligned

ENGINES = [BufferedEngine]
BLOCKS = 16


@pytest.fixture(params=ENGINES, ids=lambda engine: engine.name)
def engine(request):
    return request.param()


@pytest.fixture
def file(engine, tmp_path):
    number = engine.open(tmp_path / "data")
    yield number
    engine.close(number)


def filled(blocks: int, seed: int = 0) -> Bytes:
    buffer = page_aligned(blocks * BLOCK_BYTES)
    buffer[:] = np.random.default_rng(seed).integers(1, 256, buffer.nbytes, dtype=np.uint8)
    return buffer


def contents(engine: FileEngine, file: int, blocks: int = BLOCKS) -> Bytes:
    buffer = page_aligned(blocks * BLOCK_BYTES)
    got = engine.pread_into(file, 0, buffer)
    return buffer[:got]


operations = st.lists(st.tuples(st.sampled_from(["write", "punch"]), st.integers(0, BLOCKS - 1), st.integers(1, 4)), max_size=12)


@pytest.mark.parametrize("make_engine", ENGINES, ids=lambda engine: engine.name)
@settings(max_examples=40, deadline=None)
@given(operations=operations)
def test_any_writes_and_punches_read_back_as_written(make_engine, operations, tmp_path_factory):
    engine = make_engine()
    path = tmp_path_factory.mktemp("files") / "data"
    file = engine.open(path)
    model = np.zeros(BLOCKS * BLOCK_BYTES, dtype=np.uint8)
    size = 0
    try:
        for seed, (kind, block, count) in enumerate(operations):
            start, end = block * BLOCK_BYTES, min(block + count, BLOCKS) * BLOCK_BYTES
            if kind == "write":
                data = filled((end - start) // BLOCK_BYTES, seed)
                engine.pwrite(file, start, data)
                model[start:end] = data
                size = max(size, end)
            else:
                assert engine.punch(file, start, end - start) is engine.can_punch(path.parent)
                model[start:end] = 0
        engine.sync(file)
        assert engine.size(file) == size
        np.testing.assert_array_equal(contents(engine, file), model[:size])
    finally:
        engine.close(file)


def test_reads_are_short_only_at_the_end_of_the_file(engine, file):
    engine.pwrite(file, 0, filled(2))
    buffer = page_aligned(4 * BLOCK_BYTES)
    assert engine.pread_into(file, BLOCK_BYTES, buffer) == BLOCK_BYTES
    assert engine.pread_into(file, 8 * BLOCK_BYTES, buffer) == 0


def test_punching_gives_the_disk_its_blocks_back(engine, file, tmp_path):
    if not engine.can_punch(tmp_path):
        pytest.skip("this file system cannot punch holes")
    engine.pwrite(file, 0, filled(64))
    engine.sync(file)
    before = os.stat(tmp_path / "data").st_blocks
    assert engine.punch(file, 0, 48 * BLOCK_BYTES) is True
    assert os.stat(tmp_path / "data").st_blocks <= before - 48 * BLOCK_BYTES // 512
    assert engine.size(file) == 64 * BLOCK_BYTES


def test_a_file_that_exists_is_kept(engine, tmp_path):
    first = engine.open(tmp_path / "data")
    engine.pwrite(first, 0, filled(1))
    engine.close(first)
    again = engine.open(tmp_path / "data")
    np.testing.assert_array_equal(contents(engine, again), filled(1))
    engine.close(again)


def test_probing_for_holes_leaves_nothing_behind(engine, tmp_path):
    engine.can_punch(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert engine.can_punch(tmp_path / "missing") is False


def test_page_aligned_memory_is_aligned():
    for size in (1, 4096, 12345):
        buffer = page_aligned(size)
        assert (buffer.nbytes, buffer.ctypes.data % BLOCK_BYTES) == (size, 0)
        assert buffer.flags.writeable


class TestBuffered:
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

    def test_without_holes_punching_zeroes_the_first_block(self, file, tmp_path, monkeypatch):
        def unsupported(*_):
            raise OSError(errno.EOPNOTSUPP, "no")

        monkeypatch.setattr(files, "_fallocate", unsupported)
        assert self.engine.can_punch(tmp_path) is False
        self.engine.pwrite(file, 0, filled(4))
        assert self.engine.punch(file, BLOCK_BYTES, 3 * BLOCK_BYTES) is False
        expected = filled(4)
        expected[BLOCK_BYTES : 2 * BLOCK_BYTES] = 0
        np.testing.assert_array_equal(contents(self.engine, file), expected)

    def test_a_file_system_that_pretends_to_punch_is_found_out(self, tmp_path, monkeypatch):
        monkeypatch.setattr(files, "_fallocate", lambda *_: None)
        assert self.engine.can_punch(tmp_path) is False

    def test_system_errors_carry_their_errno(self, file):
        with pytest.raises(OSError, match=r"\[Errno 22\]"):
            self.engine.punch(file, -BLOCK_BYTES, BLOCK_BYTES)
