"""The accelerator over CUDA, where torch's part of CUDA is stood in for: whose streams it uses, what it waits for, what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from subprocess import CalledProcessError
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvtier.cuda import kernels
from kvtier.cuda.copies import RegisteredMemory
from kvtier.cuda.nvidia import Nvidia, NvidiaEvent, NvidiaStream
from kvtier.errors import DeviceError

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


class Driver:
    """Gives streams, and lets everything be."""

    maps_host_memory = False

    def __init__(self) -> None:
        self.made = 0
        self.copies: list[tuple[list[int], ...]] = []

    def new_stream(self) -> int:
        self.made += 1
        return self.made

    def register(self, address: int, size_bytes: int) -> str | None:
        return "no more" if size_bytes > 4096 else None

    def unregister(self, address: int) -> None:
        pass

    def copy(self, targets: Any, sources: Any, sizes: Any, stream: int) -> None:
        self.copies.append((targets.tolist(), sources.tolist(), sizes.tolist()))

    @contextmanager
    def relaxed(self) -> Iterator[None]:
        yield


@pytest.fixture
def gpu(monkeypatch):
    made: Any = Nvidia.__new__(Nvidia)
    made.device, made._driver, made._idle_streams, made._registered = FIRST, Driver(), [], RegisteredMemory()
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device: SimpleNamespace(cuda_stream=handle, device=device))
    return made


def test_side_streams_are_nobody_elses_however_many_there_are(gpu):
    streams = [gpu.new_stream() for _ in range(100)]
    assert len({stream.key for stream in streams}) == 100
    given_back = {stream.key for stream in streams[:10]}
    del streams[:10]
    assert {stream.key for stream in [gpu.new_stream() for _ in range(10)]} == given_back, "streams that nobody has any more are used again"
    assert gpu._driver.made == 100


def test_memory_is_given_out_only_when_what_was_launched_on_it_is_over(gpu, monkeypatch):
    waited = []
    gpu.device = torch.device("cpu")
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: waited.append(device), cuda_stream=0)
    )
    assert gpu.allocate(64).shape == (64,)
    assert waited == [gpu.device]


def test_what_torch_raises_after_a_sticky_error_is_a_device_error(gpu, monkeypatch):
    def fail(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ...")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    for ask in (gpu.memory, gpu.report):
        with pytest.raises(
            DeviceError, match="the GPU does not say what memory it has: CUDA error: an illegal memory access was encountered$"
        ):
            ask()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1, 2))
    monkeypatch.setattr(torch.cuda, "get_device_capability", fail)
    with pytest.raises(DeviceError, match="the GPU does not say what it is: CUDA error"):
        gpu.report()


@pytest.fixture
def capturing(monkeypatch):
    """The second device's current stream captures a graph, the first one's does not."""
    now = [FIRST]

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        now.append(chosen)
        yield
        now.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now[-1] == SECOND)
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking: SimpleNamespace(record=lambda stream: None, query=lambda: True))


@pytest.mark.parametrize("device", [FIRST, SECOND])
def test_a_capture_is_refused_on_the_device_where_it_is(capturing, device):
    driver: Any = Driver()
    made: Any = SimpleNamespace(cuda_stream=0, device=device, wait_event=lambda event: None)
    stream, event = NvidiaStream(driver, made, True, RegisteredMemory()), NvidiaEvent(driver, made)
    if device == FIRST:
        assert stream.record().done()
        stream.wait(event)
        return
    for call in (stream.record, lambda: stream.wait(event)):
        with pytest.raises(DeviceError, match="a CUDA graph is being captured"):
            call()


@pytest.mark.parametrize("fails", ["record", "query", "synchronize", "wait_event"])
def test_what_torch_says_of_work_that_failed_is_an_error_of_the_device(capturing, monkeypatch, fails):
    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")

    calls = {name: lambda *_: True for name in ("record", "query", "synchronize", "wait_event")} | {fails: fail}
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking: SimpleNamespace(**calls))
    driver: Any = Driver()
    made: Any = SimpleNamespace(cuda_stream=7, device=FIRST, **calls)
    stream = NvidiaStream(driver, made, False, RegisteredMemory())

    def all_of_them():
        event = stream.record()
        event.done()
        event.wait()
        stream.wait(event)

    with pytest.raises(DeviceError, match="^work on the GPU failed: CUDA error: an illegal memory access was encountered$"):
        all_of_them()


def addresses(*numbers: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(numbers, np.int64)


def test_neighbours_on_both_sides_are_one_copy_but_never_across_two_registrations(gpu):
    assert gpu.register(4096, 4096) is None
    assert gpu.register(8192, 4096) is None
    assert gpu.register(1 << 20, 8192) == "no more"
    gpu.new_stream().copy(addresses(90112, 91136, 92160, 95232, 96256), addresses(6144, 7168, 8192, 9216, 10240), 1024)
    assert gpu._driver.copies == [([90112, 92160, 95232], [6144, 8192, 9216], [2048, 1024, 2048])]
    gpu.unregister(8192)
    gpu.new_stream().copy(addresses(90112, 91136, 92160), addresses(6144, 7168, 8192), 1024)
    assert gpu._driver.copies[1:] == [([90112], [6144], [3072])]


def test_no_kernel_is_handed_host_memory_that_is_not_registered(gpu, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to hand anything to")
    from kvtier.cuda import copy_kernel

    launched: list[Any] = []
    monkeypatch.setattr(copy_kernel, "copy_all", lambda *arguments: launched.append(arguments))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    stream = gpu.new_stream()
    assert gpu.register(4096, 4096) is None
    for host in (0, 3072, 8176, 1 << 30):
        with pytest.raises(DeviceError, match="not registered is never handed to a kernel"):
            stream.copy_by_kernel(addresses(90112, 91136), addresses(4096, host), 2048, to_host=True)
    assert launched == []
    stream.copy_by_kernel(addresses(90112, 91136), addresses(4096, 6144), 2048, to_host=True)
    stream.copy_by_kernel(addresses(90112, 91136), addresses(4096, 6144), 2048, to_host=False)
    assert [[to.tolist(), of.tolist()] for to, of, *_ in launched] == [[[4096, 6144], [90112, 91136]], [[90112, 91136], [4096, 6144]]]
    gpu.unregister(4096)
    with pytest.raises(DeviceError, match="not registered"):
        stream.copy_by_kernel(addresses(90112), addresses(4096), 2048, to_host=True)


def test_a_gpu_without_kernels_that_copy_says_why(gpu):
    gpu.name = "a GPU"
    assert gpu.why_no_kernel_copies() == "kernels of a GPU find registered host memory at other addresses than the host"
    gpu._driver.maps_host_memory = True
    assert "they run on NVIDIA GPUs" in gpu.why_no_kernel_copies()


@pytest.mark.parametrize("current", [True, False])
@pytest.mark.parametrize("whose", ["torch", "triton", "compiler", "folder", "loader", "libcuda"])
def test_a_kernel_that_cannot_be_launched_is_an_error_of_the_device(monkeypatch, whose, current):
    error: Exception = RuntimeError("CUDA error: misaligned address\nmore")
    if whose != "torch":
        triton = pytest.importorskip("triton", reason="Triton is not installed")
        error = {
            "triton": triton.runtime.errors.PTXASError("too many registers"),
            "compiler": CalledProcessError(1, ["gcc", "main.c"]),
            "folder": PermissionError(13, "Permission denied", "/.triton"),
            "loader": ImportError("cuda_utils.so: failed to map segment"),
            "libcuda": AssertionError("libcuda.so cannot found!"),
        }[whose]
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    driver: Any = Driver()
    made: Any = SimpleNamespace(cuda_stream=7, device=FIRST)
    stream = NvidiaStream(driver, made, current, RegisteredMemory())

    def fail() -> torch.Tensor:
        raise error

    for call in (stream.run, stream.result):
        with pytest.raises(DeviceError, match="^a launch on the GPU failed: ") as caught:
            call(fail)
        assert str(caught.value).endswith((str(error).splitlines()[0], "too many registers"))


@pytest.mark.parametrize("error", [CalledProcessError(1, ["gcc", "main.c"]), None])
def test_whether_kernels_are_there_is_tried_and_what_is_missing_is_said(monkeypatch, error):
    pytest.importorskip("triton", reason="Triton is not installed: there is nothing to try")
    from kvtier.cuda import copy_kernel

    def copy_all(targets: Any, sources: Any, size_bytes: int, device: torch.device) -> None:
        assert (targets - sources).tolist() == [size_bytes]
        if error is not None:
            raise error

    monkeypatch.setattr(copy_kernel, "copy_all", copy_all)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "zeros", lambda size, dtype, device: torch.empty(size, dtype=dtype))
    said = kernels.why_missing.__wrapped__(FIRST)
    if error is None:
        assert said == ""
    else:
        assert "cannot launch a kernel on cuda:0: Command '['gcc', 'main.c']' returned non-zero exit status 1.; it needs a C comp" in said


def test_where_there_is_no_gpu_nobody_is_told_to_install_triton(monkeypatch):
    monkeypatch.setattr(kernels, "_triton_problem", lambda: "Triton is not installed; install kvtier[gpu]")
    said = kernels.why_missing.__wrapped__(torch.device("cpu"))
    assert said.startswith("they run on NVIDIA GPUs")
    assert "install" not in said
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "install kvtier[gpu]" in kernels.why_missing.__wrapped__(FIRST)
