"""The contracts of the tiers: bounded sets of slots that hold pages, raw on the device and encoded below it.

A tier holds bytes and takes no decisions. `reserve`, `free` and the counters are plain bookkeeping (called under the cache's lock,
never do I/O); `store`, `load`, `gather` and `scatter` move bytes (called by mover workers, without any lock, several at once, on
different slots). A slot goes reserve -> write -> (visible once the page table says so) -> free. Copies below the device prove what
they are: `load` verifies key, layout, format and checksum, and answers with a reason instead of bytes when any of them differs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kvtier.cuda.surface import Addresses
from kvtier.formats.base import Format, Payload
from kvtier.keys import PageKey
from kvtier.layout import PageLayout


class PageId(NamedTuple):
    """What a copy says about itself: its key, its parent's key (the root key for depth 0) and how many pages stand before it."""

    key: PageKey
    parent: PageKey
    depth: int


@dataclass(frozen=True)
class Refused:
    """Why a copy could not be stored or loaded: "checksum", "key" (another copy, or none), "format" (or layout), "truncated",
    "disk full", "io: ...", "closed"."""

    reason: str


Loaded = Generator[tuple[int, Payload | Refused], None, None]
"""(index, payload or why not), as copies become ready."""
Placed = Generator[list[tuple[int, int | Payload | Refused]], None, None]
"""Some of them at a time, or instead of a payload how many bytes of it were verified and decoded to where they belong."""
FinishStore = Callable[[], list[Refused | None]]


class Slots(ABC):
    """What every tier is: a bounded set of slots (small whole numbers), each for one copy of one page.

    `capacity_bytes` is never exceeded by `bytes_used`; `slot_bytes` is the most one copy takes, overhead included.
    """

    name: str
    layout: PageLayout
    format: Format
    capacity_bytes: int
    slot_bytes: int

    @property
    @abstractmethod
    def bytes_used(self) -> int:
        """Bytes taken by reserved and stored copies, overhead included."""

    @property
    @abstractmethod
    def free_slots(self) -> int:
        """How many slots `reserve` could give right now."""

    @property
    @abstractmethod
    def capacity_slots(self) -> int:
        """How many copies the tier holds when each takes `slot_bytes`."""

    @property
    def used_slots(self) -> int:
        """How many slots are reserved or hold a copy. Where a copy may take less than `slot_bytes`, to be counted otherwise."""
        return self.bytes_used // self.slot_bytes

    @abstractmethod
    def reserve(self, count: int) -> list[int] | None:
        """`count` slots nobody else has, or None (and nothing reserved) when there are not that many."""

    @abstractmethod
    def free(self, slots: Sequence[int]) -> None:
        """Give slots back. The copies are gone, also after a restart (of a persistent tier: once `Tier.tidy` ran). IntegrityError, and
        nothing freed, if one of them is not reserved."""

    def exchange(self, slots: list[int], count: int) -> list[int] | None:
        """Give up these slots, which are in the order in which `reserve` would give them, and `reserve` `count`."""
        self.free(slots[::-1])
        return self.reserve(count)

    @abstractmethod
    def report(self) -> dict[str, object]:
        """What was achieved on this machine (memory locked, pinned, engine in use, ...), for `stats()` and `kvtier doctor`."""

    @abstractmethod
    def check_integrity(self) -> None:
        """IntegrityError if counters, free list and contents disagree. May be slow; for tests."""

    @abstractmethod
    def close(self) -> None:
        """Release memory and files. Safe to call twice."""


class DeviceSlots(Slots):
    """The tier the engine attends over: raw pages in the engine's memory, moved as tensors.

    The connector way of embedding implements this over blocks that belong to the engine.
    """

    def memory(self) -> torch.Tensor | None:
        """All slots as one contiguous tensor `[slots, *layout.shape]` in CPU memory, which codecs may then read and write in place; None
        where the slots are elsewhere, and `gather` and `scatter` have to carry pages."""
        return None

    @abstractmethod
    def gather(self, slots: Sequence[int]) -> torch.Tensor:
        """Pages `[n, layers, planes, page_tokens, kv_heads, head_dim]` of the layout's dtype, in CPU memory, as a copy."""

    @abstractmethod
    def scatter(self, slots: Sequence[int], pages: torch.Tensor, layers: slice = slice(None)) -> None:
        """Write pages `[n, len(layers), planes, page_tokens, kv_heads, head_dim]` (any device) into the slots' layers."""


class Tier(Slots):
    """A tier below the device: encoded pages that carry key, layout, format and checksum."""

    in_memory: bool = False
    """Whether `load` only looks at memory. Else it waits for reads, and a restore decodes each page while others are being read."""

    all_direct: bool = False
    """Whether `direct` knows every slot: a restore to a GPU then needs no memory of the mover's, however many pages it has."""

    reads_ahead: bool = False
    """Whether `place_ahead` begins reads and decoding that go on by themselves, on threads of the tier's, so that one transfer is enough to
    keep all of these busy."""

    compress: Literal["always", "auto"] = "always"
    """Whether a byte stage of `format` may rest while it does not pay."""

    refunds: bool = True
    """Whether a payload of less than the most bytes leaves room to others. Where not, a byte stage gains none and only "auto" uses it."""

    @abstractmethod
    def store(
        self, slots: Sequence[int], pages: Sequence[PageId], payloads: Sequence[Payload], digests: Sequence[bytes] | None = None
    ) -> list[Refused | None]:
        """Write one copy per slot; None = written, whole. A refused slot holds no copy and still has to be freed by the caller.

        `digests`: the xxh3-128 of each payload (`Format.encode_with_digests`), from callers who know them: then nobody has to read payloads
        once more to prove the copies later. Payloads are read, not kept. Never raises for a full or failing medium; IntegrityError for
        slots that are not reserved or already hold a copy.
        """

    def begin_store(
        self, slots: Sequence[int], pages: Sequence[PageId], payloads: Sequence[Payload], digests: Sequence[bytes] | None = None
    ) -> FinishStore:
        """Start to `store`, and give what waits for the end and answers as `store`: the caller makes the next payloads meanwhile.

        The memory of the payloads is the caller's again when this returns. What it gives is to be called once, whatever happens, before the
        slots are freed.
        """
        outcomes = self.store(slots, pages, payloads, digests)
        return lambda: outcomes

    @abstractmethod
    def load(self, slots: Sequence[int], keys: Sequence[PageKey], staging: NDArray[np.uint8]) -> list[Payload | Refused]:
        """Verified payloads, or why not.

        `staging` is uint8 `[>= len(slots), >= slot_bytes]` scratch memory owned by the caller; results may be views of it or of the
        tier's own memory, are not to be written to, and are valid until the caller reuses staging or lets the slots be freed. Short
        reads, wrong keys and wrong checksums are `Refused`, never exceptions.
        """

    def load_each(self, slots: Sequence[int], keys: Sequence[PageKey], staging: NDArray[np.uint8]) -> Loaded:
        """What `load` gives, as (index into `slots`, payload or why not), each once, in the order they become ready.

        Reading may begin with the first `next`, and goes on while the caller works on a payload. Close the generator when leaving early:
        afterwards nothing is read into `staging` any more, and what it gave stays valid as with `load`.
        """
        yield from enumerate(self.load(slots, keys, staging))

    def place_some(
        self, slots: Sequence[int], keys: Sequence[PageKey], staging: NDArray[np.uint8], memory: torch.Tensor, rows: Sequence[int]
    ) -> Placed:
        """As `load_each`, each time some or none, for a caller who decodes each payload into `memory[rows[i]]`, of what
        `DeviceSlots.memory` gives: tiers that do both at once, which is faster, do both. What they give as a payload is still to be
        decoded.

        A row is written only by a copy that proved itself.
        """
        del memory, rows
        return one_by_one(self.load_each(slots, keys, staging))

    def place_ahead(
        self, slots: Sequence[int], keys: Sequence[PageKey], staging: NDArray[np.uint8], memory: torch.Tensor, rows: Sequence[int]
    ) -> Placed | None:
        """As `place_some`, already begun, and going on by itself: for a caller who may not wait. Another thread may consume the result; it
        must be closed in any case. None from tiers that cannot, or not now."""
        del slots, keys, staging, memory, rows
        return None

    def direct(self, slots: Sequence[int]) -> Addresses:
        """Where in registered host memory the payload of each of these slots is or will be, for a GPU that copies by itself; 0 for those
        that are elsewhere, and must pass through the mover's memory.

        A reserved slot may be written there before `store` is given its room.
        """
        return np.zeros(len(slots), np.int64)

    def rooms(self, slots: Sequence[int]) -> list[Payload] | None:  # noqa: ARG002
        """The memory of these reserved slots, for payloads to be made in, which `store` then only proves. None from tiers without such."""
        return None

    def recover(self) -> Iterator[tuple[int, PageId]]:
        """Copies that survived from an earlier process, as (slot, id), parents before children, each slot already reserved.

        Called once, before the first `reserve`. Volatile tiers have none.
        """
        return iter(())

    def tidy(self) -> int:
        """Make what was freed unfindable for good; returns how many copies that took. Does I/O: for workers, beside any other call."""
        return 0

    def checkpoint(self) -> bool:
        """Make what was stored survive a power failure, as far as this tier can; False if that failed. Does I/O, like `tidy`."""
        return True


def one_by_one(loaded: Loaded) -> Placed:
    """What `load_each` gives as what `place_some` gives."""
    with closing(loaded):
        for each in loaded:
            yield [each]
