"""The accelerator that is an NVIDIA GPU: torch's streams and events, and the driver for what torch does not offer.

Side streams do not wait for the default stream, and are the driver's: torch's own come from 32 that it hands out in turn, so that a lane's
could be the one an engine captures its graphs on. Events put the waiting thread to sleep instead of letting it spin: a spinning worker
would take a core from the engine.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from kvtier.cuda.direct import DirectReader
from kvtier.cuda.driver import Driver
from kvtier.cuda.gds import GdsReader
from kvtier.cuda.surface import Accelerator, Addresses, Event, Span, Stream
from kvtier.errors import DeviceError

STEP_BYTES = 64 << 20
"""By how much a span grows: large enough that a pool of 100 GB is not many calls, small enough to follow what an engine needs."""


class NvidiaEvent(Event):
    """A CUDA event, recorded."""

    def __init__(self, driver: Driver, stream: torch.cuda.Stream) -> None:
        self._driver = driver
        self.event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        with _failures():
            self.event.record(stream)

    def done(self) -> bool:
        with _failures(), self._driver.relaxed():
            return bool(self.event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        with _failures(), self._driver.relaxed():
            self.event.synchronize()


class NvidiaStream(Stream):
    """A CUDA stream. `current`: it is the calling thread's, so nothing has to be switched."""

    def __init__(self, driver: Driver, stream: torch.cuda.Stream, current: bool) -> None:
        self._driver = driver
        self._stream = stream
        self._current = current
        self.key = stream.cuda_stream

    def run(self, work: Callable[[], object]) -> None:
        if self._current:
            work()
            return
        with torch.cuda.stream(self._stream):
            work()

    def result(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        if self._current:
            return work()
        with torch.cuda.stream(self._stream):
            return work()

    def copy(self, targets: Addresses, sources: Addresses, size_bytes: int) -> None:
        if len(targets):
            self._driver.copy(targets, sources, size_bytes, self.key)

    def record(self) -> Event:
        self._refuse_capture()
        return NvidiaEvent(self._driver, self._stream)

    def wait(self, event: Event) -> None:
        if not isinstance(event, NvidiaEvent):
            raise DeviceError(f"a CUDA stream cannot wait for {type(event).__name__}; give it an event of a CUDA stream")
        self._refuse_capture()
        with _failures():
            self._stream.wait_event(event.event)

    def _refuse_capture(self) -> None:
        if not self._current:
            return
        with torch.cuda.device(self._stream.device):  # torch answers for the stream of its current device, which may be another
            capturing = torch.cuda.is_current_stream_capturing()
        if capturing:
            raise DeviceError(
                "a CUDA graph is being captured on this stream, which kvtier must not become part of: acquire, read, append and release "
                "before or after the capture; the addresses of the pool stay, so replays see what was restored since"
            )


class NvidiaSpan(Span):
    """Reserved addresses with memory behind the first of them, mapped step by step."""

    def __init__(self, driver: Driver, device: torch.device, peers: list[int], size_bytes: int, most_bytes: int) -> None:
        granularity = driver.granularity()
        self._driver = driver
        self._peers = peers
        self.step_bytes = -(-min(STEP_BYTES, most_bytes) // granularity) * granularity
        self._reserved_bytes = -(-most_bytes // self.step_bytes) * self.step_bytes
        self._address = driver.reserve(self._reserved_bytes)
        self.mapped_bytes = 0
        try:
            self.resize(size_bytes)
            self.tensor = _tensor_at(self._address, self._reserved_bytes, device)
        except BaseException:
            self.close()
            raise

    def resize(self, size_bytes: int) -> None:
        wanted, before = -(-size_bytes // self.step_bytes) * self.step_bytes, self.mapped_bytes
        if not 0 <= wanted <= self._reserved_bytes:
            raise DeviceError(f"{size_bytes} bytes are asked for; this memory can have 0 to {self._reserved_bytes}")
        try:
            while self.mapped_bytes < wanted:
                self._driver.map(self._address + self.mapped_bytes, self.step_bytes, self._peers)
                self.mapped_bytes += self.step_bytes
        except DeviceError:
            self._unmap_to(before)
            raise
        self._unmap_to(wanted)

    def close(self) -> None:
        if self._reserved_bytes:
            self._unmap_to(0)
            self._driver.free_addresses(self._address, self._reserved_bytes)
            self._reserved_bytes = 0

    def _unmap_to(self, size_bytes: int) -> None:
        while self.mapped_bytes > size_bytes:
            self.mapped_bytes -= self.step_bytes
            self._driver.unmap(self._address + self.mapped_bytes, self.step_bytes)


class Nvidia(Accelerator):
    """The GPU that torch knows as `cuda:index`. DeviceError if it is not there, or if this build of torch has no code for it."""

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)
        try:
            torch.ones(1, device=self.device).add_(1).item()
        except (RuntimeError, AssertionError) as error:
            raise DeviceError(f"torch cannot compute on {self.device}: {_first_line(error)}") from error
        self._driver = Driver(index)
        self._idle_streams: list[int] = []
        self.name = torch.cuda.get_device_name(index)

    def engine_stream(self) -> Stream:
        return NvidiaStream(self._driver, torch.cuda.current_stream(self.device), current=True)

    def new_stream(self) -> Stream:
        try:
            handle = self._idle_streams.pop()
        except IndexError:
            handle = self._driver.new_stream()
        stream = NvidiaStream(self._driver, torch.cuda.ExternalStream(handle, self.device), current=False)  # type: ignore[no-untyped-call]
        weakref.finalize(stream, self._idle_streams.append, handle).atexit = False
        return stream

    def beside_captures(self) -> AbstractContextManager[None]:
        return self._driver.relaxed()

    def memory(self) -> tuple[int, int]:
        free, total = torch.cuda.mem_get_info(self.device)
        return int(free), int(total)

    def allocate(self, size_bytes: int) -> torch.Tensor:
        try:
            memory = torch.empty(size_bytes, dtype=torch.uint8, device=self.device)
            # Torch gives out memory that what it launched on this stream may still be using; other streams would not wait for that.
            torch.cuda.current_stream(self.device).synchronize()
        except RuntimeError as error:
            raise DeviceError(_first_line(error)) from error
        return memory

    def span(self, size_bytes: int, most_bytes: int) -> Span:
        if not self._driver.has_virtual_memory:
            raise DeviceError(f"{self.name} cannot map memory behind reserved addresses")
        return NvidiaSpan(self._driver, self.device, self._peers(), size_bytes, most_bytes)

    def register(self, address: int, size_bytes: int) -> str | None:
        return self._driver.register(address, size_bytes)

    def unregister(self, address: int) -> None:
        self._driver.unregister(address)

    def reaches(self, other: Accelerator) -> bool:
        return isinstance(other, Nvidia) and (other.device == self.device or other.device.index in self._peers())

    def direct_reader(self, depth: int) -> DirectReader:
        return GdsReader(depth)

    def report(self) -> dict[str, object]:
        free, total = self.memory()
        major, minor = torch.cuda.get_device_capability(self.device)
        return {
            "gpu": self.name,
            "compute_capability": f"{major}.{minor}",
            "gpu_memory_bytes": total,
            "gpu_memory_free_bytes": free,
            "batch_copies": self._driver.has_batch_copies,
            "memory_can_grow": self._driver.has_virtual_memory,
            "peers": [f"cuda:{peer}" for peer in self._peers()],
        }

    def _peers(self) -> list[int]:
        """The other devices that may copy from and to this one's memory."""
        own, reaches = self.device.index, torch.cuda.can_device_access_peer
        others = (index for index in range(torch.cuda.device_count()) if index != own)
        return [index for index in others if reaches(own, index) and reaches(index, own)]


class _Range:
    """Device memory as torch takes it from others."""

    def __init__(self, address: int, size_bytes: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size_bytes,), "typestr": "|u1", "data": (address, False), "version": 3}


def _tensor_at(address: int, size_bytes: int, device: torch.device) -> torch.Tensor:
    """A view of device memory that torch does not own. DeviceError if torch copied it instead."""
    with torch.cuda.device(device):
        tensor = torch.as_tensor(_Range(address, size_bytes), device=device)
    if tensor.data_ptr() != address or tensor.device != device:
        raise DeviceError(f"torch took the memory at {address:#x} of {device} for that of {tensor.device}")
    return tensor


@contextmanager
def _failures() -> Iterator[None]:
    """What torch raises inside, for work that failed before, is a DeviceError."""
    try:
        yield
    except RuntimeError as error:
        raise DeviceError(f"work on the GPU failed: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
