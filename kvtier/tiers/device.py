"""The device tier: a preallocated paged pool the engine attends over, in GPU memory or, without a GPU, in CPU memory.

One tensor `[slots, layers, planes, page_tokens, kv_heads, head_dim]`; a slot number is what a block table holds. The free list belongs
to the caller's lock like all bookkeeping; the tensor's contents belong to whoever reserved the slot.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kvtier import columns
from kvtier.errors import ConfigError, IntegrityError
from kvtier.formats import get_format
from kvtier.layout import PageLayout
from kvtier.memory.arena import Arena
from kvtier.tiers.base import DeviceSlots


class DevicePool(DeviceSlots):
    """A pool of `capacity_bytes // layout.page_bytes` pages on `place` ("auto", "cpu", "cuda", "cuda:1").

    ConfigError if not even one page fits, if the place does not exist or if its memory is too small.
    """

    name = "device"

    def __init__(self, layout: PageLayout, capacity_bytes: int, place: str = "auto") -> None:
        self.layout = layout
        self.format = get_format("raw")
        self.slot_bytes = layout.page_bytes
        slots = capacity_bytes // self.slot_bytes
        if slots < 1:
            raise ConfigError(
                f"device.capacity_bytes is {capacity_bytes}, but one page of this model takes {layout.page_bytes} bytes ({layout}); "
                "give at least one page, better thousands"
            )
        self.capacity_bytes = slots * self.slot_bytes
        self.place = _resolve(place)
        try:
            self._pool = _allocate((slots, *layout.shape), layout, self.place)
        except (RuntimeError, MemoryError, OSError) as error:
            why = str(error).splitlines()[0]
            raise ConfigError(
                f"device.capacity_bytes: {self.capacity_bytes} bytes cannot be allocated on {self.place}: {why}; lower it"
            ) from error
        self._free = list(range(slots - 1, -1, -1))
        self._taken = bytearray(slots)
        self._loops = columns.loops()

    @property
    def bytes_used(self) -> int:
        return (self.capacity_slots - len(self._free)) * self.slot_bytes

    @property
    def free_slots(self) -> int:
        return len(self._free)

    @property
    def capacity_slots(self) -> int:
        return len(self._taken)

    def reserve(self, count: int) -> list[int] | None:
        if count > len(self._free):
            return None
        if self._loops is not None:
            return self._loops.take_slots(self._free, self._taken, count)
        slots = [self._free.pop() for _ in range(count)]
        for slot in slots:
            self._taken[slot] = 1
        return slots

    def free(self, slots: Sequence[int]) -> None:
        if self._loops is not None and isinstance(slots, list | tuple) and self._loops.give_slots(self._free, self._taken, slots):
            return
        for slot in slots:
            if not 0 <= slot < self.capacity_slots or not self._taken[slot]:
                raise IntegrityError(f"device slot {slot} is freed, but nobody reserved it")
        if len(set(slots)) != len(slots):
            raise IntegrityError(f"a device slot is freed twice in one call: {list(slots)}")
        for slot in slots:
            self._taken[slot] = 0
            self._free.append(slot)

    def memory(self) -> torch.Tensor | None:
        return self._pool if self.place.type == "cpu" else None

    def gather(self, slots: Sequence[int]) -> torch.Tensor:
        return self._pool[torch.as_tensor(slots, device=self.place)].cpu()

    def scatter(self, slots: Sequence[int], pages: torch.Tensor, layers: slice = slice(None)) -> None:
        if self.place.type == "cpu" and pages.device.type == "cpu":
            # Indexed assignment takes five times as long, and torch's copies wake threads that the engine needs.
            bits = {2: torch.int16, 4: torch.int32}[pages.element_size()]
            pool, source = self._pool.view(bits).numpy(), pages.detach().view(bits).numpy()
            for slot, page in zip(slots, source, strict=True):
                np.copyto(pool[slot, layers], page)
            return
        self._pool[torch.as_tensor(slots, device=self.place), layers] = pages.to(self.place)
        if self.place.type == "cuda":
            torch.cuda.current_stream(self.place).synchronize()  # the engine reads on a stream of its own

    def layer(self, index: int) -> torch.Tensor:
        """The whole pool seen by one layer: a view `[slots, planes, page_tokens, kv_heads, head_dim]`, to be indexed with a block table."""
        return self._pool[:, index]

    def page(self, slot: int) -> torch.Tensor:
        """One slot's memory: a view `[layers, planes, page_tokens, kv_heads, head_dim]`."""
        return self._pool[slot]

    def keys(self, slots: Sequence[int]) -> torch.Tensor:
        """The keys of whole pages, a copy where the pool is: `[len(slots), layers, page_tokens, kv_heads, head_dim]`."""
        return self._pool[torch.as_tensor(slots, dtype=torch.int64, device=self.place), :, 0]

    def write_tokens(self, slot: int, start: int, kv: torch.Tensor) -> None:
        """Write `kv` `[layers, planes, tokens, kv_heads, head_dim]` into one page from token `start` on."""
        self._pool[slot, :, :, start : start + kv.shape[2]] = kv.to(self.place)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` tokens of one page to another (copy-on-write)."""
        self._pool[target, :, :, :tokens] = self._pool[source, :, :, :tokens]

    def report(self) -> dict[str, object]:
        return {"place": str(self.place), "slots": self.capacity_slots}

    def check_integrity(self) -> None:
        if len(set(self._free)) != len(self._free) or sum(self._taken) != self.capacity_slots - len(self._free):
            raise IntegrityError("device pool: free list and taken slots disagree")
        if any(self._taken[slot] for slot in self._free):
            raise IntegrityError("device pool: a free slot is marked as taken")

    def close(self) -> None:
        self._pool = torch.empty((0, *self.layout.shape), dtype=self.layout.torch_dtype)


def _allocate(shape: tuple[int, ...], layout: PageLayout, place: torch.device) -> torch.Tensor:
    if place.type != "cpu":
        return torch.empty(shape, dtype=layout.torch_dtype, device=place)
    arena = Arena(shape[0] * layout.page_bytes, mlock="off", section="device")
    return torch.from_numpy(arena.bytes).view(layout.torch_dtype).view(shape)


def _resolve(place: str) -> torch.device:
    if place == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(place)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"device.place is {place!r}, but torch sees no CUDA device here; use 'cpu' or 'auto'")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise ConfigError(f"device.place is {place!r}, but there are only {torch.cuda.device_count()} CUDA devices")
    return device
