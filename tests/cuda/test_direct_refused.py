"""Direct reads into a GPU that were asked for by name and cannot be: one clear error says which part is missing, and nothing is left."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from kvtier.errors import ConfigError
from kvtier.testing.accelerator import LateAccelerator
from kvtier.testing.direct import LateReading
from tests.cache.rig import make_cache
from tests.cuda.rig import direct_cache, on_gpu


def refused(monkeypatch: pytest.MonkeyPatch, path: Path, **more: Any) -> str:
    """What a cache that cannot be opened says; nothing of it is left."""
    with pytest.raises(ConfigError, match=r"disk\.io_engine is gds, but ") as caught:
        direct_cache(monkeypatch, path, **more)
    assert not path.exists() or not list(path.iterdir())
    return str(caught.value)


def test_without_a_gpu_there_is_one_clear_error(tmp_path):
    with pytest.raises(ConfigError, match=r"disk\.io_engine is gds, but the device tier is not in a GPU's memory.*use auto"):
        make_cache(tmp_path / "store", host_pages=None, disk__io_engine="gds", disk__format="raw")
    assert not (tmp_path / "store").exists()


def test_whatever_part_is_missing_is_named(monkeypatch, tmp_path):
    def without_reader(**gpu: Any) -> LateAccelerator:
        made = on_gpu(monkeypatch, **gpu)
        made.files.missing = "kvikio is not installed"
        return made

    monkeypatch.setattr("tests.cuda.rig.on_gpu", lambda _, **gpu: without_reader(**gpu))
    assert "kvikio is not installed; use auto" in refused(monkeypatch, tmp_path / "store")


def test_a_directory_whose_bytes_do_not_come_back_is_refused(monkeypatch, tmp_path):
    finish = LateReading.finish

    def wrong(reading):
        got = finish(reading)
        reading.memory[100] ^= 1
        return got

    monkeypatch.setattr(LateReading, "finish", wrong)
    assert "does not come back through a stand-in; use auto" in refused(monkeypatch, tmp_path / "store")

    def broken(reading):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(LateReading, "finish", broken)
    assert f"{tmp_path} refuses it: Operation not supported" in refused(monkeypatch, tmp_path / "store")
    assert not list(tmp_path.glob(".kvtier*"))


@pytest.mark.parametrize("name", ["q8+zstd", "raw+lz4"])
def test_formats_that_only_the_host_can_unpack_are_refused(monkeypatch, tmp_path, name):
    assert f"disk.format is {name}" in refused(monkeypatch, tmp_path / "store", disk__format=name)


def test_where_a_gpu_cannot_digest_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("kvtier.tiers.disk.direct.why_no_checksums", lambda device: "Triton is not installed")
    assert "could not be verified on the GPU: Triton is not installed" in refused(monkeypatch, tmp_path / "store")
