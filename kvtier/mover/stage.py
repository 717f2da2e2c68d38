"""What happens to the bytes of one transfer: read and verify, decode, encode, write. Runs on a mover worker, holds no lock.

Scratch memory is bounded (`staging.py`): each worker owns one `Scratch`, and a transfer is carried in rounds that fit it. Towards the
device, the pages of a transfer count as placed only when all of them are verified, so that whoever reads layer by layer never sees a page
that fails later; the mover's owner therefore makes device-bound transfers no larger than one round (`StagingPool.pages_in_one`). From
memory, layers are then decoded one after the other and announced as they are placed. From files, where reading is what takes long, each
page is decoded as soon as its bytes are verified, by the tier itself where it can, while others are still being read, and all layers are
announced at the end; where the tier can do that without a worker, it begins before one is awake (`begin`, on the mover's loop). Towards
memory, pages are encoded where they stay; towards files, a piece is written while the next is made (`behind.py`). To and from a GPU, see
`lane.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain

from kvtier.formats.base import Format, Payload
from kvtier.layout import PageLayout
from kvtier.mover.behind import WriteBehind
from kvtier.mover.lane import Lane
from kvtier.mover.packing import Packer
from kvtier.mover.plan import layers_per_step, pages_per_arrival, pages_per_write, pieces
from kvtier.mover.staging import Scratch, StagingPool
from kvtier.mover.transfer import Move, Transfer
from kvtier.tiers.base import DeviceSlots, Placed, Refused, Slots, Tier
from kvtier.tiers.disk import DiskTier
from kvtier.tiers.gpu import GpuPool

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ahead:
    """Reads of a transfer that go on before a worker takes it up, and the scratch memory they are in. To be closed by whoever has it."""

    copies: Placed
    scratch: Scratch
    staging: StagingPool

    def close(self) -> None:
        """End the reads and give the memory back."""
        try:
            self.copies.close()
        finally:
            self.staging.give_back(self.scratch)


def begin(transfer: Transfer, tiers: Sequence[Slots], staging: StagingPool) -> Ahead | None:
    """Begin to read the pages of a transfer that a thread is free for, without waiting; None where that cannot be."""
    source, target = tiers[transfer.source], tiers[transfer.target]
    memory = target.memory() if isinstance(target, DeviceSlots) else None
    if memory is None or not isinstance(source, Tier) or source.in_memory or len(transfer.moves) > staging.pages_in_one(source, target):
        return None
    scratch = staging.take()
    if scratch is None:
        return None
    copies: Placed | None = None
    try:
        copies = source.place_ahead(*_copies_of(transfer.moves), scratch.encoded, memory, [move.target_slot for move in transfer.moves])
    finally:
        if copies is None:
            staging.give_back(scratch)
    return None if copies is None else Ahead(copies, scratch, staging)


def carry(transfer: Transfer, tiers: Sequence[Slots], staging: StagingPool, ahead: Ahead | None = None) -> int:
    """Move the pages; refusals go to `transfer.refused` by index. Returns the encoded bytes that crossed the link.

    `ahead`: what `begin` gave for it.
    """
    source, target = tiers[transfer.source], tiers[transfer.target]
    if ahead is not None and isinstance(source, Tier) and isinstance(target, DeviceSlots):
        with closing(ahead):
            return _restore(transfer, 0, transfer.moves, source, target, ahead.scratch, ahead.copies)
    moved = 0
    with staging.borrow() as scratch:
        step = staging.pages_in_one(source, target)
        for start in range(0, len(transfer.moves), step):
            moves = transfer.moves[start : start + step]
            match source, target:
                case GpuPool(), Tier():
                    moved += _offload_from_gpu(transfer, start, moves, source, target, staging, scratch)
                case Tier(), GpuPool():
                    moved += _restore_to_gpu(transfer, start, moves, source, target, staging, scratch)
                case DeviceSlots(), Tier():
                    moved += _offload(transfer, start, moves, source, target, staging.packers[target.name], scratch)
                case Tier(), DeviceSlots():
                    moved += _restore(transfer, start, moves, source, target, scratch)
                case Tier(), Tier():
                    moved += _recode(transfer, start, moves, source, target, staging.packers[target.name], scratch)
                case _:
                    raise TypeError(f"no way from {source.name} to {target.name}")
    return moved


def _offload(
    transfer: Transfer, start: int, moves: Sequence[Move], source: DeviceSlots, target: Tier, packer: Packer, scratch: Scratch
) -> int:
    with closing(WriteBehind(transfer, packer)) as writes:
        for piece in pieces(len(moves), _pages_at_once(len(moves), target, scratch)):
            some = moves[piece]
            slots, room = [move.source_slot for move in some], _room(target, some, scratch)
            memory, first = source.memory(), _first(some)
            if memory is not None:
                encoded = packer.encode(memory, slots, room, first)
            else:
                encoded = packer.encode(source.gather(slots), None, room, first)
            writes.store(range(start + piece.start, start + piece.stop), *encoded, piece.stop == len(moves))
    return writes.moved


def _restore(
    transfer: Transfer,
    start: int,
    moves: Sequence[Move],
    source: Tier,
    target: DeviceSlots,
    scratch: Scratch,
    ahead: Placed | None = None,
) -> int:
    if source.in_memory:
        moved = _restore_by_layer(transfer, start, moves, source, target, scratch)
    else:
        moved = _restore_as_read(transfer, start, moves, source, target, scratch, ahead)
    if start + len(moves) == len(transfer.moves):
        transfer.placed(source.layout.layers)
    return moved


def _restore_by_layer(transfer: Transfer, start: int, moves: Sequence[Move], source: Tier, target: DeviceSlots, scratch: Scratch) -> int:
    layout = source.layout
    slots, payloads, moved = [], [], 0
    for index, payload in _loaded(transfer, range(start, start + len(moves)), source, scratch):
        slots.append(transfer.moves[index].target_slot)
        payloads.append(payload)
        moved += len(payload)
    last = start + len(moves) == len(transfer.moves)
    step = layers_per_step(max(1, len(slots)), layout.layers, layout.page_bytes)
    for first in range(0, layout.layers, step):
        layers = slice(first, min(first + step, layout.layers))
        if slots:
            _place(target, slots, payloads, layers, source.format, scratch)
        if last:
            transfer.placed(layers.stop)
    return moved


def _restore_as_read(
    transfer: Transfer, start: int, moves: Sequence[Move], source: Tier, target: DeviceSlots, scratch: Scratch, ahead: Placed | None
) -> int:
    at_once = pages_per_arrival(source.layout.page_bytes, len(scratch.pages))
    slots: list[int] = []
    payloads: list[Payload] = []
    moved = 0
    for index, arrived in _arriving(transfer, range(start, start + len(moves)), source, target, scratch, ahead):
        if isinstance(arrived, int):
            moved += arrived
            continue
        slots.append(transfer.moves[index].target_slot)
        payloads.append(arrived)
        moved += len(arrived)
        if len(slots) == at_once:
            _place(target, slots, payloads, slice(None), source.format, scratch)
            slots, payloads = [], []
    if slots:
        _place(target, slots, payloads, slice(None), source.format, scratch)
    return moved


def _offload_from_gpu(
    transfer: Transfer, start: int, moves: Sequence[Move], source: GpuPool, target: Tier, staging: StagingPool, scratch: Scratch
) -> int:
    lane, packer = _lane(scratch), staging.packers[target.name]
    payloads = lane.offload(source, target, staging.lane_formats[target.name], moves, _first(moves))
    return _store(transfer, range(start, start + len(moves)), packer, packer.pack(payloads, list(scratch.encoded[: len(moves)])))


def _restore_to_gpu(
    transfer: Transfer, start: int, moves: Sequence[Move], source: Tier, target: GpuPool, staging: StagingPool, scratch: Scratch
) -> int:
    lane, moved, form = _lane(scratch), 0, staging.lane_formats[source.name]
    last = start + len(moves) == len(transfer.moves)
    indices: Sequence[int] = range(start, start + len(moves))
    if scratch.direct is not None and isinstance(source, DiskTier):
        indices = [start + place for place in scratch.direct.restore(source, target, form, moves, lane.stream)]
        moved = (len(moves) - len(indices)) * form.payload_bytes
    places = {index: place for place, index in enumerate(indices)}

    def arrived() -> Generator[tuple[int, Payload], None, None]:
        nonlocal moved
        for index, payload in _loaded(transfer, indices, source, scratch):
            moved += len(payload)
            yield places[index], payload

    with closing(arrived()) as payloads:
        lane.restore(source, target, form, [transfer.moves[index] for index in indices], payloads, transfer.placed if last else None)
    return moved


def _lane(scratch: Scratch) -> Lane:
    if scratch.lane is None:
        raise TypeError("a worker without a lane is asked to carry pages of a GPU")
    return scratch.lane


def _recode(transfer: Transfer, start: int, moves: Sequence[Move], source: Tier, target: Tier, packer: Packer, scratch: Scratch) -> int:
    layout, same = source.layout, source.format.name == target.format.name
    with closing(WriteBehind(transfer, packer)) as writes:
        for piece in pieces(len(moves), _pages_at_once(len(moves), target, scratch)):
            indices: list[int] = []
            payloads: list[Payload] = []
            digests: list[bytes] | None = None
            for index, payload in _loaded(transfer, range(start + piece.start, start + piece.stop), source, scratch, unpack=not same):
                indices.append(index)
                payloads.append(payload)
            if not same:
                pages = source.format.decode(payloads, layout, out=scratch.pages)[: len(payloads)]
                # What was loaded is decoded by now, so its room is free again.
                some = [transfer.moves[index] for index in indices]
                payloads, digests = packer.encode(pages, None, _room(target, some, scratch), _first(some))
            writes.store(indices, payloads, digests, piece.stop == len(moves))
    return writes.moved


def _room(target: Tier, moves: Sequence[Move], scratch: Scratch) -> list[Payload]:
    """Where to encode the pages of these moves: where they are to be, if that is memory, and in the worker's else."""
    return target.rooms([move.target_slot for move in moves]) or list(scratch.encoded[: len(moves)])


def _pages_at_once(pages: int, target: Tier, scratch: Scratch) -> int:
    """Pages to code before they are written: as many as the cache is for, fewer where the next are coded while these are written."""
    return len(scratch.pages) if target.in_memory else pages_per_write(pages, target.slot_bytes, len(scratch.pages))


def _loaded(
    transfer: Transfer, indices: Sequence[int], source: Tier, scratch: Scratch, unpack: bool = True
) -> Iterator[tuple[int, Payload]]:
    """Verified payloads of these moves as they become ready, with the index of their move; refusals are noted and left out."""
    moves = [transfer.moves[index] for index in indices]
    slots, keys = _copies_of(moves)
    with closing(source.load_each(slots, keys, scratch.encoded)) as copies:
        for place, payload in copies:
            if isinstance(payload, Refused):
                _lose(transfer, indices[place], payload)
            elif not unpack:
                yield indices[place], payload
            elif (unpacked := _unpacked(transfer, indices[place], source, payload)) is not None:
                yield indices[place], unpacked


def _arriving(
    transfer: Transfer, indices: Sequence[int], source: Tier, target: DeviceSlots, scratch: Scratch, ahead: Placed | None
) -> Iterator[tuple[int, Payload | int]]:
    """As `_loaded`, or instead of a payload how many bytes the tier has decoded to where they belong. `ahead`: what has begun already."""
    memory = target.memory()
    if memory is None:
        yield from _loaded(transfer, indices, source, scratch)
        return
    moves = [transfer.moves[index] for index in indices]
    if ahead is None:
        ahead = source.place_some(*_copies_of(moves), scratch.encoded, memory, [move.target_slot for move in moves])
    with closing(ahead) as groups:
        for place, copy in chain.from_iterable(groups):
            if isinstance(copy, int):
                yield indices[place], copy
            elif isinstance(copy, Refused):
                _lose(transfer, indices[place], copy)
            elif (unpacked := _unpacked(transfer, indices[place], source, copy)) is not None:
                yield indices[place], unpacked


def _copies_of(moves: Sequence[Move]) -> tuple[list[int], list[bytes]]:
    """The slots that these are read from, and the keys that must be found there."""
    return [move.source_slot for move in moves], [move.page.key for move in moves]


def _unpacked(transfer: Transfer, index: int, source: Tier, payload: Payload) -> Payload | None:
    """What `decode` takes; None, and the loss noted, if it is not what the tier's format writes."""
    try:
        return source.format.unpack([payload], source.layout)[0]
    except ValueError as error:
        _lose(transfer, index, _malformed(source, error))
        return None


def _place(target: DeviceSlots, slots: Sequence[int], payloads: Sequence[Payload], layers: slice, codec: Format, scratch: Scratch) -> None:
    """Decode into the target's slots, in place where it is memory that the codecs can reach."""
    layout: PageLayout = target.layout
    memory = target.memory()
    if memory is not None:
        codec.decode(payloads, layout, layers, memory[:, layers], slots)
        return
    for piece in pieces(len(slots), len(scratch.pages)):
        pages = codec.decode(payloads[piece], layout, layers, scratch.pages[:, layers])
        target.scatter(slots[piece], pages[: piece.stop - piece.start], layers)


def _store(transfer: Transfer, indices: Sequence[int], packer: Packer, payloads: Sequence[Payload]) -> int:
    """Write one payload per index into its move's target slot; returns the bytes written."""
    with closing(WriteBehind(transfer, packer)) as writes:
        writes.store(indices, payloads, None, last=True)
    return writes.moved


def _first(moves: Sequence[Move]) -> list[int]:
    """Which of these pages begin a sequence."""
    return [index for index, move in enumerate(moves) if move.page.depth == 0]


def _malformed(source: Tier, error: ValueError) -> Refused:
    """A payload that verified but is not what its format writes. The reason is a label of a counter; the log has the details."""
    log.warning("tier %s holds a payload that is no %s: %s", source.name, source.format.name, error)
    return Refused("format")


def _lose(transfer: Transfer, index: int, refused: Refused) -> None:
    transfer.refused[index] = refused
    transfer.lost.add(index)
