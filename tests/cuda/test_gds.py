"""The way to kvikio: reads give bytes, short counts and OSErrors; whatever would make it read through host memory is named; its settings
are left as they were. Against a fake with kvikio's signatures, which are compared with the real ones where kvikio is installed."""

from __future__ import annotations

import atexit
import importlib
import inspect
import os
import sys

import pytest
import torch

from kvtier.cuda import gds
from kvtier.errors import DeviceError
from tests.cuda.kvikio import CompatMode, FakeKvikio

BLOCK = 4096


@pytest.fixture
def fake(monkeypatch):
    made = FakeKvikio()
    made.install(monkeypatch)
    monkeypatch.setattr(atexit, "register", lambda function: None)
    monkeypatch.delenv("CUFILE_ALLOW_COMPAT_MODE", raising=False)
    gds._open_driver.cache_clear()
    yield made
    gds._open_driver.cache_clear()


@pytest.fixture
def path(tmp_path):
    found = tmp_path / "segment"
    found.write_bytes(bytes(range(256)) * 40)  # 2.5 blocks
    return found


def test_reads_are_what_the_file_holds_and_short_where_it_ends(fake, path):
    file = gds.GdsReader(4).open(path)
    memory = torch.zeros(2 * BLOCK, dtype=torch.uint8)
    readings = [file.begin(BLOCK, memory[:BLOCK]), file.begin(2 * BLOCK, memory[BLOCK:])]
    assert [reading.finish() for reading in readings] == [BLOCK, BLOCK // 2]
    assert memory.numpy().tobytes()[: BLOCK + BLOCK // 2] == path.read_bytes()[BLOCK:]
    file.close()
    file.close()


def test_a_read_that_fails_is_an_os_error_without_kvikios_line_numbers(fake, path):
    file = gds.GdsReader(4).open(path)
    fake.read_error = "cuFile error at: /build/cpp/src/file_handle.cpp:80: Input/output error"
    with pytest.raises(OSError, match="Input/output error") as caught:
        file.begin(0, torch.zeros(BLOCK, dtype=torch.uint8)).finish()
    assert caught.value.strerror == "Input/output error"
    file.close()


def test_files_are_opened_for_cufile_or_not_at_all_and_the_process_keeps_its_settings(fake, path):
    reader = gds.GdsReader(4)
    fake.file_error = "cuFile error at: /build/cpp/src/compat_mode_manager.cpp:80: file system not supported"
    with pytest.raises(OSError, match="file system not supported"):
        reader.open(path)
    assert fake.values["compat_mode"] == CompatMode.AUTO


@pytest.mark.parametrize(("before", "depth", "threads"), [(1, 8, 8), (16, 8, 16)])
def test_kvikio_gets_threads_for_every_request_and_never_loses_any(fake, before, depth, threads):
    fake.values["num_threads"] = before
    gds.GdsReader(depth)
    assert fake.values["num_threads"] == threads


@pytest.mark.parametrize(("given", "seen"), [(None, "false"), ("true", "true")])
def test_cufile_is_asked_not_to_fall_back_unless_the_environment_says_otherwise(fake, monkeypatch, given, seen):
    if given:
        monkeypatch.setenv("CUFILE_ALLOW_COMPAT_MODE", given)
    gds.GdsReader(1)
    gds.GdsReader(1)
    assert fake.environment_at_open == [seen], "once for the process"
    assert fake.drivers_open == 1
    assert os.environ.get("CUFILE_ALLOW_COMPAT_MODE") == given


def test_it_says_who_reads_and_whether_cufile_may_still_fall_back(fake):
    assert gds.GdsReader(1).name == "kvikio 26.10.00, nvidia-fs 2.25"
    fake.allow_compat_mode = True
    assert "may read through host memory where it has to (allow_compat_mode)" in gds.GdsReader(1).name


def test_whatever_is_missing_is_named(fake, monkeypatch):
    fake.nvidia_fs = False
    with pytest.raises(DeviceError, match="the kernel module nvidia-fs is not loaded"):
        gds.GdsReader(1)
    gds._open_driver.cache_clear()
    fake.driver_error = (
        "KvikIO failure at: /build/cpp/src/shim/cufile.cpp:73: Unable to open GDS file driver: NVFS driver initialization error"
    )
    with pytest.raises(
        DeviceError, match="cannot be opened: Unable to open GDS file driver: NVFS driver initialization error; see cufile.log"
    ):
        gds.GdsReader(1)
    assert "CUFILE_ALLOW_COMPAT_MODE" not in os.environ
    fake.cufile, fake.values["compat_mode"] = False, CompatMode.OFF
    with pytest.raises(DeviceError, match=r"there is no libcufile\.so\.0, or /run/udev cannot be read"):
        gds.GdsReader(1)
    assert fake.values["compat_mode"] == CompatMode.OFF
    monkeypatch.setitem(sys.modules, "kvikio", None)
    with pytest.raises(DeviceError, match=r"kvikio is not installed .*pip install 'kvtier\[gds\]'"):
        gds.GdsReader(1)


def test_a_kvikio_that_does_not_load_is_told_in_one_line(fake, monkeypatch):
    def broken(name):
        raise RuntimeError("no libkvikio.so\nlooked in /usr/lib")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(DeviceError, match=r"^kvikio does not load: no libkvikio\.so$"):
        gds.GdsReader(1)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("kvikio", "CuFile.__init__"),
        ("kvikio", "CuFile.pread"),
        ("kvikio", "CuFile.close"),
        ("kvikio.defaults", "get"),
        ("kvikio.defaults", "set"),
        ("kvikio.defaults", "is_compat_mode_preferred"),
        ("kvikio.cufile_driver", "get"),
        ("kvikio.cufile_driver", "driver_open"),
        ("kvikio.cufile_driver", "driver_close"),
    ],
)
def test_the_fake_takes_what_the_real_one_takes(module, name):
    pytest.importorskip("kvikio", reason="kvikio is not installed: the fake is not compared with it")
    found = []
    for place in (importlib.import_module(module), FakeKvikio().modules[module]):
        thing: object = place
        for part in name.split("."):
            thing = getattr(thing, part)
        assert callable(thing)
        parameters = inspect.signature(thing).parameters.values()
        found.append([(each.name, each.kind, each.default) for each in parameters if each.name != "self"])
    assert found[0] == found[1]
