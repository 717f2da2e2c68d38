"""The accelerator that is an NVIDIA GPU: torch's streams and events, and the driver for what torch does not offer.

Side streams do not wait for the default stream, and are the driver's: torch's own come from 32 that it hands out in turn, so that a lane's
could be the one an engine captures its graphs on. Events put the waiting thread to sleep instead of letting it spin: a spinning worker
would take a core from the engine.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from kvtier.cuda.copies import RegisteredMemory, joined
from kvtier.cuda.direct import DirectReader
from kvtier.cuda.driver import Driver
from kvtier.cuda.gds import GdsReader
from kvtier.cuda.kernels import launch_errors, why_missing
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

    def __init__(self, driver: Driver, stream: torch.cuda.Stream, current: bool, registered: RegisteredMemory) -> None:
        self._driver = driver
        self._registered = registered
        self._stream = stream
        self._current = current
        self.key = stream.cuda_stream

    def run(self, work: Callable[[], object]) -> None:
        with self._launching():
            work()

    def result(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        with self._launching():
            return work()

    def copy(self, targets: Addresses, sources: Addresses, size_bytes: int) -> None:
        if len(targets):
            self._driver.copy(*joined(targets, sources, size_bytes, self._registered.starts), self.key)

    def copy_by_kernel(self, device: Addresses, host: Addresses, size_bytes: int, to_host: bool) -> None:
        if not self._registered.covers(host, size_bytes):
            raise DeviceError("host memory that is not registered is never handed to a kernel; copy it with `copy`, from memory that is")
        targets, sources = (host, device) if to_host else (device, host)

        def launch() -> None:
            from kvtier.cuda.copy_kernel import copy_all  # which imports Triton

            copy_all(targets, sources, size_bytes, self._stream.device)

        self.run(launch)

    def seconds(self, launch: Callable[[], object]) -> float:
        with _failures(), self._driver.relaxed():
            first, last = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))  # type: ignore[no-untyped-call]
            first.record(self._stream)
            launch()
            last.record(self._stream)
            last.synchronize()
            return float(first.elapsed_time(last)) / 1e3

    def record(self) -> Event:
        self._refuse_capture()
        return NvidiaEvent(self._driver, self._stream)

    def wait(self, event: Event) -> None:
        if not isinstance(event, NvidiaEvent):
            raise DeviceError(f"a CUDA stream cannot wait for {type(event).__name__}; give it an event of a CUDA stream")
        self._refuse_capture()
        with _failures():
            self._stream.wait_event(event.event)

    @contextmanager
    def _launching(self) -> Iterator[None]:
        """What is launched inside goes to this stream; what cannot be is a DeviceError."""
        with _failures("a launch on the GPU failed"), contextlib.nullcontext() if self._current else torch.cuda.stream(self._stream):
            yield

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
    """Reserved addresses with memory behind the first of them, mapped step by step. The lock is for sharing beside a change of size."""

    def __init__(self, driver: Driver, device: torch.device, size_bytes: int, most_bytes: int) -> None:
        granularity = driver.granularity()
        self._driver = driver
        self._device = device
        self._peers: list[int] = []
        self._lock = threading.Lock()
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
        with self._lock:
            try:
                while self.mapped_bytes < wanted:
                    self._driver.map(self._address + self.mapped_bytes, self.step_bytes, self._peers)
                    self.mapped_bytes += self.step_bytes
            except DeviceError:
                self._unmap_to(before)
                raise
            self._unmap_to(wanted)

    def share(self, other: Accelerator) -> None:
        if not isinstance(other, Nvidia):
            raise DeviceError(f"memory of {self._device} cannot be shared with {other.name}, which is no CUDA device")
        with self._lock:
            peer = other.device.index
            if peer == self._device.index or peer in self._peers:
                return
            for start in range(0, self.mapped_bytes, self.step_bytes):
                self._driver.grant(self._address + start, self.step_bytes, peer)
            self._peers.append(peer)

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
        self._registered = RegisteredMemory()
        self._idle_streams: list[int] = []
        self.name = torch.cuda.get_device_name(index)

    def engine_stream(self) -> Stream:
        return NvidiaStream(self._driver, torch.cuda.current_stream(self.device), True, self._registered)

    def new_stream(self) -> Stream:
        try:
            handle = self._idle_streams.pop()
        except IndexError:
            handle = self._driver.new_stream()
        made = torch.cuda.ExternalStream(handle, self.device)  # type: ignore[no-untyped-call]
        stream = NvidiaStream(self._driver, made, False, self._registered)
        weakref.finalize(stream, self._idle_streams.append, handle).atexit = False
        return stream

    def beside_captures(self) -> AbstractContextManager[None]:
        return self._driver.relaxed()

    def memory(self) -> tuple[int, int]:
        with _failures("the GPU does not say what memory it has"):
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
        return NvidiaSpan(self._driver, self.device, size_bytes, most_bytes)

    def register(self, address: int, size_bytes: int) -> str | None:
        refused = self._driver.register(address, size_bytes)
        if refused is None:
            self._registered.add(address, size_bytes)
        return refused

    def unregister(self, address: int) -> None:
        self._registered.remove(address)
        self._driver.unregister(address)

    def why_no_kernel_copies(self) -> str:
        if not self._driver.maps_host_memory:
            return f"kernels of {self.name} find registered host memory at other addresses than the host"
        return why_missing(self.device)

    def reaches(self, other: Accelerator) -> bool:
        return isinstance(other, Nvidia) and (other.device == self.device or other.device.index in self._peers())

    def direct_reader(self, depth: int) -> DirectReader:
        return GdsReader(depth)

    def report(self) -> dict[str, object]:
        free, total = self.memory()
        with _failures("the GPU does not say what it is"):
            (major, minor), peers = torch.cuda.get_device_capability(self.device), self._peers()
        return {
            "gpu": self.name,
            "compute_capability": f"{major}.{minor}",
            "gpu_memory_bytes": total,
            "gpu_memory_free_bytes": free,
            "batch_copies": self._driver.has_batch_copies,
            "memory_can_grow": self._driver.has_virtual_memory,
            "peers": [f"cuda:{peer}" for peer in peers],
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
def _failures(what: str = "work on the GPU failed") -> Iterator[None]:
    """What torch and Triton raise inside, for work that failed before or that cannot be launched, is a DeviceError."""
    try:
        yield
    except launch_errors() as error:
        raise DeviceError(f"{what}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
