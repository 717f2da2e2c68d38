"""The stand-in GPU's streams and events: launched work stays in its stream until somebody waits for an event behind it.

Then only what that event depends on is done, in order, on the thread that waits. State is under the lock of the `LateAccelerator`.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvtier.cuda.copies import joined
from kvtier.cuda.surface import Addresses, Event, Stream
from kvtier.errors import DeviceError

if TYPE_CHECKING:
    from kvtier.testing.accelerator import LateAccelerator


@dataclass(eq=False)
class LateEvent(Event):
    """`reached` once everything before it in its stream was done; `failure` if something before it failed."""

    stream: LateStream
    reached: bool = False
    failure: Exception | None = None

    def done(self) -> bool:
        with self.stream.gpu.lock:
            return self._result()

    def wait(self) -> None:
        with self.stream.gpu.lock:
            self.stream.do_until(self)
            if self.failure is not None:
                self.stream.forgive()
            self._result()

    def _result(self) -> bool:
        if self.failure is not None:
            raise DeviceError(f"work on the GPU failed: {self.failure}") from self.failure
        return self.reached


class LateStream(Stream):
    """Work in order, none of which is done before somebody waits for it."""

    def __init__(self, gpu: LateAccelerator, key: int) -> None:
        self.gpu = gpu
        self.key = key
        self._work: deque[Callable[[], object] | LateEvent | tuple[LateEvent]] = deque()
        self._failure: Exception | None = None

    def run(self, work: Callable[[], object]) -> None:
        with self.gpu.lock:
            self._work.append(work)

    def result(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        found: list[torch.Tensor] = []
        self.run(lambda: found.append(work()))
        self.record().wait()
        return found[0]

    def copy(self, targets: Addresses, sources: Addresses, size_bytes: int) -> None:
        with self.gpu.lock:
            borders = np.array(sorted(self.gpu.registered), np.int64)
            to, of, sizes = (each.tolist() for each in joined(targets, sources, size_bytes, borders))
            for address, size in zip([*to, *of], [*sizes, *sizes], strict=True):
                self.gpu.check_reachable(address, size)
            self._launch(to, of, sizes, sum(self.gpu.engine_s(1, size) for size in sizes))

    def copy_by_kernel(self, device: Addresses, host: Addresses, size_bytes: int, to_host: bool) -> None:
        if self.gpu.why_no_kernels:
            raise DeviceError(self.gpu.why_no_kernels)
        with self.gpu.lock:
            assert not (int(np.bitwise_or.reduce(device | host)) | size_bytes) % 16, "a kernel copies multiples of 16 bytes"
            for address in device.tolist():
                assert self.gpu.owns(address, size_bytes), "a kernel is given memory that is not the device's"
            for address in host.tolist():
                self.gpu.check_registered(address, size_bytes)
            self.gpu.kernels += 1
            targets, sources = (host, device) if to_host else (device, host)
            self._launch(targets.tolist(), sources.tolist(), [size_bytes] * len(host), self.gpu.kernel_s(len(host), size_bytes))

    def seconds(self, launch: Callable[[], object]) -> float:
        self.record().wait()
        before = self.gpu.busy_s
        launch()
        self.record().wait()
        return self.gpu.busy_s - before

    def record(self) -> Event:
        event = LateEvent(self)
        with self.gpu.lock:
            self._work.append(event)
        return event

    def wait(self, event: Event) -> None:
        assert isinstance(event, LateEvent), "an event of another accelerator"
        with self.gpu.lock:
            self._work.append((event,))

    def do_until(self, event: LateEvent) -> None:
        """Do what is in front of `event`, and what that waits for. Lock held."""
        while not event.reached and event.failure is None:
            work = self._work.popleft()
            if isinstance(work, LateEvent):
                work.reached, work.failure = self._failure is None, self._failure
            elif isinstance(work, tuple):
                work[0].stream.do_until(work[0])
            elif self._failure is None:
                try:
                    work()
                except Exception as error:  # noqa: BLE001 - as a GPU does: kept until somebody asks
                    self._failure = error

    def forgive(self) -> None:
        """A thread was told of the failure: it is not that of what is launched next. Lock held."""
        self._failure = None

    @property
    def pending(self) -> int:
        """Pieces of work that are not done."""
        with self.gpu.lock:
            return len(self._work)

    def _launch(self, targets: list[int], sources: list[int], sizes: list[int], takes_s: float) -> None:
        self.gpu.count_copies(len(targets))
        failure, self.gpu.fail_in_stream = self.gpu.fail_in_stream, None

        def carry() -> None:
            if failure is not None:
                raise failure
            self.gpu.busy_s += takes_s
            for copy in zip(targets, sources, sizes, strict=True):
                ctypes.memmove(*copy)

        self._work.append(carry)
