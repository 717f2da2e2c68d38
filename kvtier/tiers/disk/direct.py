"""Records read straight from a store's files into a GPU's memory: no copy of them passes through the host's, and nobody has verified them.

What is there after a read proves nothing yet; `DiskTier.proves` judges headers and digests, `kvtier.mover.direct` brings them to it. Any
thread may call anything; `_lock` guards the open files, never I/O.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from kvtier.cuda.direct import DirectFile, DirectReader, Reading
from kvtier.cuda.surface import Accelerator
from kvtier.errors import ConfigError, DeviceError
from kvtier.formats.base import Format
from kvtier.formats.blocks import BlockFormat
from kvtier.formats.checksums import why_no_checksums
from kvtier.formats.proof import LEAST_BYTES
from kvtier.io.files import BLOCK_BYTES
from kvtier.layout import PageLayout
from kvtier.tiers.disk.directory import FULL_ERRNOS, StoreDirectory
from kvtier.tiers.disk.plan import Run, chunk_bytes, plan

ROW_ALIGNMENT = BLOCK_BYTES
"""What memory that records are read into is aligned to."""
_PROBE_BYTES = 16 * BLOCK_BYTES
_log = logging.getLogger(__name__)


def find_reader(gpu: Accelerator | None, directory: Path, depth: int) -> DirectReader:
    """What reads files of `directory`, which exists, into the memory of `gpu`: tried for real, and leaves nothing there.

    DeviceError, in one line, says which part is missing. On a full disk, opening a file is all that is tried.
    """
    if gpu is None:
        raise DeviceError("the device tier is not in a GPU's memory, so there is nothing to read into")
    if missing := why_no_checksums(gpu.device):
        raise DeviceError(f"what was read could not be verified on the GPU: {missing}")
    reader = gpu.direct_reader(depth)
    try:
        comes_back = _comes_back(reader, gpu, directory)
    except OSError as error:
        raise DeviceError(f"{directory} refuses it: {error.strerror or error}") from error
    if not comes_back:
        raise DeviceError(f"what is written to {directory} does not come back through {reader.name}")
    return reader


def check_direct(format: Format, layout: PageLayout) -> None:
    """ConfigError unless a GPU can verify and decode payloads of this format by itself."""
    if not isinstance(format, BlockFormat):
        what = f"disk.format is {format.name}, which is not decoded on a GPU from the bytes as they are on disk"
        raise ConfigError(f"disk.io_engine is gds, but {what}: use a format without byte stage, such as q8, or auto")
    if format.payload_bytes(layout) < LEAST_BYTES:
        size = f"a {format.name} page of this layout has {format.payload_bytes(layout)} bytes"
        raise ConfigError(f"disk.io_engine is gds, but {size}, and a GPU digests {LEAST_BYTES} or more: use auto, or larger pages")


class DirectBatch:
    """Reads on their way, of one `begin`. Their memory is theirs until `finish` returned."""

    def __init__(self, count: int) -> None:
        self.readings: list[tuple[Run, Reading]] = []
        self._whole = [False] * count

    def finish(self) -> list[bool]:
        """Wait for all; for each record whether all bytes of it that were asked for are there. May be called again."""
        while self.readings:
            run, reading = self.readings.pop()
            try:
                whole = reading.finish() == run.length
            except OSError as error:
                _log.warning("direct read of %d bytes at %d of segment %d: %s", run.length, run.offset, run.segment, error)
                whole = False
            self._whole[run.first : run.first + run.count] = [whole] * run.count
        return self._whole


class DirectRecords:
    """The records of one store, in files that are opened when first needed."""

    def __init__(self, reader: DirectReader, directory: StoreDirectory, segment_slots: int, slot_bytes: int, depth: int) -> None:
        self.reader = reader
        self._directory = directory
        self._segment_slots = segment_slots
        self._slot_bytes = slot_bytes
        self._depth = depth
        self._lock = threading.Lock()
        self._files: dict[int, DirectFile] = {}

    def begin(self, slots: Sequence[int], lengths: Sequence[int], rows: torch.Tensor) -> DirectBatch:
        """Begin to read the first `lengths[i]` bytes of each slot into `rows[i]`; of length 0 nothing, and that is not whole.

        `rows` is contiguous uint8 `[>= len(slots), slot_bytes]` in the GPU's memory, aligned to ROW_ALIGNMENT. A failing medium is no
        exception: what it does not give is not whole.
        """
        batch, memory = DirectBatch(len(slots)), rows.view(-1)
        try:
            for run in plan(slots, lengths, self._slot_bytes, self._segment_slots, chunk_bytes(sum(lengths), self._depth)):
                start = run.first * self._slot_bytes
                try:
                    reading = self._file(run.segment).begin(run.offset, memory[start : start + run.length])
                except OSError as error:
                    _log.warning("direct read of segment %d cannot begin: %s", run.segment, error)
                else:
                    batch.readings.append((run, reading))
        except BaseException:
            batch.finish()  # nobody else will, and `rows` is given to the next
            raise
        return batch

    def close(self) -> None:
        """Close the files. No batch may be on its way."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _file(self, segment: int) -> DirectFile:
        with self._lock:
            file = self._files.get(segment)
        if file is not None:
            return file
        file = self.reader.open(self._directory.segment_path(segment))
        with self._lock:
            ours = self._files.setdefault(segment, file)
        if ours is not file:
            file.close()
        return ours


def _comes_back(reader: DirectReader, gpu: Accelerator, directory: Path) -> bool:
    """Write a file of two pieces and read the second one directly."""
    room = gpu.allocate(_PROBE_BYTES + BLOCK_BYTES)
    memory = room[-room.data_ptr() % BLOCK_BYTES :][:_PROBE_BYTES]
    written = np.random.default_rng().integers(0, 256, 2 * _PROBE_BYTES, np.uint8)
    with (
        tempfile.NamedTemporaryFile(dir=directory, prefix=".kvtier-probe-") as file,
        contextlib.closing(reader.open(Path(file.name))) as direct,
    ):
        try:
            file.write(written.data)
            file.flush()
        except OSError as error:
            if error.errno in FULL_ERRNOS:
                return True
            raise
        got = direct.begin(_PROBE_BYTES, memory).finish()
    return got == _PROBE_BYTES and np.array_equal(memory.cpu().numpy(), written[_PROBE_BYTES:])
