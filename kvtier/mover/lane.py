"""A lane to a GPU: what one worker copies and codes with, on a stream of its own, beside the engine's.

Towards the GPU, encoded bytes are copied from registered host memory straight into the pool (raw pages), or beside it and decoded
there; step by step, a few layers of all pages at once, with an event behind each step, so that the engine's stream waits for no more than
it reads. Away from it, pages are encoded beside the pool and copied straight to where the host tier keeps them. The worker sleeps until the
last event before anybody learns that the transfer ended: until then its slots on both sides belong to it, also if a launch fails half way.

Bytes that lie where the GPU reads them itself are on their way before they are verified: raw ones to the slots that they are for, of which
nobody knows yet, encoded ones as far as the lane's room goes. They are decoded, and anybody is told, only when all are verified.

Copies go by the copy engines or by a kernel, whichever `Crossover` says is faster. Before a lane touches the pool, its stream waits for
every use that engines noted (`GpuPool.fences`).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch

from kvtier.cuda.fences import drained
from kvtier.cuda.registration import Registration
from kvtier.cuda.surface import Accelerator, Addresses, Event, Stream
from kvtier.errors import ConfigError, DeviceError
from kvtier.formats.base import Format, Payload
from kvtier.formats.blocks import BlockFormat
from kvtier.formats.lossless import Staged
from kvtier.formats.on_device import decode_pages, encode_pages
from kvtier.layout import PageLayout
from kvtier.memory.region import aligned_array
from kvtier.mover.crossover import UNIT_BYTES, Crossover, Way, measured
from kvtier.mover.transfer import Move
from kvtier.tiers.base import Tier
from kvtier.tiers.gpu import GpuPool

log = logging.getLogger(__name__)

STEP_BYTES = 8 << 20
"""Bytes to copy behind one event: 150 us of a fast link, in which the next step is launched."""
ROOM_BYTES = 32 << 20
"""What a lane takes of a GPU's memory (of a small one a thousandth): one layer of 1,000 pages of a Llama-3-8B in q8."""
LINK_SPEED = 2
"""How many times as fast as one worker verifies bytes, a link of 50 GB/s carries them."""
_ROW_ALIGNMENT = 256
Announce = Callable[[int, Event], None]


class LaneFormat:
    """What a tier's format is to a lane: `inner` without its byte stage, which stays on the host, and where layers begin in its payloads.

    `widest_bytes`: what the largest layer of a payload takes on the GPU. `is_plain`: payloads are the pages' own bytes, and copies are all
    they need. ConfigError for formats that a GPU cannot code.
    """

    def __init__(self, format: Format, layout: PageLayout) -> None:
        inner = format.inner if isinstance(format, Staged) else format
        if not isinstance(inner, BlockFormat):
            raise ConfigError(f"format {format.name} is not made of blocks, so a GPU cannot code it; use another one, or device.place cpu")
        self.inner = inner
        self.payload_bytes = inner.payload_bytes(layout)
        self.layer_starts = inner.layer_starts(layout)
        self.is_plain = inner.is_plain
        self.widest_bytes = max(_aligned(stop - start) for start, stop in pairwise(self.layer_starts))


def lane_row_bytes(formats: Iterable[LaneFormat]) -> int:
    """Bytes of a row that holds a payload of any of these formats; 0 for none."""
    return max([_aligned(each.payload_bytes) for each in formats], default=0)


def layers_per_step(pages: int, form: LaneFormat) -> int:
    """Layers to copy at once: as few as are worth an event."""
    layers = len(form.layer_starts) - 1
    return max(1, min(layers, -(-STEP_BYTES * layers // max(1, pages * form.payload_bytes))))


class Lane:
    """Room for `pages` payloads of at most `row_bytes` on the host, registered; at least as much on the GPU. DeviceError without either.

    `lanes`: how many share the link. `crossover` says which way copies go; whoever opens lanes sets it (`measure`).
    """

    def __init__(self, accelerator: Accelerator, pages: int, row_bytes: int, lanes: int = 1) -> None:
        self._accelerator = accelerator
        self._lanes = lanes
        self.crossover = Crossover(why="it was not measured")
        self.stream: Stream = accelerator.new_stream()
        self._room_bytes = max(pages * row_bytes, min(ROOM_BYTES, accelerator.memory()[1] // 1024))
        # Before and behind: see `_window`.
        self._device = accelerator.allocate(self._room_bytes + 2 * row_bytes + _ROW_ALIGNMENT)
        self._pad_bytes = row_bytes
        self._host = aligned_array(pages * row_bytes).reshape(pages, row_bytes)
        self._registration = Registration(accelerator, self._host.ctypes.data, self._host.nbytes, row_bytes)
        if self._registration.why:
            self._registration.undo()
            raise DeviceError(f"host memory of that size cannot be registered: {self._registration.why}")
        self._host_rows: Addresses = self._host.ctypes.data + np.arange(pages, dtype=np.int64) * row_bytes

    def measure(self) -> Crossover:
        """How long copy engines and the kernel take between this lane's memory and its GPU. Nothing else may use the lane meanwhile."""
        with self._accelerator.beside_captures():
            why = self._accelerator.why_no_kernel_copies()
        if why:
            return Crossover(why=why)
        device, host = -(-self._device.data_ptr() // UNIT_BYTES) * UNIT_BYTES, self._host.ctypes.data

        def seconds(way: Way, by_kernel: bool, copies: int, size_bytes: int) -> float:
            places = np.arange(copies, dtype=np.int64) * size_bytes
            scattered = np.random.default_rng(0).permutation(places)  # neighbours would be one copy
            return self.stream.seconds(partial(self._launch, way, device + places, host + scattered, size_bytes, by_kernel))

        try:
            with self._accelerator.beside_captures(), drained(self.stream):
                return measured(seconds, min(self._host.nbytes, self._room_bytes))
        except DeviceError as error:
            log.warning("copies by a kernel were tried and failed; the copy engines do it: %s", error)
            return Crossover(why=f"copies by a kernel were tried and failed: {error}")

    def most_pages(self, form: LaneFormat) -> int:
        """The most pages of one `restore` from memory that the GPU reads itself: a layer of them has to fit, unless they are plain."""
        return sys.maxsize if form.is_plain else max(len(self._host), self._room_bytes // form.widest_bytes)

    def restore(
        self,
        source: Tier,
        target: GpuPool,
        form: LaneFormat,
        moves: Sequence[Move],
        arrived: Iterable[tuple[int, Payload]],
        announce: Announce | None,
    ) -> None:
        """Bring pages of `source`, at most `most_pages`, to their slots; on return those that verified are there.

        `arrived`: the verified payloads, as they become ready, with the index of their move; what is missing at its end did not verify.
        `announce(layers, event)` is called for what is launched once `arrived` has ended. DeviceError if the GPU fails; then nothing of
        this is under way any more.
        """
        stream, steps = self.stream, self._steps(form, len(moves))
        places, slots = source.direct([move.source_slot for move in moves]), [move.target_slot for move in moves]
        pages = target.addresses(slots)
        rows: list[int] | None = None
        with self._accelerator.beside_captures(), drained(stream):
            target.fences.before(stream)
            reachable = bool(places.all())
            ahead = self._copy_ahead(form, pages, places, steps) if reachable else []
            indices = [index for index, _ in arrived] if reachable else self._await_all(arrived, places)
            if len(indices) < len(moves):
                places, pages, rows, slots = places[indices], pages[indices], indices, [slots[index] for index in indices]
            for number, layers in enumerate(steps):
                event: Event | None = None
                if number < len(ahead):
                    coded, event = ahead[number]
                else:
                    coded, rows = self._copy(form, pages, places, layers), None
                if coded is not None:
                    stream.run(partial(decode_pages, form.inner, coded, target.paged, slots, rows, layers))
                if announce is not None:
                    announce(layers.stop, event or stream.record())

    def offload(self, source: GpuPool, target: Tier, form: LaneFormat, moves: Sequence[Move], first: Sequence[int]) -> list[Payload]:
        """The pages of `moves` as payloads without byte stage: where `target.direct` says, or in this lane's memory until its next use.

        `first`: which of them begin a sequence. DeviceError if the GPU fails; then nothing of this is under way any more.
        """
        slots, count, size, stream = [move.source_slot for move in moves], len(moves), form.payload_bytes, self.stream
        targets = [move.target_slot for move in moves]
        direct = target.direct(targets)
        places = np.where(direct == 0, self._host_rows[:count], direct)
        with self._accelerator.beside_captures(), drained(stream):
            source.fences.before(stream)
            if form.is_plain:
                self._carry("d2h", source.addresses(slots), places, size)
            else:
                coded, rows = self._window(count, size, 0, size)
                stream.run(partial(encode_pages, form.inner, source.paged, slots, coded, None, first))
                self._carry("d2h", rows, places, size)
        rooms = (target.rooms(targets) if direct.any() else None) or self._host
        return [room if address else row[:size] for address, room, row in zip(direct.tolist(), rooms, self._host, strict=False)]

    def close(self) -> None:
        """Give the registration back."""
        self._registration.undo()

    def _steps(self, form: LaneFormat, pages: int) -> list[slice]:
        """All layers, in parts of which each of `pages` pages fits this lane's room."""
        layers, step = len(form.layer_starts) - 1, layers_per_step(pages, form)
        if not form.is_plain and pages:
            step = max(1, min(step, self._room_bytes // (pages * form.widest_bytes)))
        return [slice(first, min(first + step, layers)) for first in range(0, layers, step)]

    def _copy_ahead(
        self, form: LaneFormat, pages: Addresses, places: Addresses, steps: Sequence[slice]
    ) -> list[tuple[torch.Tensor | None, Event | None]]:
        """Launch the copies of the first steps: where their bytes are to be decoded, or when they are there.

        Raw pages: of all steps. Encoded ones: as far as there is room, and as the link carries while they are verified; decoding would
        wait for more.
        """
        copied: list[tuple[torch.Tensor | None, Event | None]] = []
        count, starts, used = len(places), form.layer_starts, 0
        meanwhile = LINK_SPEED * count * form.payload_bytes // self._lanes
        for layers in steps:
            room = count * _aligned(starts[layers.stop] - starts[layers.start])
            fits = used + room <= self._room_bytes and count * starts[layers.stop] <= meanwhile
            if not (form.is_plain or fits or not copied):
                break
            coded = self._copy(form, pages, places, layers, used)
            copied.append((coded, self.stream.record() if coded is None else None))
            used += room
        return copied

    def _await_all(self, arrived: Iterable[tuple[int, Payload]], places: Addresses) -> list[int]:
        """The indices of what verified; what the GPU cannot read where it is, is copied to this lane's memory, and `places` says where."""
        indices: list[int] = []
        for index, payload in arrived:
            if not places[index]:
                row = len(indices)
                self._host[row, : len(payload)] = payload
                places[index] = self._host_rows[row]
            indices.append(index)
        return indices

    def _copy(self, form: LaneFormat, pages: Addresses, places: Addresses, layers: slice, skip: int = 0) -> torch.Tensor | None:
        """Launch the copies of these layers: raw ones to their pages (None), encoded ones into the lane's room, `skip` bytes behind its
        beginning (the window to decode them from)."""
        begin = form.layer_starts[layers.start]
        size = form.layer_starts[layers.stop] - begin
        if form.is_plain:
            self._carry("h2d", pages + begin, places + begin, size)
            return None
        coded, rows = self._window(len(places), form.payload_bytes, begin, size, skip)
        self._carry("h2d", rows, places + begin, size)
        return coded

    def _carry(self, way: Way, device: Addresses, host: Addresses, size: int) -> None:
        """Launch copies between the GPU's memory and registered host memory, the way that is faster for so many of that size."""
        by_kernel = self.crossover.by_kernel(way, len(host), size) and _kernel_can(device, host, size)
        self._launch(way, device, host, size, by_kernel)

    def _launch(self, way: Way, device: Addresses, host: Addresses, size: int, by_kernel: bool) -> None:
        if by_kernel:
            self.stream.copy_by_kernel(device, host, size, to_host=way == "d2h")
        elif way == "d2h":
            self.stream.copy(host, device, size)
        else:
            self.stream.copy(device, host, size)

    def _window(self, count: int, payload_bytes: int, begin: int, size: int, skip: int = 0) -> tuple[torch.Tensor, Addresses]:
        """Room on the GPU for bytes `begin` to `begin + size` of `count` payloads: a tensor `[count, payload_bytes]` of which only these
        columns may be touched, because the rows lie closer together than they are long; and the address of byte `begin` of each."""
        stride = _aligned(size)
        offset = _aligned(self._pad_bytes) - begin // _ROW_ALIGNMENT * _ROW_ALIGNMENT + skip
        tensor = self._device.as_strided((count, payload_bytes), (stride, 1), offset)
        return tensor, self._device.data_ptr() + offset + begin + np.arange(count, dtype=np.int64) * stride


def _kernel_can(device: Addresses, host: Addresses, size: int) -> bool:
    """Whether a kernel takes these copies: everything is a multiple of its unit."""
    return not (int(np.bitwise_or.reduce(device | host, initial=0)) | size) % UNIT_BYTES


def _aligned(size: int) -> int:
    return -(-size // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
