"""The device tier in GPU memory: the same pool of pages, whose size may change while addresses stay, and whose users are streams.

One range of addresses for as many pages as the GPU could hold, memory behind the first of them: block tables, views and captured CUDA
graphs stay valid when the pool grows or shrinks. Nothing here makes the engine's thread wait for the GPU, and nothing waits for the whole
device: writes are launched on the calling thread's stream, and `Fences` order them against other streams.

Bookkeeping belongs to the caller's lock, as in `device.py`. `_retired_from`: slots from there on are on their way out; they are given to
nobody, and when they are freed they are gone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import numpy as np
import torch

from kvtier.cuda.fences import Fences, drained
from kvtier.cuda.find import find_accelerator
from kvtier.cuda.surface import Accelerator, Addresses, Event, Span, Stream
from kvtier.errors import ConfigError, DeviceError, IntegrityError, LayoutError
from kvtier.formats.paged import PagedKV
from kvtier.layout import PageLayout
from kvtier.tiers.base import DeviceSlots
from kvtier.tiers.device import DevicePool

log = logging.getLogger(__name__)


class GpuPool(DevicePool):
    """A pool of pages on `accelerator`, of `capacity_bytes`, or of `free_memory_fraction` of what is free there if that is above 0.

    ConfigError if not even one page fits, or if the GPU has too little memory.
    """

    accelerator: Accelerator

    def __init__(self, layout: PageLayout, capacity_bytes: int, accelerator: Accelerator, free_memory_fraction: float = 0.0) -> None:
        self.accelerator = accelerator
        self.place = accelerator.device
        self.fences = Fences()
        self._span: Span | None = None
        self._why_fixed = ""
        if free_memory_fraction:
            free, _ = accelerator.memory()
            capacity_bytes = int(free * free_memory_fraction)
            if capacity_bytes < layout.page_bytes:
                raise ConfigError(
                    f"device.free_memory_fraction is {free_memory_fraction}, of {free} free bytes on {accelerator.name}, but one page of "
                    f"this model takes {layout.page_bytes} bytes; raise it, or make room on the GPU"
                )
        super().__init__(layout, capacity_bytes)
        self._retired_from = self.capacity_slots

    def _allocate(self, slots: int) -> torch.Tensor:
        size = slots * self.slot_bytes
        free, total = self.accelerator.memory()
        if size > free:
            raise DeviceError(f"{free} of the {total} bytes of {self.accelerator.name} are free")
        try:
            self._span = self.accelerator.span(size, max(size, total))
            memory = self._span.tensor
        except DeviceError as error:
            self._why_fixed = str(error)
            memory = self.accelerator.allocate(size)
        places = memory.numel() // self.slot_bytes
        return memory[: places * self.slot_bytes].view(self.layout.torch_dtype).view(places, *self.layout.shape)

    # -- streams ---------------------------------------------------------------------------------------------------------------

    def memory(self) -> torch.Tensor | None:
        return None

    def enter(self, events: Iterable[Event] = ()) -> None:
        stream = self.accelerator.engine_stream()
        for event in events:
            stream.wait(event)
        self.fences.before(stream)

    def leave(self) -> None:
        self.fences.used(self.accelerator.engine_stream())

    def addresses(self, slots: Sequence[int]) -> Addresses:
        """Where these slots' pages begin in the GPU's memory."""
        return self._pool.data_ptr() + np.asarray(slots, np.int64) * self.slot_bytes

    @cached_property
    def paged(self) -> PagedKV:
        """The pool as the codecs on the device see it. Behind the first `capacity_slots` pages there may be no memory."""
        return PagedKV.of_pool(self._pool, self.layout)

    # -- pages: on the calling thread's stream -----------------------------------------------------------------------------------

    def gather(self, slots: Sequence[int]) -> torch.Tensor:
        return self.read(lambda: self._pool[self._index(slots)]).cpu()

    def keys(self, slots: Sequence[int], layers: slice = slice(None)) -> torch.Tensor:
        return self.read(lambda: self._pool[self._index(slots), layers, 0])

    def scatter(self, slots: Sequence[int], pages: torch.Tensor, layers: slice = slice(None)) -> None:
        self._check_reachable(pages)

        def place() -> None:
            self._pool[self._index(slots), layers] = pages.detach().to(self.place)

        self._write(place)

    def write_tokens(self, slot: int, start: int, kv: torch.Tensor) -> None:
        self._check_reachable(kv)

        def place() -> None:
            self._pool[slot, :, :, start : start + kv.shape[2]] = kv.detach().to(self.place)

        self._write(place)

    def copy(self, source: int, target: int, tokens: int) -> None:
        def place() -> None:
            self._pool[target, :, :, :tokens] = self._pool[source, :, :, :tokens]

        self._write(place)

    def copy_to(self, slots: Sequence[int], other: GpuPool, other_slots: Sequence[int]) -> None:
        """Copy pages to the pool of a GPU that this one reaches, or within this pool; they are there on return.

        The calling thread sleeps until then; neither engine waits. DeviceError if there is no direct way, LayoutError for other pages.
        """
        if other.layout != self.layout:
            raise LayoutError(f"pages of {self.layout} do not fit into a pool of {other.layout}")
        if not self.accelerator.reaches(other.accelerator):
            raise DeviceError(
                f"there is no direct way from {self.accelerator.name} ({self.place}) to {other.accelerator.name} ({other.place}): "
                "put the pages into a tier that both can read"
            )
        with self.accelerator.beside_captures():
            if other.accelerator is not self.accelerator and other._span is not None:
                other._span.share(self.accelerator)
            stream = self.accelerator.new_stream()
            for pool in {self, other}:
                pool.fences.before(stream)
            with drained(stream):  # also when it fails half way: the slots are somebody else's then
                stream.copy(other.addresses(other_slots), self.addresses(slots), self.slot_bytes)

    # -- size ------------------------------------------------------------------------------------------------------------------

    @property
    def most_slots(self) -> int:
        """How many pages there are addresses for."""
        return len(self._pool)

    def free(self, slots: Sequence[int]) -> None:
        super().free(slots)
        if self._retired_from < self.capacity_slots:
            self._free = [slot for slot in self._free if slot < self._retired_from]

    def exchange(self, slots: list[int], count: int) -> list[int] | None:
        return super().exchange(slots, count) if self._retired_from == self.capacity_slots else DeviceSlots.exchange(self, slots, count)

    @property
    def bytes_used(self) -> int:
        return sum(self._taken) * self.slot_bytes if self._retired_from < self.capacity_slots else super().bytes_used

    def reach(self, slots: int) -> None:
        """Take memory for `slots` slots; `extend` then gives them out. Without lock. DeviceError, and nothing taken, if there is not."""
        self._check_size(slots)
        with self.accelerator.beside_captures():
            self._mapped().resize(max(slots, self.capacity_slots) * self.slot_bytes)

    def extend(self, slots: int) -> None:
        """The first `slots` slots have memory now."""
        before = self.capacity_slots
        self._end_at(max(slots, before))
        self._free = [*range(self.capacity_slots - 1, before - 1, -1), *self._free]

    def retire(self, slots: int) -> None:
        """From now on only the first `slots` slots are given out; what is freed behind them is gone. `end` closes this."""
        self._check_size(slots)
        self._retired_from = min(slots, self.capacity_slots)
        self._free = [slot for slot in self._free if slot < self._retired_from]

    def end(self) -> None:
        """Close what `retire` began: the pool ends behind the last slot that is still taken, or where it was to end; `give_back` then."""
        slots = max(self._retired_from, self._taken.rfind(1) + 1)
        kept = [slot for slot in range(slots - 1, self._retired_from - 1, -1) if not self._taken[slot]]
        self._free = [*kept, *self._free]
        self._end_at(slots)

    def give_back(self) -> None:
        """Return the memory behind the last slot, once no stream uses it. Sleeps; without lock, and not beside another change of size."""
        with self.accelerator.beside_captures():
            self.fences.finish()
            self._mapped().resize(self.capacity_slots * self.slot_bytes)

    def _end_at(self, slots: int) -> None:
        self._taken = self._taken[:slots] + bytearray(max(0, slots - len(self._taken)))
        self._retired_from = slots
        self.capacity_bytes = slots * self.slot_bytes

    def _mapped(self) -> Span:
        if self._span is None:
            raise DeviceError(f"the pool cannot change its size: {self._why_fixed or 'it is closed'}")
        return self._span

    def _check_size(self, slots: int) -> None:
        self._mapped()
        if not 1 <= slots <= self.most_slots:
            raise DeviceError(f"{slots} pages are asked for; this pool can have 1 to {self.most_slots}")

    # -- the whole -------------------------------------------------------------------------------------------------------------

    def report(self) -> dict[str, object]:
        """What was achieved, and `gpu_failed`: why the GPU says nothing of itself any more, as after an error that CUDA calls sticky."""
        mapped = self._span.mapped_bytes if self._span else self.capacity_bytes
        known: dict[str, object] = {
            **super().report(),
            "memory_bytes": mapped,
            "can_resize": self._span is not None,
            "why_fixed": self._why_fixed,
        }
        try:
            return {**known, **self.accelerator.report(), "gpu_failed": ""}
        except DeviceError as error:
            return {**known, "gpu": self.accelerator.name, "gpu_failed": str(error)}

    def check_integrity(self) -> None:
        retired = self.capacity_slots - self._retired_from
        free = sum(1 for slot in range(self._retired_from) if not self._taken[slot])
        if len(set(self._free)) != len(self._free) or len(self._free) != free:
            raise IntegrityError("device pool: free list and taken slots disagree")
        if any(self._taken[slot] or slot >= self._retired_from for slot in self._free):
            raise IntegrityError(f"device pool: a free slot is taken, or one of the {retired} retired ones")

    def close(self) -> None:
        """Give the memory back once no stream uses it any more."""
        try:
            self.fences.finish()
        except DeviceError as error:
            log.warning("work on the pool failed before it was closed: %s", error)
        self._pool = torch.empty((0, *self.layout.shape), dtype=self.layout.torch_dtype)
        vars(self).pop("paged", None)
        span, self._span = self._span, None
        if span is not None:
            try:
                span.close()
            except DeviceError as error:
                log.warning("memory of %s cannot be given back: %s", self.accelerator.name, error)

    def read(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `work` makes of pages, launched on the calling thread's stream after what others do with them, to be used on that stream."""
        stream = self._before()
        found = stream.result(work)
        self.fences.used(stream)
        return found

    def _write(self, work: Callable[[], object]) -> None:
        stream = self._before()
        stream.run(work)
        self.fences.used(stream)

    def _before(self) -> Stream:
        stream = self.accelerator.engine_stream()
        self.fences.before(stream)
        return stream

    def _index(self, slots: Sequence[int]) -> torch.Tensor:
        # Not blocking: a copy from a list's own memory is taken into the launch, and the engine's thread would wait for its stream else.
        return torch.as_tensor(slots, dtype=torch.int64).to(self.place, non_blocking=True)

    def _check_reachable(self, given: torch.Tensor) -> None:
        if given.device.type not in ("cpu", self.place.type):
            raise LayoutError(f"the KV is on {given.device}; this pool takes KV on {self.place}, or in CPU memory")


def open_pool(layout: PageLayout, capacity_bytes: int, place: str, free_memory_fraction: float = 0.0) -> DevicePool:
    """The device tier on `place` ("auto", "cpu", "cuda", "cuda:1"). ConfigError if that place is not there or too small, or if a share of a
    GPU's free memory is asked for and there is no GPU."""
    accelerator = find_accelerator(place)
    if accelerator is not None:
        return GpuPool(layout, capacity_bytes, accelerator, free_memory_fraction)
    if free_memory_fraction:
        raise ConfigError(
            f"device.free_memory_fraction is {free_memory_fraction}, but the device tier is in CPU memory: give capacity_bytes"
        )
    return DevicePool(layout, capacity_bytes)
