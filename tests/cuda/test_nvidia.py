"""The accelerator over CUDA, where torch's part of CUDA is stood in for: whose streams it uses, what it waits for, what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvtier.cuda.nvidia import Nvidia, NvidiaEvent, NvidiaStream
from kvtier.errors import DeviceError

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


class Driver:
    """Gives streams, and lets everything be."""

    def __init__(self) -> None:
        self.made = 0

    def new_stream(self) -> int:
        self.made += 1
        return self.made

    @contextmanager
    def relaxed(self) -> Iterator[None]:
        yield


@pytest.fixture
def gpu(monkeypatch):
    made: Any = Nvidia.__new__(Nvidia)
    made.device, made._driver, made._idle_streams = FIRST, Driver(), []
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
    stream, event = NvidiaStream(driver, made, current=True), NvidiaEvent(driver, made)
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
    stream = NvidiaStream(driver, made, current=False)

    def all_of_them():
        event = stream.record()
        event.done()
        event.wait()
        stream.wait(event)

    with pytest.raises(DeviceError, match="^work on the GPU failed: CUDA error: an illegal memory access was encountered$"):
        all_of_them()
