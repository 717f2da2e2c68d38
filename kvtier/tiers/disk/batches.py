"""Batches of records between memory and segment files: what `plan` decided, done by the engine. No state; blind to what records say."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing

import numpy as np

from kvtier.errors import LayoutError
from kvtier.io.files import Bytes, Request, address_of, page_aligned
from kvtier.tiers.disk.plan import READ_BYTES, Run, chunk_bytes, plan
from kvtier.tiers.disk.segments import Segments

Fetched = Generator[list[tuple[int, Bytes | OSError]], None, None]
_BOUNCE_BYTES = 4 << 20


def check_staging(rows: Bytes, count: int, slot_bytes: int) -> None:
    """LayoutError unless `rows` is writable uint8 `[>= count, >= slot_bytes]`, each row contiguous."""
    fits = rows.ndim == 2 and rows.shape[0] >= count and rows.shape[1] >= slot_bytes
    if not fits or rows.dtype != np.uint8 or rows.strides[1] != 1 or not rows.flags.writeable:
        found = f"{'' if rows.flags.writeable else 'read-only '}{rows.dtype} {list(rows.shape)} with strides {list(rows.strides)}"
        raise LayoutError(f"staging is {found}; expected writable uint8 [{count} or more, {slot_bytes} or more] of contiguous rows")


def fetch(segments: Segments, slots: Sequence[int], lengths: Sequence[int], rows: Bytes) -> Fetched:
    """Read the first `lengths[i]` bytes of each slot into `rows[i]`; yields (i, bytes or error) in the order they become ready, each
    time all that did meanwhile.

    `rows` is uint8 `[>= len(slots), >= slot_bytes]`, each row contiguous; what is yielded are views of it, shorter than asked where the
    file ends. Slots of length 0 are left out. Rows that touch each other are read several at once; rows the engine cannot read into go
    through a bounce buffer. Closing the generator early waits until nobody writes into `rows` any more.
    """
    slot_bytes, engine = segments.slot_bytes, segments.engine
    if (address_of(rows) | rows.strides[0]) % engine.alignment_bytes:
        yield from _fetch_bounced(segments, slots, lengths, rows)
        return
    touching = rows.strides[0] == slot_bytes
    memory = rows.reshape(-1) if touching else None
    runs: list[Run] = []
    requests: list[Request] = []
    for run in plan(slots, lengths, slot_bytes, segments.segment_slots, READ_BYTES if touching else 0):
        start = run.first * slot_bytes
        buffer = rows[run.first, : run.length] if memory is None else memory[start : start + run.length]
        try:
            requests.append(Request(segments.file(run.segment), run.offset, buffer))
        except OSError as error:
            yield [(index, error) for index in range(run.first, run.first + run.count)]
        else:
            runs.append(run)
    with closing(engine.read_some(requests)) as done:
        for ended in done:
            found: list[tuple[int, Bytes | OSError]] = []
            for number, got in ended:
                run, buffer = runs[number], requests[number].buffer
                start = 0
                for index in range(run.first, run.first + run.count):
                    found.append((index, got if isinstance(got, OSError) else buffer[start : min(start + lengths[index], got)]))
                    start += slot_bytes
            yield found


def _fetch_bounced(segments: Segments, slots: Sequence[int], lengths: Sequence[int], rows: Bytes) -> Fetched:
    at_once = max(1, min(_BOUNCE_BYTES // segments.slot_bytes, len(slots)))
    bounce = page_aligned(at_once * segments.slot_bytes).reshape(at_once, segments.slot_bytes)
    for first in range(0, len(slots), at_once):
        part = slice(first, first + at_once)
        with closing(fetch(segments, slots[part], lengths[part], bounce)) as fetched:
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
