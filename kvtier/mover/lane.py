"""A lane to a GPU: what one worker copies and codes with, on a stream of its own, beside the engine's.

Towards the GPU, encoded bytes are copied from registered host memory straight into the pool (raw pages), or beside it and decoded
there; step by step, a few layers of all pages at once, with an event behind each step, so that the engine's stream waits for no more than
it reads. Away from it, pages are encoded beside the pool and copied straight to where the host tier keeps them. The worker sleeps until the
last event before anybody learns that the transfer ended: until then its slots on both sides belong to it, also if a launch fails half way.

Before a lane touches the pool, its stream waits for every use that engines noted (`GpuPool.fences`).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import numpy as np
import torch

from kvtier.cuda.registration import Registration
from kvtier.cuda.surface import Accelerator, Addresses, Event, Stream
from kvtier.errors import ConfigError, DeviceError
from kvtier.formats.base import Format, Payload
from kvtier.formats.blocks import BlockFormat
from kvtier.formats.lossless import Staged
from kvtier.formats.on_device import decode_pages, encode_pages
from kvtier.layout import PageLayout
from kvtier.memory.region import aligned_array
from kvtier.mover.transfer import Move
from kvtier.tiers.base import Tier
from kvtier.tiers.gpu import GpuPool

log = logging.getLogger(__name__)

STEP_BYTES = 8 << 20
"""Bytes to copy behind one event: 150 us of a fast link, in which the next step is launched."""
ROOM_BYTES = 32 << 20
"""What a lane takes of a GPU's memory (of a small one a thousandth): one layer of 1,000 pages of a Llama-3-8B in q8."""
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
    """Room for `pages` payloads of at most `row_bytes` on the host, registered; at least as much on the GPU. DeviceError without either."""

    def __init__(self, accelerator: Accelerator, pages: int, row_bytes: int) -> None:
        self._accelerator = accelerator
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

    def most_pages(self, form: LaneFormat) -> int:
        """The most pages of one `restore` from memory that the GPU reads itself: a layer of them has to fit, unless they are plain."""
        return sys.maxsize if form.is_plain else max(len(self._host), self._room_bytes // form.widest_bytes)

    def restore(
        self, source: Tier, target: GpuPool, form: LaneFormat, arrived: Sequence[tuple[Move, Payload]], announce: Announce | None
    ) -> None:
        """Bring verified payloads of `source`, at most `most_pages`, to their slots; on return they are there.

        `announce(layers, event)` is called as soon as the first layers are launched. DeviceError if the GPU fails; then nothing of this is
        under way any more.
        """
        slots = [move.target_slot for move, _ in arrived]
        count, starts, stream = len(slots), form.layer_starts, self.stream
        places = self._sources(source, arrived)
        pages = target.addresses(slots)
        step = layers_per_step(count, form)
        if not form.is_plain and count:
            step = max(1, min(step, self._room_bytes // (count * form.widest_bytes)))
        with self._accelerator.beside_captures(), drained(stream):
            target.fences.before(stream)
            for first in range(0, len(starts) - 1, step):
                stop = min(first + step, len(starts) - 1)
                begin, size = starts[first], starts[stop] - starts[first]
                if form.is_plain:
                    stream.copy(pages + begin, places + begin, size)
                else:
                    coded, rows = self._window(count, form.payload_bytes, begin, size)
                    stream.copy(rows, places + begin, size)
                    stream.run(partial(decode_pages, form.inner, coded, target.paged, slots, None, slice(first, stop)))
                if announce is not None:
                    announce(stop, stream.record())

    def offload(self, source: GpuPool, target: Tier, form: LaneFormat, moves: Sequence[Move], first: Sequence[int]) -> list[Payload]:
        """The pages of `moves` as payloads without byte stage: where `target.direct` says, or in this lane's memory until its next use.

        `first`: which of them begin a sequence. DeviceError if the GPU fails; then nothing of this is under way any more.
        """
        slots, count, size, stream = [move.source_slot for move in moves], len(moves), form.payload_bytes, self.stream
        direct = target.direct([move.target_slot for move in moves])
        places = np.where(direct == 0, self._host_rows[:count], direct)
        with self._accelerator.beside_captures(), drained(stream):
            source.fences.before(stream)
            if form.is_plain:
                stream.copy(places, source.addresses(slots), size)
            else:
                coded, rows = self._window(count, size, 0, size)
                stream.run(partial(encode_pages, form.inner, source.paged, slots, coded, None, first))
                stream.copy(places, rows, size)
        there = zip(moves, direct.tolist(), self._host, strict=False)
        return [target.payload_at(move.target_slot) if address else row[:size] for move, address, row in there]

    def close(self) -> None:
        """Give the registration back."""
        self._registration.undo()

    def _window(self, count: int, payload_bytes: int, begin: int, size: int) -> tuple[torch.Tensor, Addresses]:
        """Room on the GPU for bytes `begin` to `begin + size` of `count` payloads: a tensor `[count, payload_bytes]` of which only these
        columns may be touched, because the rows lie closer together than they are long; and the address of byte `begin` of each."""
        stride = _aligned(size)
        offset = -(-self._pad_bytes // _ROW_ALIGNMENT) * _ROW_ALIGNMENT - begin // _ROW_ALIGNMENT * _ROW_ALIGNMENT
        tensor = self._device.as_strided((count, payload_bytes), (stride, 1), offset)
        return tensor, self._device.data_ptr() + offset + begin + np.arange(count, dtype=np.int64) * stride

    def _sources(self, source: Tier, arrived: Sequence[tuple[Move, Payload]]) -> Addresses:
        """Where the GPU can read these payloads: where they are, or in this lane's memory, after a copy."""
        places = source.direct([move.source_slot for move, _ in arrived])
        for row in np.flatnonzero(places == 0).tolist():
            payload = arrived[row][1]
            self._host[row, : len(payload)] = payload
            places[row] = self._host_rows[row]
        return places


def _aligned(size: int) -> int:
    return -(-size // _ROW_ALIGNMENT) * _ROW_ALIGNMENT


@contextmanager
def drained(stream: Stream) -> Iterator[None]:
    """Whatever is launched inside is over at the end, also if not all of it could be launched. DeviceError if any of it failed."""
    try:
        yield
    except BaseException:
        try:
            stream.record().wait()
        except DeviceError as error:
            log.warning("what was launched before failed too: %s", error)
        raise
    stream.record().wait()
