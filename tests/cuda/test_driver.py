"""The calls of libcuda, against a library that checks every argument: struct layouts, both forms of batch copies, memory that grows."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from kvtier.cuda import driver as module
from kvtier.cuda import nvidia
from kvtier.cuda.driver import Driver
from kvtier.errors import DeviceError
from kvtier.testing.accelerator import LateAccelerator

STEP = 64 << 10
STREAM = 0x77


@pytest.fixture(params=[13, 12, 0], ids=["cuda 13", "cuda 12.8", "no batches"])
def fake(request, tmp_path, monkeypatch):
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc, to build the library that stands for libcuda")
    library = tmp_path / "libcuda.so"
    source = Path(__file__).with_name("fake_driver.c")
    subprocess.run(["gcc", "-shared", "-fPIC", f"-DBATCH={request.param}", "-o", library, source], check=True)
    monkeypatch.setattr(module, "LIBRARY", str(library))
    module._library.cache_clear()
    yield ctypes.CDLL(str(library))
    module._library.cache_clear()


def counter(fake, name):
    return ctypes.c_int.in_dll(fake, name).value


def test_many_copies_are_one_call_where_the_driver_has_it(fake, request):
    batches = "no batches" not in request.node.name
    driver = Driver(3)
    assert driver.has_batch_copies == batches
    source, target = np.arange(256, dtype=np.uint8), np.zeros(256, np.uint8)
    rows, sizes = np.arange(0, 256, 32), np.full(8, 32, np.uint64)
    driver.copy(target.ctypes.data + rows, source.ctypes.data + rows[::-1].copy(), sizes, STREAM)
    assert np.array_equal(target.reshape(8, 32), source.reshape(8, 32)[::-1])
    assert (counter(fake, "batches"), counter(fake, "singles")) == ((1, 0) if batches else (0, 8))
    for legacy_default_stream in (0, 1):
        driver.copy(target.ctypes.data + rows, source.ctypes.data + rows, sizes, legacy_default_stream)
    assert np.array_equal(target, source)
    assert counter(fake, "singles") == (16 if batches else 24), "the legacy default stream takes no batches"
    target[:] = 0
    driver.copy(target.ctypes.data + rows[[0, 4]], source.ctypes.data + rows[[0, 4]], np.array([64, 16], np.uint64), STREAM)
    assert np.flatnonzero(target).tolist() == [*range(1, 64), *range(128, 144)], "each copy has a size of its own"


def test_copies_without_as_many_sources_as_targets_are_refused_before_anything_is_read(fake):
    memory = np.zeros(256, np.uint8)
    with pytest.raises(DeviceError, match="3 targets, 2 sources"):
        Driver(3).copy(memory.ctypes.data + np.arange(3) * 32, memory.ctypes.data + np.arange(2) * 32, np.full(3, 32, np.uint64), STREAM)
    assert (counter(fake, "batches"), counter(fake, "singles")) == (0, 0)


def test_streams_of_the_driver_are_different_ones(fake):
    driver = Driver(3)
    assert len({driver.new_stream() for _ in range(50)}) == 50


def test_a_thread_that_never_used_cuda_has_a_context_inside(fake):
    driver, failed = Driver(3), []
    source, target = np.arange(64, dtype=np.uint8), np.zeros(64, np.uint8)

    def copy():
        try:
            driver.copy(np.array([target.ctypes.data]), np.array([source.ctypes.data]), np.array([64], np.uint64), STREAM)
        except DeviceError as error:
            failed.append(error)

    thread = threading.Thread(target=copy)
    thread.start()
    thread.join()
    assert failed == []
    assert np.array_equal(target, source)


@pytest.fixture
def span_of(fake, monkeypatch):
    """Makes spans over the fake's memory, which is the CPU's."""

    def tensor_at(address, size_bytes, device):
        return torch.frombuffer((ctypes.c_ubyte * size_bytes).from_address(address), dtype=torch.uint8)

    monkeypatch.setattr(nvidia, "_tensor_at", tensor_at)
    monkeypatch.setattr(nvidia, "STEP_BYTES", 2 * STEP)
    return lambda *sizes: nvidia.NvidiaSpan(Driver(3), torch.device("cuda", 3), *sizes)


def test_a_span_grows_and_shrinks_behind_the_same_addresses(fake, span_of):
    span = span_of(3 * STEP, 100 * STEP)
    left = ctypes.c_uint64.in_dll(fake, "memory_left")
    assert (span.mapped_bytes, span.step_bytes, span.tensor.numel()) == (4 * STEP, 2 * STEP, 100 * STEP)
    span.tensor[: 4 * STEP] = 5
    span.resize(9 * STEP)
    span.tensor[4 * STEP : 10 * STEP] = 6
    assert span.tensor[::STEP][:10].tolist() == [5] * 4 + [6] * 6
    assert left.value == 54 * STEP
    span.resize(4 * STEP)
    assert left.value == 60 * STEP
    assert bool((span.tensor[: 4 * STEP] == 5).all())
    with pytest.raises(DeviceError, match="out of memory"):
        span.resize(80 * STEP)
    assert (span.mapped_bytes, left.value) == (4 * STEP, 60 * STEP), "what was taken before it failed is given back"
    with pytest.raises(DeviceError, match="can have 0 to"):
        span.resize(102 * STEP)
    for _ in range(2):
        span.close()
    assert left.value == 64 * STEP


def test_memory_is_another_devices_too_only_once_it_is_shared_with_it_and_then_what_it_grows_by(fake, span_of):
    granted = (ctypes.c_int * 3).in_dll(fake, "granted")
    span, peer, stranger = span_of(3 * STEP, 100 * STEP), nvidia.Nvidia.__new__(nvidia.Nvidia), LateAccelerator()
    peer.device = torch.device("cuda", 1)
    assert list(granted) == [2, 0, 0], "two steps, for their own device"
    span.share(peer)
    span.share(peer)
    assert list(granted) == [2, 2, 0]
    span.resize(5 * STEP)
    assert list(granted) == [3, 3, 0]
    with pytest.raises(DeviceError, match="cannot be shared with a stand-in, which is no CUDA device"):
        span.share(stranger)
    span.close()


def test_memory_that_cannot_be_made_accessible_is_given_back(fake, span_of):
    ctypes.c_int.in_dll(fake, "refuse_access").value = 1
    with pytest.raises(DeviceError, match="cuMemSetAccess failed with error 1: invalid argument"):
        span_of(STEP, STEP)
    assert counter(fake, "mappings") == 0
    assert ctypes.c_uint64.in_dll(fake, "memory_left").value == 64 * STEP


def test_calls_beside_a_capture_relax_this_threads_mode_and_put_it_back(fake):
    driver = Driver(3)
    assert fake.capture_mode() == 0
    with driver.relaxed():
        assert fake.capture_mode() == 2
    assert fake.capture_mode() == 0


def test_host_memory_is_registered_or_the_reason_is_told(fake):
    driver = Driver(3)
    assert driver.register(4096, 4096) is None
    assert "error 2: out of memory" in str(driver.register(4096, 2 << 20))
    driver.unregister(4096)
    assert counter(fake, "registered") == 0


def test_a_machine_without_driver_says_so(monkeypatch):
    monkeypatch.setattr(module, "LIBRARY", "libcuda-that-is-not-there.so")
    module._library.cache_clear()
    with pytest.raises(DeviceError, match="driver cannot be loaded"):
        Driver(0)
    module._library.cache_clear()
