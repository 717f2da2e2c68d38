"""Which engine a directory gets: what works there, what was asked for, or one clear error, and nothing left behind."""

from __future__ import annotations

import errno
import logging
import os
import threading
from pathlib import Path

import pytest

from kvtier.errors import ConfigError
from kvtier.io.direct import DirectEngine
from kvtier.io.pooled import PooledEngine
from kvtier.io.probe import choose_engine, existing_part
from tests.io.refusals import refuse_direct


@pytest.fixture
def without_direct(monkeypatch):
    refuse_direct(monkeypatch)


@pytest.fixture
def python_threads(monkeypatch):
    """Batches go through the methods that a test replaces."""
    monkeypatch.setattr(PooledEngine, "native", False)


@pytest.mark.parametrize("wanted", ["buffered", "aiofiles"])
def test_an_engine_asked_for_by_name_is_given(tmp_path, wanted):
    chosen = choose_engine(tmp_path, wanted, 3)
    assert (chosen.engine.name, chosen.engine.depth, chosen.instead) == (wanted, 3, "")
    assert list(tmp_path.iterdir()) == []
    chosen.engine.stop()


def test_auto_takes_direct_with_the_alignment_that_works(tmp_path):
    before = threading.active_count()
    chosen = choose_engine(tmp_path)
    if chosen.engine.name != "direct":
        pytest.skip(f"no O_DIRECT here: {chosen.instead}")
    assert threading.active_count() == before, "threads start when a batch needs them"
    assert chosen.engine.alignment_bytes in (512, 4096)
    assert chosen.instead == ""
    chosen.engine.stop()


@pytest.mark.usefixtures("python_threads")
def test_a_directory_that_needs_4096_gets_4096(tmp_path, monkeypatch):
    real = DirectEngine._pwrite

    def coarse(self, file, offset, data):
        if offset % 4096 or data.nbytes % 4096:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(self, file, offset, data)

    monkeypatch.setattr(DirectEngine, "_pwrite", coarse)
    chosen = choose_engine(tmp_path)
    if chosen.engine.name == "direct":
        assert chosen.engine.alignment_bytes == 4096
    chosen.engine.stop()


@pytest.mark.usefixtures("without_direct")
def test_auto_falls_back_to_buffered_and_says_so_once(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "kvtier.io"):
        chosen = choose_engine(tmp_path)
    assert chosen.engine.name == "buffered"
    assert "Invalid argument" in chosen.instead
    assert [record.message for record in caplog.records if "buffered I/O engine" in record.message] == [caplog.records[0].message]
    chosen.engine.stop()


@pytest.mark.usefixtures("without_direct")
def test_an_engine_asked_for_by_name_that_is_refused_is_an_error_and_leaves_nothing(tmp_path):
    before = threading.active_count()
    with pytest.raises(ConfigError, match=r"disk\.io_engine is direct, but .* refuses it: Invalid argument; use auto"):
        choose_engine(tmp_path, "direct")
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == before


@pytest.mark.usefixtures("python_threads")
def test_an_engine_whose_bytes_do_not_come_back_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(DirectEngine, "_pread", lambda self, file, offset, buffer: buffer.nbytes)
    chosen = choose_engine(tmp_path)
    assert chosen.engine.name == "buffered"
    chosen.engine.stop()


@pytest.mark.usefixtures("python_threads")
def test_a_full_disk_is_no_reason_to_refuse_an_engine(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(PooledEngine, "_pwrite", full)
    for wanted in ("buffered", "auto"):
        choose_engine(tmp_path, wanted).engine.stop()


def test_an_unusable_directory_or_name_is_a_config_error(tmp_path):
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "missing", Path("/proc")):
        with pytest.raises(ConfigError, match=r"disk\.path .* cannot be created or written"):
            choose_engine(directory)
    with pytest.raises(ConfigError, match=r"disk\.io_engine is 'floppy'; expected one of auto, direct"):
        choose_engine(tmp_path, "floppy")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"disk\.io_depth is 0"):
        choose_engine(tmp_path, "auto", 0)


def test_a_path_to_be_made_is_judged_by_what_exists_of_it(tmp_path):
    assert existing_part(tmp_path / "a" / "b") == tmp_path
    assert existing_part(tmp_path) == tmp_path
