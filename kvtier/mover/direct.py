"""Pages from disk to a GPU without a way through host memory: records are read into the GPU's memory as they are, digested there, judged on
the host by their headers and digests, and only then decoded into the pool.

Only what proved itself is decoded. What did not, for whatever reason, is left to the ordinary way, which reads it again and says why it is
refused: there is one judge of damage, and one place that counts it. Two halves of room take turns: while one is judged and decoded, the
other is being read. State belongs to the worker that borrowed it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from kvtier.cuda.fences import drained
from kvtier.cuda.registration import Registration
from kvtier.cuda.surface import Accelerator, Stream
from kvtier.errors import DeviceError
from kvtier.formats.checksums import digest_bytes, xxh3_128
from kvtier.formats.on_device import decode_pages
from kvtier.memory.region import aligned_array
from kvtier.mover.lane import LaneFormat
from kvtier.mover.transfer import Move
from kvtier.tiers.disk import DiskTier
from kvtier.tiers.disk.direct import ROW_ALIGNMENT, DirectBatch
from kvtier.tiers.disk.record import HEADER_BYTES
from kvtier.tiers.gpu import GpuPool

ROOM_BYTES = 32 << 20
"""What a worker takes of a GPU's memory for records (of a small one a thousandth): enough for a fast disk to be busy while it is judged."""
_DIGEST_BYTES = 16


class DirectRoom:
    """Room for records of `slot_bytes` in the memory of `accelerator`, at least one in each half. DeviceError without that, or without
    registered host memory for their headers and digests."""

    def __init__(self, accelerator: Accelerator, slot_bytes: int) -> None:
        self._accelerator = accelerator
        self._slot_bytes = slot_bytes
        room = min(ROOM_BYTES, accelerator.memory()[1] // 1024)
        self.rows = max(1, room // 2 // slot_bytes)
        half = self.rows * slot_bytes
        memory = accelerator.allocate(ROW_ALIGNMENT + 2 * half + self.rows * _DIGEST_BYTES)
        records = memory[-memory.data_ptr() % ROW_ALIGNMENT :]
        self._halves = [records[start : start + half].view(self.rows, slot_bytes) for start in (0, half)]
        self._digests = records[2 * half :][: self.rows * _DIGEST_BYTES].view(torch.int64).view(self.rows, 2)
        self._host = aligned_array(self.rows * (HEADER_BYTES + _DIGEST_BYTES))
        self._registration = Registration(accelerator, self._host.ctypes.data, self._host.nbytes, self._host.nbytes)
        if self._registration.why:
            self._registration.undo()
            raise DeviceError(f"host memory for headers of records cannot be registered: {self._registration.why}")
        self._headers, proofs = np.split(self._host, [self.rows * HEADER_BYTES])
        self._headers = self._headers.reshape(self.rows, HEADER_BYTES)
        self._host_digests = proofs.view(np.int64).reshape(self.rows, 2)

    def restore(self, source: DiskTier, target: GpuPool, form: LaneFormat, moves: Sequence[Move], stream: Stream) -> list[int]:
        """Bring the pages of `moves` that prove themselves to their slots; on return they are there. Which did not, by place in `moves`.

        DeviceError if the GPU fails; then nothing of this is under way any more.
        """
        left: list[int] = []
        parts = [range(first, min(first + self.rows, len(moves))) for first in range(0, len(moves), self.rows)]
        with source.reading_directly() as records, self._accelerator.beside_captures(), drained(stream):
            if records is None or not parts:
                return list(range(len(moves)))

            def begin(number: int) -> DirectBatch:
                slots = [moves[place].source_slot for place in parts[number]]
                return records.begin(slots, source.stored_bytes(slots), self._halves[number % 2])

            target.fences.before(stream)
            decoded, batch = stream.record(), begin(0)
            try:
                for number, part in enumerate(parts):
                    whole = batch.finish()
                    decoded.wait()  # the last part's half is the next one's
                    if number + 1 < len(parts):
                        batch = begin(number + 1)
                    checksums = self._digested(number % 2, len(part), form.payload_bytes, stream)
                    proven = [
                        row
                        for row, place in enumerate(part)
                        if whole[row] and source.proves(self._headers[row], moves[place].page.key, checksums[row])
                    ]
                    left += [part[row] for row in sorted({*range(len(part))} - {*proven})]
                    slots = [moves[part[row]].target_slot for row in proven]
                    payloads = self._halves[number % 2][:, HEADER_BYTES:]
                    stream.run(partial(decode_pages, form.inner, payloads, target.paged, slots, proven))
                    decoded = stream.record()
            finally:
                batch.finish()  # before somebody else is given this room
        source.read_directly(len(moves) - len(left), len(left))
        return left

    def close(self) -> None:
        """Give the registration back."""
        self._registration.undo()

    def _digested(self, half: int, count: int, payload_bytes: int, stream: Stream) -> list[bytes]:
        """The digests of the first `count` payloads of a half; their headers are in `_headers` then. Sleeps until the GPU has done it."""
        records, digests = self._halves[half][:count], self._digests[:count]
        stream.run(partial(xxh3_128, records[:, HEADER_BYTES : HEADER_BYTES + payload_bytes], digests))
        rows = np.arange(count, dtype=np.int64)
        stream.copy(self._headers.ctypes.data + rows * HEADER_BYTES, records.data_ptr() + rows * self._slot_bytes, HEADER_BYTES)
        stream.copy(self._host_digests.ctypes.data + rows[:1], digests.data_ptr() + rows[:1], count * _DIGEST_BYTES)
        stream.record().wait()
        return digest_bytes(self._host_digests[:count])
