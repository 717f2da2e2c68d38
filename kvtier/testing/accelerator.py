"""A stand-in for a GPU, in CPU memory, that does everything as late as it may: what a test forgot to wait for has not happened.

Launched work stays in its stream until somebody waits for an event, and then only what that event depends on is done, in order. So a reader
that does not wait sees old bytes, and a writer that does not wait for readers overwrites what they have yet to read: every time, not once
in a thousand. Copies go to and from registered memory and its own memory only, and can be made to fail. Memory that is not mapped is filled
with 0xEE. Thread-safe; work is done on the thread that waits.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from kvtier.cuda.direct import DirectReader
from kvtier.cuda.surface import Accelerator, Span
from kvtier.errors import DeviceError
from kvtier.testing.direct import LateReader
from kvtier.testing.streams import LateEvent, LateStream

__all__ = ["UNMAPPED", "LateAccelerator", "LateEvent", "LateSpan", "LateStream"]

UNMAPPED = 0xEE


class LateSpan(Span):
    """A range of CPU memory of which only the first bytes count as memory of the device."""

    def __init__(self, gpu: LateAccelerator, size_bytes: int, most_bytes: int) -> None:
        self._gpu = gpu
        self.step_bytes = gpu.step_bytes
        self._most = -(-most_bytes // self.step_bytes) * self.step_bytes
        self.tensor = gpu.made(self._most)
        gpu.private[self.tensor.data_ptr()] = []
        self.mapped_bytes = 0
        self.resize(size_bytes)

    def resize(self, size_bytes: int) -> None:
        wanted = -(-size_bytes // self.step_bytes) * self.step_bytes
        if not 0 <= wanted <= self._most:
            raise DeviceError(f"{size_bytes} bytes are asked for; this memory can have 0 to {self._most}")
        self._gpu.take(wanted - self.mapped_bytes)
        self.tensor[min(wanted, self.mapped_bytes) :] = UNMAPPED
        self.mapped_bytes = wanted

    def share(self, other: Accelerator) -> None:
        if not other.reaches(self._gpu):
            raise DeviceError("memory is shared with a stand-in that cannot reach it")
        self._gpu.private[self.tensor.data_ptr()].append(other)

    def close(self) -> None:
        self._gpu.take(-self.mapped_bytes)
        self._gpu.forget(self.tensor)
        self.mapped_bytes = 0


@dataclass(eq=False)
class LateAccelerator(Accelerator):
    """A GPU with `total_bytes` of memory. Each thread computes on a stream of its own, unless `engine` is set to one for all.

    `fail_at_launch`, `fail_in_stream`: what the next copies fail with, when they are launched or when they are done. `refuse_after`: how
    many bytes of host memory can be registered. `can_grow`: whether it has spans. `files`: its reader, with what may go wrong there.
    """

    total_bytes: int = 1 << 30
    step_bytes: int = 1 << 16
    refuse_after: int | None = None
    can_grow: bool = True
    fail_at_launch: Exception | None = None
    fail_in_stream: Exception | None = None
    broken: str = ""
    """Why it answers nothing any more and launches no copies, as after an error that CUDA calls sticky."""
    fail_after: int = 0
    """How many launches of copies still succeed before `fail_at_launch`."""
    engine: LateStream | None = None
    copies: int = 0
    """Copies launched so far."""
    launches: int = 0
    """Calls that launched them."""
    files: LateReader = field(default_factory=LateReader)
    friends: list[LateAccelerator] = field(default_factory=list)
    """Which others this one reaches."""
    private: dict[int, list[Accelerator]] = field(default_factory=dict)
    """Spans of this one, by address, and which others they are shared with."""
    why_no_kernels: str = "a stand-in has no kernels that copy"
    """Empty: it has."""
    kernels: int = 0
    """Kernels launched that copy."""
    engine_s: Callable[[int, int], float] = field(default=lambda copies, size_bytes: copies * (4e-6 + size_bytes / 5e10))
    kernel_s: Callable[[int, int], float] = field(default=lambda copies, size_bytes: 2e-5 + copies * size_bytes / 4e10)
    """How long so many copies of that size take by its clock, `busy_s`."""
    busy_s: float = 0.0

    def __post_init__(self) -> None:
        self.device = torch.device("cpu")
        self.name = "a stand-in"
        self.lock = threading.RLock()
        self.registered: dict[int, int] = {}
        self.used_bytes = 0
        self._streams = 0
        self._own = threading.local()
        self._memories: list[torch.Tensor] = []

    def engine_stream(self) -> LateStream:
        if self.engine is not None:
            return self.engine
        stream: LateStream | None = getattr(self._own, "stream", None)
        if stream is None:
            stream = self._own.stream = self.new_stream()
        return stream

    def new_stream(self) -> LateStream:
        with self.lock:
            self._streams += 1
            return LateStream(self, self._streams + id(self))

    @contextmanager
    def beside_captures(self) -> Iterator[None]:
        before, self._own.beside = getattr(self._own, "beside", False), True
        try:
            yield
        finally:
            self._own.beside = before

    def memory(self) -> tuple[int, int]:
        self.check_alive()
        return self.total_bytes - self.used_bytes, self.total_bytes

    def allocate(self, size_bytes: int) -> torch.Tensor:
        self.take(size_bytes)
        return self.made(size_bytes)

    def span(self, size_bytes: int, most_bytes: int) -> Span:
        if not self.can_grow:
            raise DeviceError("a stand-in cannot map memory behind reserved addresses")
        return LateSpan(self, size_bytes, most_bytes)

    def register(self, address: int, size_bytes: int) -> str | None:
        assert address % 4096 == 0, "registered memory begins with a page"
        with self.lock:
            if self.refuse_after is not None and sum(self.registered.values()) + size_bytes > self.refuse_after:
                return "the stand-in registers no more"
            self.registered[address] = size_bytes
        return None

    def unregister(self, address: int) -> None:
        with self.lock:
            del self.registered[address]

    def why_no_kernel_copies(self) -> str:
        return self.why_no_kernels

    def reaches(self, other: Accelerator) -> bool:
        return other is self or other in self.friends

    def direct_reader(self, depth: int) -> DirectReader:
        if self.files.missing:
            raise DeviceError(self.files.missing)
        self.files.depth = depth
        return self.files

    def report(self) -> dict[str, object]:
        self.check_alive()
        return {
            "gpu": self.name,
            "compute_capability": "none",
            "gpu_memory_bytes": self.total_bytes,
            "batch_copies": True,
            "memory_can_grow": self.can_grow,
        }

    # -- for its streams and memory ----------------------------------------------------------------------------------------

    def check_alive(self) -> None:
        """DeviceError if it is broken."""
        if self.broken:
            raise DeviceError(self.broken)

    def take(self, size_bytes: int) -> None:
        """Count memory as used (or given back). DeviceError if there is too little."""
        with self.lock:
            if self.used_bytes + size_bytes > self.total_bytes:
                raise DeviceError(f"out of memory: {size_bytes} bytes are asked for, {self.total_bytes - self.used_bytes} are free")
            self.used_bytes += size_bytes

    def made(self, size_bytes: int) -> torch.Tensor:
        """Memory of this device, uint8 `[size_bytes]`."""
        memory = torch.full((size_bytes,), UNMAPPED, dtype=torch.uint8)
        with self.lock:
            self._memories.append(memory)
        return memory

    def forget(self, memory: torch.Tensor) -> None:
        """This is no memory of the device any more."""
        with self.lock:
            self.private.pop(memory.data_ptr(), None)
            self._memories = [each for each in self._memories if each is not memory]

    def count_copies(self, count: int) -> None:
        """A launch of `count` copies; raises what the test wants it to raise. Lock held."""
        own = threading.current_thread().name.startswith("kvtier")
        assert not own or getattr(self._own, "beside", False), "kvtier's own threads work beside captures only"
        self.check_alive()
        if self.fail_at_launch is not None:
            if self.fail_after == 0:
                failure, self.fail_at_launch = self.fail_at_launch, None
                raise failure
            self.fail_after -= 1
        self.copies += count
        self.launches += 1

    def check_reachable(self, address: int, size_bytes: int) -> None:
        """DeviceError unless it is one piece of this device's, a friend's (shared with this one) or registered memory. Lock held."""
        if self.owns(address, size_bytes) or any(friend.shares(address, size_bytes, self) for friend in self.friends):
            return
        self.check_registered(address, size_bytes)

    def owns(self, address: int, size_bytes: int) -> bool:
        """Whether it is one piece of this device's memory."""
        return any(0 <= address - each.data_ptr() <= each.numel() - size_bytes for each in self._memories)

    def shares(self, address: int, size_bytes: int, other: Accelerator) -> bool:
        """Whether it is one piece of this device's memory that `other` may copy from and to: spans have to be shared first."""
        inside = (each.data_ptr() for each in self._memories if 0 <= address - each.data_ptr() <= each.numel() - size_bytes)
        return any(start not in self.private or other in self.private[start] for start in inside)

    def check_registered(self, address: int, size_bytes: int) -> None:
        """DeviceError unless it is one piece of registered memory. Lock held."""
        starts = sorted(self.registered)
        place = bisect_right(starts, address) - 1
        if place < 0 or address + size_bytes > starts[place] + self.registered[starts[place]]:
            raise DeviceError(f"{size_bytes} bytes at {address:#x} are not in one piece of memory that this device reaches")
