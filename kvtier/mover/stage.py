"""What happens to the bytes of one transfer: read and verify, decode, encode, write. Runs on a mover worker, holds no lock.

Scratch memory is bounded: each worker owns one staging buffer, and a transfer is carried in rounds that fit it. Towards the device, all
pages of a transfer are verified before the first layer is placed, so that whoever reads layer by layer never sees a page that fails later;
the mover's owner therefore makes device-bound transfers no larger than one round (`StagingPool.pages_per_round`).
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from kvtier.errors import ConfigError
from kvtier.mover.transfer import Move, Transfer
from kvtier.tiers.base import DeviceSlots, Refused, Slots, Tier

log = logging.getLogger(__name__)

LAYERS_AT_ONCE = 6
"""Layers decoded and placed per step of a restore: small enough to start early, large enough to keep the codecs busy."""


class StagingPool:
    """`buffers` equal buffers of scratch memory, together `total_bytes`; never less than one slot each."""

    def __init__(self, buffers: int, total_bytes: int, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self.pages_per_round = max(1, total_bytes // buffers // slot_bytes)
        self._idle: queue.SimpleQueue[NDArray[np.uint8]] = queue.SimpleQueue()
        try:
            for _ in range(buffers):
                self._idle.put(np.empty((self.pages_per_round, slot_bytes), np.uint8))
        except (MemoryError, ValueError) as error:
            raise ConfigError(f"mover.staging_bytes is {total_bytes}, more than this machine gives; lower it") from error

    @contextmanager
    def borrow(self) -> Iterator[NDArray[np.uint8]]:
        """One buffer `[pages_per_round, slot_bytes]`, given back at the end. There is one per worker, so this never waits long."""
        buffer = self._idle.get()
        try:
            yield buffer
        finally:
            self._idle.put(buffer)


def carry(transfer: Transfer, tiers: Sequence[Slots], staging: StagingPool) -> int:
    """Move the pages; refusals go to `transfer.refused` by index. Returns the encoded bytes that crossed the link."""
    source, target = tiers[transfer.source], tiers[transfer.target]
    moved = 0
    with staging.borrow() as scratch:
        for start in range(0, len(transfer.moves), len(scratch)):
            moves = transfer.moves[start : start + len(scratch)]
            if isinstance(source, DeviceSlots):
                assert isinstance(target, Tier)
                moved += _offload(transfer, start, moves, source, target)
            elif isinstance(target, DeviceSlots):
                assert isinstance(source, Tier)
                moved += _restore(transfer, start, moves, source, target, scratch)
            else:
                assert isinstance(source, Tier)
                assert isinstance(target, Tier)
                moved += _recode(transfer, start, moves, source, target, scratch)
    return moved


def _offload(transfer: Transfer, start: int, moves: Sequence[Move], source: DeviceSlots, target: Tier) -> int:
    pages = source.gather([move.source_slot for move in moves])
    payloads = target.format.encode(pages, target.layout)
    stored = target.store([move.target_slot for move in moves], [move.page for move in moves], payloads)
    _note(transfer, range(start, start + len(moves)), stored)
    return sum(len(payload) for payload, refused in zip(payloads, stored, strict=True) if refused is None)


def _restore(transfer: Transfer, start: int, moves: Sequence[Move], source: Tier, target: DeviceSlots, scratch: NDArray[np.uint8]) -> int:
    layout, codec = source.layout, source.format
    slots, packed, moved = [], [], 0
    for index, (move, payload) in enumerate(zip(moves, _load(source, moves, scratch), strict=True), start):
        if isinstance(payload, Refused):
            _lose(transfer, index, payload)
            continue
        try:
            packed += codec.unpack([payload], layout)
        except ValueError as error:
            _lose(transfer, index, _malformed(source, error))
            continue
        slots.append(move.target_slot)
        moved += len(payload)
    last = start + len(moves) == len(transfer.moves)
    for first in range(0, layout.layers, LAYERS_AT_ONCE):
        layers = slice(first, min(first + LAYERS_AT_ONCE, layout.layers))
        if slots:
            target.scatter(slots, codec.decode(packed, layout, layers), layers)
        if last:
            transfer.placed(layers.stop)
    return moved


def _recode(transfer: Transfer, start: int, moves: Sequence[Move], source: Tier, target: Tier, scratch: NDArray[np.uint8]) -> int:
    layout = source.layout
    good, payloads = [], []
    for index, payload in enumerate(_load(source, moves, scratch), start):
        if isinstance(payload, Refused):
            _lose(transfer, index, payload)
            continue
        if source.format.name != target.format.name:
            try:
                pages = source.format.decode(source.format.unpack([payload], layout), layout)
            except ValueError as error:
                _lose(transfer, index, _malformed(source, error))
                continue
            payload = target.format.encode(pages, layout)[0]
        good.append(index)
        payloads.append(payload)
    chosen = [transfer.moves[index] for index in good]
    stored = target.store([move.target_slot for move in chosen], [move.page for move in chosen], payloads)
    _note(transfer, good, stored)
    return sum(len(payload) for payload, refused in zip(payloads, stored, strict=True) if refused is None)


def _load(source: Tier, moves: Sequence[Move], scratch: NDArray[np.uint8]) -> Sequence[NDArray[np.uint8] | Refused]:
    return source.load([move.source_slot for move in moves], [move.page.key for move in moves], scratch)


def _malformed(source: Tier, error: ValueError) -> Refused:
    """A payload that verified but is not what its format writes. The reason is a label of a counter; the log has the details."""
    log.warning("tier %s holds a payload that is no %s: %s", source.name, source.format.name, error)
    return Refused("format")


def _lose(transfer: Transfer, index: int, refused: Refused) -> None:
    transfer.refused[index] = refused
    transfer.lost.add(index)


def _note(transfer: Transfer, indices: Sequence[int], stored: Sequence[Refused | None]) -> None:
    for index, refused in zip(indices, stored, strict=True):
        if refused is not None:
            transfer.refused[index] = refused
