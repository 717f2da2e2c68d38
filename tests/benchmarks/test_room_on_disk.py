"""Benchmarks that open a cache with a disk tier say that its directory has no room before they write anything there."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections import namedtuple
from collections.abc import Callable

import pytest

from benchmarks import disk, links, load, no_reuse, pricing, rig, tiers
from benchmarks.measure import Row, Run
from kvtier.cache import TieredKVCache
from kvtier.errors import KVTierError
from kvtier.io.pooled import PooledEngine

PROGRAMS: dict[str, Callable[..., list[Row]]] = {
    "links": links.measure,
    "tiers": tiers.measure,
    "load": load.measure,
    "no-reuse": no_reuse.measure,
    "pricing": pricing.measure,
}
Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_room_is_said_before_anything_is_written(tmp_path, monkeypatch, name):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(6 << 20, (6 << 20) - 4096, 4096))
    monkeypatch.setattr(tempfile, "TemporaryDirectory", lambda **_: pytest.fail("a directory was made"))
    with pytest.raises(KVTierError, match=rf"--path {tmp_path}: 4096 bytes are free there, but up to \d+ are needed; name another"):
        PROGRAMS[name](Run(repeats=1, tiny=True), path=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [*PROGRAMS, "disk"])
def test_a_directory_that_cannot_be_written_is_one_clear_error(tmp_path, monkeypatch, name):
    def refuse(**_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(KVTierError, match=rf"--path {tmp_path}: nothing can be written there: Permission denied; name another"):
        (PROGRAMS | {"disk": disk.measure})[name](Run(repeats=1, tiny=True), path=tmp_path)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_becomes_full_while_measuring_is_one_clear_error(tmp_path, monkeypatch, error):
    def full(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(PooledEngine, "pwrite", full)
    with pytest.raises(KVTierError, match=rf"--path {tmp_path} does not hold what is measured: {os.strerror(error)}"):
        disk.measure(Run(repeats=1, tiny=True), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_no_more_is_written_than_room_was_asked_for(tmp_path, monkeypatch, name):
    asked, written = [], []

    def measuring(close):
        def measure_and_close(*given, **options):
            written.append(sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()))
            close(*given, **options)

        return measure_and_close

    for program in (rig, links, load, pricing, tiers):
        monkeypatch.setattr(program, "check_room", lambda _, needed: asked.append(needed))
    for kind in (TieredKVCache, rig.PlainFile):
        monkeypatch.setattr(kind, "close", measuring(kind.close))
    PROGRAMS[name](Run(repeats=1, tiny=True), path=tmp_path)
    assert 0 < max(written) <= asked[0] == max(asked)
