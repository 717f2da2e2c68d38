"""The disk benchmark at tiny sizes: every row is there and has a ceiling, nothing is left behind; the figures say nothing."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from benchmarks import disk
from benchmarks.measure import Run
from benchmarks.rig import plain_file
from kvtier.errors import KVTierError


@pytest.mark.parametrize("fio", [True, False])
def test_every_row_has_a_ceiling_and_nothing_is_left(tmp_path, monkeypatch, fio):
    if fio and not shutil.which("fio"):
        pytest.skip("fio is not installed")
    if not fio:
        monkeypatch.setattr(shutil, "which", lambda _: None)
    assert ("fio is not installed" in disk.ceiling_note()) is not fio
    rows = {row.name: row for row in disk.measure(Run(repeats=1, tiny=True), tmp_path)}
    cells = [f"{operation}.64KiB.qd{depth}" for operation in ("read", "write") for depth in (1, 4)]
    others = {"direct", "buffered", "aiofiles"} - {name.split(".")[1] for name in rows}
    assert len(others) <= 1, "all engines but the default one have rows of their own"
    for cell in cells:
        for name, unit in ((f"disk.{cell}", "GB/s"), (f"disk.cpu.{cell}", "us"), (f"disk.aiofiles.{cell}", "GB/s")):
            row = rows[name]
            assert row.unit == unit
            assert row.value > 0
            assert row.ceiling is not None
            assert row.ceiling > 0
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(KVTierError, match=r"--size-bytes \d+: .* has \d+ bytes free, of which \d+ are left to others; lower it"):
        disk.measure(Run(repeats=1), tmp_path, size_bytes=1 << 60)
    with pytest.raises(KVTierError, match="is not a directory"):
        disk.measure(Run(repeats=1, tiny=True), tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


def test_a_tiny_run_asks_for_no_more_room_than_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=disk.TINY_BYTES, total=1 << 30))
    assert disk.measure(Run(repeats=1, tiny=True), tmp_path)


def test_a_file_system_without_a_size_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0, total=0))  # ramfs says so
    assert disk.measure(Run(repeats=1, tiny=True), tmp_path)


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1])
def test_a_file_below_one_block_is_refused(tmp_path, size):
    with pytest.raises(KVTierError, match=f"--size-bytes {size}: the file holds blocks of up to 1048576 bytes; give at least that"):
        disk.measure(Run(repeats=1), tmp_path, size_bytes=size)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not shutil.which("fio"), reason="fio is not installed")
def test_a_colon_in_the_path_does_not_send_fio_to_another_file(tmp_path):
    other, folder = tmp_path / "model", tmp_path / "model:v1"
    folder.mkdir()
    other.write_text("somebody's")
    assert disk.measure(Run(repeats=1, tiny=True), folder)
    with plain_file(folder, 4096, 8) as file:
        assert file.fio_read()
    assert other.read_text() == "somebody's"
    assert list(folder.iterdir()) == []


def test_a_failing_fio_is_told_with_what_it_said(tmp_path, monkeypatch):
    fake = tmp_path / "bin" / "fio"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho 'fio: engine libaio not loadable' >&2; exit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.parent), prepend=":")
    with pytest.raises(KVTierError, match=r"fio failed: fio: engine libaio not loadable; without fio"):
        disk.measure(Run(repeats=1, tiny=True), tmp_path)


def test_a_terminated_benchmark_leaves_no_file_behind(tmp_path):
    command = [sys.executable, "-m", "kvtier", "bench", "disk", "--path", str(tmp_path), "--size-bytes", "16MiB"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as running:
        until = time.monotonic() + 60
        while not list(tmp_path.glob("*/blocks")):
            assert running.poll() is None
            assert time.monotonic() < until
            time.sleep(0.01)
        running.terminate()
        assert running.wait(60) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
