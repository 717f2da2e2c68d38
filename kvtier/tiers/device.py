"""The device tier: a preallocated paged pool the engine attends over, here in CPU memory; `gpu.py` is the one in GPU memory.

One tensor `[slots, layers, planes, page_tokens, kv_heads, head_dim]`; a slot number is what a block table holds. The free list belongs
to the caller's lock like all bookkeeping; the tensor's contents belong to whoever reserved the slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from kvtier import columns
from kvtier.cuda.surface import Accelerator, Event
from kvtier.errors import ConfigError, DeviceError, IntegrityError
from kvtier.formats import get_format
from kvtier.layout import PageLayout
from kvtier.memory.arena import Arena
from kvtier.tiers.base import DeviceSlots

_PLAIN = (list, tuple)  # made once: `list | tuple` would be made at every call


class DevicePool(DeviceSlots):
    """A pool of `capacity_bytes // layout.page_bytes` pages. ConfigError if not even one page fits, or if memory is too small."""

    name = "device"
    place: torch.device
    """Where its tensors are."""
    accelerator: Accelerator | None = None
    """The GPU whose memory this is."""

    def __init__(self, layout: PageLayout, capacity_bytes: int) -> None:
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
        try:
            self._pool = self._allocate(slots)
        except (DeviceError, RuntimeError, MemoryError, OSError) as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"device.capacity_bytes: {self.capacity_bytes} bytes cannot be allocated on {self.place}: {why}; lower it"
            ) from error
        self._free = list(range(slots - 1, -1, -1))
        self._taken = bytearray(slots)
        self._loops = columns.loops()

    def _allocate(self, slots: int) -> torch.Tensor:
        """Memory for the pool: `[slots or more, *layout.shape]`."""
        self.place = torch.device("cpu")
        arena = Arena(slots * self.slot_bytes, mlock="off", section="device")
        return torch.from_numpy(arena.bytes).view(self.layout.torch_dtype).view(slots, *self.layout.shape)

    @property
    def bytes_used(self) -> int:
        return (len(self._taken) - len(self._free)) * self.slot_bytes

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
        if self._loops is not None and isinstance(slots, _PLAIN) and self._loops.give_slots(self._free, self._taken, slots):
            return
        for slot in slots:
            if not 0 <= slot < self.capacity_slots or not self._taken[slot]:
                raise IntegrityError(f"device slot {slot} is freed, but nobody reserved it")
        if len(set(slots)) != len(slots):
            raise IntegrityError(f"a device slot is freed twice in one call: {list(slots)}")
        for slot in slots:
            self._taken[slot] = 0
            self._free.append(slot)

    def exchange(self, slots: list[int], count: int) -> list[int] | None:
        return slots if len(slots) == count else super().exchange(slots, count)

    def memory(self) -> torch.Tensor | None:
        return self._pool

    def gather(self, slots: Sequence[int]) -> torch.Tensor:
        return self._pool[torch.as_tensor(slots)]

    def scatter(self, slots: Sequence[int], pages: torch.Tensor, layers: slice = slice(None)) -> None:
        # Indexed assignment takes five times as long, and torch's copies wake threads that the engine needs.
        bits = {2: torch.int16, 4: torch.int32}[pages.element_size()]
        pool, source = self._pool.view(bits).numpy(), pages.detach().cpu().resolve_neg().view(bits).numpy()
        for slot, page in zip(slots, source, strict=True):
            np.copyto(pool[slot, layers], page)

    def enter(self, events: Iterable[Event] = ()) -> None:
        """Let what the calling thread computes from now on see what others wrote into the pool, and what `events` stand for.

        Nobody waits here where memory is the CPU's: what was written is there.
        """

    def leave(self) -> None:
        """What the calling thread launched so far may use any page; from now on it does not rely on those it lets go of."""

    def layer(self, index: int) -> torch.Tensor:
        """The whole pool seen by one layer: a view `[slots, planes, page_tokens, kv_heads, head_dim]`, to be indexed with a block table."""
        return self._pool[:, index]

    def page(self, slot: int) -> torch.Tensor:
        """One slot's memory: a view `[layers, planes, page_tokens, kv_heads, head_dim]`."""
        return self._pool[slot]

    def keys(self, slots: Sequence[int], layers: slice = slice(None)) -> torch.Tensor:
        """The keys of pages in these layers, a copy where the pool is: `[len(slots), layers, page_tokens, kv_heads, head_dim]`."""
        return self._pool[torch.as_tensor(slots, dtype=torch.int64, device=self.place), layers, 0]

    def write_tokens(self, slot: int, start: int, kv: torch.Tensor) -> None:
        """Write `kv` `[layers, planes, tokens, kv_heads, head_dim]` into one page from token `start` on."""
        self._pool[slot, :, :, start : start + kv.shape[2]] = kv.detach().to(self.place)

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
