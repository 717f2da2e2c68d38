"""Blocks in a caller's memory as slots: what an engine lends for one operation, in the layout it has there.

A slot is lent, used by one transfer and taken back; the table of lent blocks belongs to the owner's lock, the bytes to the transfer that
was given the slot. Pages are `[layers, planes, page_tokens, kv_heads, head_dim]` everywhere else in kvtier; engines order the same numbers
otherwise inside their blocks, which `BlockLayout` says and `gather` and `scatter` undo.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvtier.errors import IntegrityError, LayoutError
from kvtier.formats import get_format
from kvtier.layout import DTYPE_BYTES, PageLayout
from kvtier.tiers.base import DeviceSlots

AXES = "LPTHD"
"""Layers, planes (keys, values), tokens, heads, values of a head: the order of kvtier's own pages, from the slowest to the fastest axis."""
Part = NDArray[np.uint8]
Parts = tuple[Part, ...]
"""A block as its caller has it: the bytes of these arrays, each flat and contiguous, one after the other."""
_BITS = {2: np.int16, 4: np.int32}


@dataclass(frozen=True)
class BlockLayout:
    """How the numbers of a block lie in the caller's memory.

    `page`: their numbers along each axis and their dtype. `keys` and `values`: the order of the axes, slowest first, which may differ
    behind the planes' axis (vLLM's CPU backend stores keys transposed: "LHPDT" and "LHPTD"). `known` is False for blocks whose inside
    nobody knows (`opaque`): such may only be kept without loss. LayoutError for orders that are none.
    """

    page: PageLayout
    keys: str = AXES
    values: str = AXES
    known: bool = True

    def __post_init__(self) -> None:
        for name, order in (("keys", self.keys), ("values", self.values)):
            if sorted(order) != sorted(AXES):
                raise LayoutError(f"block layout: the axes of {name} are {order!r}; expected each of the letters {AXES} once")
        before = [order.partition("P")[0] for order in (self.keys, self.values)]
        if before[0] != before[1]:
            raise LayoutError(f"block layout: {self.keys} for keys and {self.values} for values; up to P they must be alike")

    @classmethod
    def opaque(cls, block_bytes: int, number_bytes: int = 2) -> BlockLayout:
        """Blocks of `block_bytes` that mean nothing to kvtier, rows of numbers of 2 or 4 bytes (which a byte stage compresses apart)."""
        dtype = {2: "bf16", 4: "fp32"}.get(number_bytes)
        if dtype is None or block_bytes < 1 or block_bytes % number_bytes:
            raise LayoutError(
                f"blocks of {block_bytes} bytes, numbers of {number_bytes}; expected a positive multiple of numbers of 2 or 4 bytes"
            )
        return cls(PageLayout(1, 1, 1, 1, block_bytes // number_bytes, dtype), known=False)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self.page.page_bytes

    @cached_property
    def is_page(self) -> bool:
        """Whether a block's bytes are those of a kvtier page."""
        return self.keys == self.values == AXES

    def planes_of(self, block: Part) -> list[NDArray[np.generic]]:
        """Views of a contiguous block, one a plane, each `[layers, tokens, heads, head_dim]`, of whole numbers as wide as the block's."""
        page = self.page
        sizes = dict(zip(AXES, page.shape, strict=True))
        numbers = block.view(_BITS[DTYPE_BYTES[page.dtype]])
        views = []
        for plane, order in zip(range(page.planes), (self.keys, self.values), strict=False):
            whole = numbers.reshape([sizes[axis] for axis in order])
            views.append(whole.transpose([order.index(axis) for axis in AXES])[:, plane])
        return views


def parts_of(block: Any, block_bytes: int, writable: bool) -> Parts:
    """What a caller gave for a block, as flat arrays of bytes: one buffer (bytes, memoryview, NumPy array) or a list of them.

    LayoutError unless they are contiguous, of `block_bytes` together, and writable where they have to be.
    """
    given = block if isinstance(block, list | tuple) else [block]
    parts = []
    for each in given:
        try:
            view = memoryview(each)
        except TypeError:
            raise LayoutError(f"a block is {type(each).__name__}; expected a buffer of bytes (memoryview, NumPy array)") from None
        if not view.c_contiguous or (writable and view.readonly):
            kind = "read-only" if view.c_contiguous else "not contiguous"
            raise LayoutError(f"a block's memory is {kind}; expected contiguous memory{' that can be written' * writable}")
        parts.append(np.frombuffer(view, np.uint8) if view.nbytes else np.empty(0, np.uint8))
    total = sum(part.nbytes for part in parts)
    if total != block_bytes:
        raise LayoutError(f"a block has {total} bytes; expected {block_bytes}, as the store was opened with")
    return tuple(parts)


class LentBlocks(DeviceSlots):
    """The blocks that callers lend for operations under way, in `blocks`' layout; any number of slots."""

    name = "caller"

    def __init__(self, blocks: BlockLayout) -> None:
        self.blocks = blocks
        self.layout = blocks.page
        self.format = get_format("raw")
        self.slot_bytes = blocks.block_bytes
        self._lent: dict[int, Parts] = {}
        self._next = 0

    @property
    def capacity_bytes(self) -> int:  # type: ignore[override]  # whatever callers lend
        return self.bytes_used

    @property
    def bytes_used(self) -> int:
        return len(self._lent) * self.slot_bytes

    @property
    def free_slots(self) -> int:
        return 0

    @property
    def capacity_slots(self) -> int:
        return len(self._lent)

    def reserve(self, count: int) -> list[int] | None:
        return None if count else []

    def lend(self, blocks: Sequence[Parts]) -> list[int]:
        """Slots for these blocks, until `free`."""
        slots = list(range(self._next, self._next + len(blocks)))
        self._next += len(blocks)
        self._lent.update(zip(slots, blocks, strict=True))
        return slots

    def free(self, slots: Sequence[int]) -> None:
        if missing := [slot for slot in slots if slot not in self._lent]:
            raise IntegrityError(f"lent slots {missing} are given back, but nobody lent them")
        for slot in slots:
            del self._lent[slot]

    def gather(self, slots: Sequence[int]) -> torch.Tensor:
        layout = self.layout
        pages = torch.empty((len(slots), *layout.shape), dtype=layout.torch_dtype)
        for slot, page in zip(slots, _bits(pages), strict=True):
            parts = self._lent[slot]
            if self.blocks.is_page:
                _join(parts, page.reshape(-1).view(np.uint8))
            else:
                block = parts[0] if len(parts) == 1 else _join(parts, np.empty(self.slot_bytes, np.uint8))
                for plane, numbers in enumerate(self.blocks.planes_of(block)):
                    page[:, plane] = numbers
        return pages

    def scatter(self, slots: Sequence[int], pages: torch.Tensor, layers: slice = slice(None)) -> None:
        whole = range(self.layout.layers)[layers] == range(self.layout.layers)
        for slot, page in zip(slots, _bits(pages), strict=True):
            parts = self._lent[slot]
            if self.blocks.is_page and whole:
                _cut(np.ascontiguousarray(page).reshape(-1).view(np.uint8), parts)
                continue
            block = parts[0] if len(parts) == 1 else _join(parts, np.empty(self.slot_bytes, np.uint8))
            for plane, numbers in enumerate(self.blocks.planes_of(block)):
                numbers[layers] = page[:, plane]
            if len(parts) > 1:
                _cut(block, parts)

    def report(self) -> dict[str, object]:
        return {"lent": len(self._lent)}

    def check_integrity(self) -> None:
        """Nothing can disagree here."""

    def close(self) -> None:
        self._lent.clear()


def _bits(pages: torch.Tensor) -> NDArray[np.generic]:
    """The numbers of `pages` as whole numbers: a view, which NumPy copies faster than torch and without waking its threads."""
    bits: NDArray[np.generic] = pages.detach().view({2: torch.int16, 4: torch.int32}[pages.element_size()]).numpy()
    return bits


def _join(parts: Parts, into: Part) -> Part:
    start = 0
    for part in parts:
        into[start : start + part.nbytes] = part
        start += part.nbytes
    return into


def _cut(block: Part, parts: Parts) -> None:
    start = 0
    for part in parts:
        part[:] = block[start : start + part.nbytes]
        start += part.nbytes
