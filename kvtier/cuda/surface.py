"""What kvtier asks of a GPU, and no more: streams, events, copies by address, memory that grows, registered host memory.

`kvtier.cuda.nvidia` does it with CUDA; `kvtier.testing.accelerator` is a stand-in in CPU memory that does everything as late as it may, so
that a missing wait shows as wrong bytes on any machine. Everything launched on a stream happens there in order, at some later time, beside
other streams; an event marks a point in a stream that others can wait for. There is no call that waits for a whole device, on purpose.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch
from numpy.typing import NDArray

from kvtier.cuda.direct import DirectReader

Addresses = NDArray[np.int64]
"""Addresses of memory, one per copy: int64 `[copies]`, contiguous."""


class Event(ABC):
    """A point in a stream: reached once all that was launched there before is done."""

    @abstractmethod
    def done(self) -> bool:
        """Whether it was reached. Never waits. DeviceError if what came before it failed."""

    @abstractmethod
    def wait(self) -> None:
        """Let the calling thread sleep until it is reached. DeviceError if what came before it failed."""


class Stream(ABC):
    """Work that happens in order. Any thread may launch, one at a time."""

    key: int
    """Equal for two objects exactly if they are the same stream."""

    @abstractmethod
    def run(self, work: Callable[[], object]) -> None:
        """Launch what `work` does to tensors of the device. What it returns is dropped; it may be called later, but only once. DeviceError
        if a kernel of it cannot be launched."""

    @abstractmethod
    def result(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """As `run`, and the tensor `work` gives, to be used on this stream."""

    @abstractmethod
    def copy(self, targets: Addresses, sources: Addresses, size_bytes: int) -> None:
        """Launch one copy of `size_bytes` from each source to its target, in no order among themselves.

        Each end is memory of this device, of one it can reach, or registered host memory. The arrays may be reused at once. Neighbours on
        both sides go as one copy. DeviceError, and perhaps some copies launched, if the device does not take them.
        """

    @abstractmethod
    def copy_by_kernel(self, device: Addresses, host: Addresses, size_bytes: int, to_host: bool) -> None:
        """As `copy`, between this device's memory and registered host memory, by one kernel instead of the copy engines: it takes the
        device's processors, and no time per copy. Addresses and size are multiples of 16.

        DeviceError, before anything is launched, for host memory that is not registered, where the device has no such kernel, or if the
        launch fails.
        """

    @abstractmethod
    def seconds(self, launch: Callable[[], object]) -> float:
        """How long this stream takes for what `launch` launches on it, by the device's clock; the calling thread sleeps until then.
        DeviceError if that fails."""

    @abstractmethod
    def record(self) -> Event:
        """The point behind all that was launched here so far. DeviceError while a CUDA graph is captured from this stream."""

    @abstractmethod
    def wait(self, event: Event) -> None:
        """What is launched here from now on happens after `event`; the calling thread goes on. DeviceError as `record`."""


class Span(ABC):
    """Memory whose addresses stay while its size changes: a range of addresses of which the first `mapped_bytes` are memory.

    `tensor` is uint8 over the whole range; what lies behind `mapped_bytes` may not be touched. Sizes are multiples of `step_bytes`.
    """

    tensor: torch.Tensor
    step_bytes: int
    mapped_bytes: int

    @abstractmethod
    def resize(self, size_bytes: int) -> None:
        """Take or give back memory at the end, to `size_bytes` rounded up to a step. DeviceError, and nothing changed, if there is too
        little. Nobody may be using what is given back."""

    @abstractmethod
    def share(self, other: Accelerator) -> None:
        """Let `other` copy from and to this memory and what it grows by; nobody else may. DeviceError if it cannot reach it."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back, the addresses too. Safe to call twice."""


class Accelerator(ABC):
    """One GPU. `device` is where its tensors are."""

    device: torch.device
    name: str

    @abstractmethod
    def engine_stream(self) -> Stream:
        """The stream that the calling thread computes on now."""

    @abstractmethod
    def new_stream(self) -> Stream:
        """A stream of its own, beside the engine's."""

    @abstractmethod
    def beside_captures(self) -> AbstractContextManager[None]:
        """What the calling thread, one of kvtier's own, does inside disturbs no CUDA graph that an engine's thread is capturing."""

    @abstractmethod
    def memory(self) -> tuple[int, int]:
        """Bytes that are free on this device, and bytes that it has. DeviceError from a device that answers nothing any more."""

    @abstractmethod
    def allocate(self, size_bytes: int) -> torch.Tensor:
        """Memory that stays, uint8 `[size_bytes]`. DeviceError if there is too little."""

    @abstractmethod
    def span(self, size_bytes: int, most_bytes: int) -> Span:
        """A span of `size_bytes` that can grow to `most_bytes`, both above 0 and rounded up to a step. DeviceError where memory cannot grow
        in place, and where there is too little."""

    @abstractmethod
    def register(self, address: int, size_bytes: int) -> str | None:
        """Make host memory reachable for copies; why not, if that failed. `address` is aligned to 4096 bytes."""

    @abstractmethod
    def unregister(self, address: int) -> None:
        """Undo `register` of the memory from `address`; no copy may be using it."""

    @abstractmethod
    def why_no_kernel_copies(self) -> str:
        """One line: why `Stream.copy_by_kernel` is not there; empty if it is."""

    @abstractmethod
    def reaches(self, other: Accelerator) -> bool:
        """Whether copies from and to the memory of `other` can go directly, once that is shared (`Span.share`)."""

    @abstractmethod
    def direct_reader(self, depth: int) -> DirectReader:
        """What reads files straight into this device's memory, `depth` requests at once. DeviceError, which says the part that is missing,
        where nothing does."""

    @abstractmethod
    def report(self) -> dict[str, object]:
        """What this device is and can, for `stats()` and `kvtier doctor`. DeviceError as `memory`."""
