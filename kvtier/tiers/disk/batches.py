"""Batches of records between memory and segment files: what `plan` decided, done by the engine. No state; blind to what records say."""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from kvtier.errors import LayoutError
from kvtier.io.files import Bytes, Request, SomeOutcomes, address_of, page_aligned
from kvtier.tiers.disk.plan import READ_BYTES, Run, chunk_bytes, plan
from kvtier.tiers.disk.segments import Segments

Fetched = Generator[list[tuple[int, Bytes | OSError]], None, None]
_BOUNCE_BYTES = 4 << 20


@dataclass(frozen=True)
class Reads:
    """Reads of a batch, of copy `first` of it and others behind: `requests[i]` fills memory with what `runs[i]` says, which counts from
    `first`."""

    first: int
    runs: Sequence[Run]
    requests: Sequence[Request]
    slot_bytes: int

    def copies(self) -> list[int]:
        """The index of each copy in the batch, in the order of `requests`; those of one lie `slot_bytes` apart."""
        return [self.first + index for run in self.runs for index in range(run.first, run.first + run.count)]


Read = Callable[[Reads], SomeOutcomes]
"""Has the engine read; copies that need not be given to anybody any more are noted somewhere then."""


def check_staging(rows: Bytes, count: int, slot_bytes: int) -> None:
    """LayoutError unless `rows` is writable uint8 `[>= count, >= slot_bytes]`, each row contiguous."""
    fits = rows.ndim == 2 and rows.shape[0] >= count and rows.shape[1] >= slot_bytes
    if not fits or rows.dtype != np.uint8 or rows.strides[1] != 1 or not rows.flags.writeable:
        found = f"{'' if rows.flags.writeable else 'read-only '}{rows.dtype} {list(rows.shape)} with strides {list(rows.strides)}"
        raise LayoutError(f"staging is {found}; expected writable uint8 [{count} or more, {slot_bytes} or more] of contiguous rows")


def fetch(
    segments: Segments,
    slots: Sequence[int],
    lengths: Sequence[int],
    rows: Bytes,
    read: Read | None = None,
    settled: Container[int] = (),
    first: int = 0,
) -> Fetched:
    """Read the first `lengths[i]` bytes of each slot into `rows[i]`; yields (i, bytes or error) in the order they become ready, each
    time all that did meanwhile.

    `rows` is uint8 `[>= len(slots), >= slot_bytes]`, each row contiguous; what is yielded are views of it, shorter than asked where the
    file ends. Slots of length 0 are left out. Rows that touch each other are read several at once; rows the engine cannot read into go
    through a bounce buffer. Closing the generator early waits until nobody writes into `rows` any more. `read` has the engine read, if that
    is more than `read_some`, and may put copies into `settled` that are not yielded then. Both count slots from `first` on.
    """
    slot_bytes, engine = segments.slot_bytes, segments.engine
    if (address_of(rows) | rows.strides[0]) % engine.alignment_bytes:
        yield from _fetch_bounced(segments, slots, lengths, rows, read, settled)
        return
    touching = rows.strides[0] == slot_bytes
    memory = rows.reshape(-1) if touching else None
    runs: list[Run] = []
    requests: list[Request] = []
    failed: list[tuple[int, Bytes | OSError]] = []
    for run in plan(slots, lengths, slot_bytes, segments.segment_slots, READ_BYTES if touching else 0):
        start = run.first * slot_bytes
        buffer = rows[run.first, : run.length] if memory is None else memory[start : start + run.length]
        try:
            requests.append(Request(segments.file(run.segment), run.offset, buffer))
        except OSError as error:
            failed += [(index, error) for index in range(run.first, run.first + run.count)]
        else:
            runs.append(run)
    reading = engine.read_some(requests) if read is None else read(Reads(first, runs, requests, slot_bytes))
    with closing(reading) as done:
        for ended in done:
            found, failed = failed, []
            for number, got in ended:
                run, buffer = runs[number], requests[number].buffer
                for place in range(run.count):
                    index, start = run.first + place, place * slot_bytes
                    if first + index not in settled:
                        found.append((index, got if isinstance(got, OSError) else buffer[start : min(start + lengths[index], got)]))
            yield found
    if failed:
        yield failed


def _fetch_bounced(
    segments: Segments, slots: Sequence[int], lengths: Sequence[int], rows: Bytes, read: Read | None, settled: Container[int]
) -> Fetched:
    at_once = max(1, min(_BOUNCE_BYTES // segments.slot_bytes, len(slots)))
    bounce = page_aligned(at_once * segments.slot_bytes).reshape(at_once, segments.slot_bytes)
    for first in range(0, len(slots), at_once):
        part = slice(first, first + at_once)
        with closing(fetch(segments, slots[part], lengths[part], bounce, read, settled, first)) as fetched:
            for group in fetched:
                yield [
                    (first + place, found if isinstance(found, OSError) else _moved(found, rows[first + place])) for place, found in group
                ]


def _moved(found: Bytes, row: Bytes) -> Bytes:
    row[: len(found)] = found
    return row[: len(found)]


def put(segments: Segments, slots: Sequence[int], lengths: Sequence[int], stale: Sequence[int], rows: Bytes) -> list[OSError | None]:
    """Write the first `lengths[i]` bytes of `rows[i]` into each slot, and say per slot what failed; of length 0 there is nothing to do.

    `rows` is a contiguous, page-aligned `[len(slots), slot_bytes]`. `stale[i]`: how far an earlier record may reach; what would stick out
    behind the new one is given back first. An I/O of several records that fails is repeated record by record, so that every error is
    about its own record, of which any part may be written.
    """
    slot_bytes = segments.slot_bytes
    memory = rows.reshape(-1)
    errors: list[OSError | None] = [None] * len(slots)
    wanted = list(lengths)
    for index, slot in enumerate(slots):
        try:
            segments.shorten(slot, lengths[index], stale[index])
        except OSError as error:
            errors[index], wanted[index] = error, 0
    runs = plan(slots, wanted, slot_bytes, segments.segment_slots, chunk_bytes(sum(wanted), segments.engine.depth))
    if len(runs) > 1:
        new = [length if length > before else 0 for length, before in zip(wanted, stale, strict=True)]
        segments.allocate(plan(slots, new, slot_bytes, segments.segment_slots, len(memory)))
    for run, failure in zip(runs, segments.write_all(runs, memory), strict=True):
        if failure is not None and run.count > 1:
            alone = [run.alone(index, slot_bytes, wanted[index]) for index in range(run.first, run.first + run.count)]
            errors[run.first : run.first + run.count] = [segments.write_all([record], memory)[0] for record in alone]
        else:
            errors[run.first] = failure
    return errors
