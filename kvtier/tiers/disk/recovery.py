"""Reading a store back after a restart: which records of the segment files are copies, and which are debris.

`find_copies` is the whole: `survey` does I/O and decides nothing but validity, several segments at once; `select` is pure and decides what
is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from kvtier.io.files import BLOCK_BYTES, page_aligned
from kvtier.tiers.base import Refused
from kvtier.tiers.disk import record
from kvtier.tiers.disk.segments import Segments

_SCAN_THREADS = 8


@dataclass
class Survey:
    """What was found: `valid` records by slot, `debris` slots with something that is no copy, and why, by reason."""

    slots: int = 0
    last_sequence: int = 0
    valid: list[tuple[int, record.Header]] = field(default_factory=list)
    debris: list[int] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)

    def merge(self, other: Survey) -> None:
        """Add what another segment's survey found."""
        self.slots = max(self.slots, other.slots)
        self.last_sequence = max(self.last_sequence, other.last_sequence)
        self.valid += other.valid
        self.debris += other.debris
        self.reasons += other.reasons


@dataclass
class Copies:
    """What a store comes back with: records `kept` and `stale` slots to be erased, of so many `slots`, and why others were discarded."""

    kept: list[tuple[int, record.Header]]
    stale: list[int]
    slots: int
    last_sequence: int
    reasons: Counter[str]


def find_copies(
    segments: Segments, check: Callable[[record.Header], str | None], trusted_sequence: int | None, capacity_bytes: int, slot_bytes: int
) -> Copies:
    """What is kept of all segment files within the capacity; files that reach beyond are cut. OSError if one cannot be read."""
    found = survey(segments, check, trusted_sequence)
    slots = found.slots if segments.punches else min(found.slots, capacity_bytes // slot_bytes)
    within = [(slot, header) for slot, header in found.valid if slot < slots]
    found.reasons["capacity"] += len(found.valid) - len(within)

    def cost_bytes(header: record.Header) -> int:
        return record.record_bytes(header.payload_bytes) if segments.punches else slot_bytes

    kept, dropped, reasons = select(within, capacity_bytes, cost_bytes)
    if slots < found.slots:
        segments.cut(slots)
    stale = sorted({*dropped, *(slot for slot in found.debris if slot < slots)})
    return Copies(kept, stale, slots, found.last_sequence, found.reasons + reasons)


def survey(segments: Segments, check: Callable[[record.Header], str | None], trusted_sequence: int | None) -> Survey:
    """What is in all segment files (see `scan`). Unless all records are trusted, segments count as not yet synced."""
    found = Survey()
    numbers = segments.numbers()
    with ThreadPoolExecutor(_SCAN_THREADS, thread_name_prefix="kvtier-scan") as pool:
        for one in pool.map(lambda segment: scan(segments, segment, check, trusted_sequence), numbers):
            found.merge(one)
    if trusted_sequence is not None:
        segments.mark_dirty(numbers)  # verified, but perhaps still only in the page cache
    return found


def missing_files(segments: Sequence[int], written: bool) -> str:
    """Which files are gone of those that there were, by the numbers of those there are; `written`: whether there were any. Empty: none."""
    if not segments:
        return "all segment files" if written else ""
    missing = sorted(set(range(max(segments))) - set(segments))
    return f"segment files {missing}" if missing else ""


def trim(segments: Segments, kept: Sequence[tuple[int, record.Header]]) -> None:
    """Punch behind every kept record: a power failure can keep a record and lose the punch before it. OSError if the medium fails."""
    for slot, header in kept:
        segments.trim(slot, record.record_bytes(header.payload_bytes))


def scan(segments: Segments, segment: int, check: Callable[[record.Header], str | None], trusted_sequence: int | None) -> Survey:
    """Read the headers of one segment; OSError if its file cannot be read.

    `check` names what is wrong with a sound header, if anything. Payloads of records after `trusted_sequence` are verified too; None
    trusts all of them. Unless all are trusted, blank slots count as debris as well: a power failure can lose a header's block and
    keep those behind it.
    """
    survey = Survey()
    slot_bytes, first = segments.slot_bytes, segment * segments.segment_slots
    size = segments.engine.size(segments.file(segment))
    found = min(-(-size // slot_bytes), segments.segment_slots)
    if found:
        survey.slots = first + found
    buffer = page_aligned(slot_bytes)
    for slot in range(first, first + found):
        fault: str | None
        got = segments.read(slot, buffer[:BLOCK_BYTES])
        header = record.parse(buffer) if got >= record.HEADER_BYTES else None
        if header is None:
            if got >= record.HEADER_BYTES and record.is_blank(buffer):
                if trusted_sequence is not None:
                    survey.debris.append(slot)
                continue
            fault = "header"
        else:
            survey.last_sequence = max(survey.last_sequence, header.sequence)
            length = record.record_bytes(header.payload_bytes)
            fault = check(header)
            if fault is None and (slot - first) * slot_bytes + length > size:
                fault = "truncated"
            if fault is None and trusted_sequence is not None and header.sequence > trusted_sequence:
                payload = record.payload_of(header, buffer[: segments.read(slot, buffer[:length])])
                fault = payload.reason if isinstance(payload, Refused) else None
        if header is not None and fault is None:
            survey.valid.append((slot, header))
        else:
            survey.debris.append(slot)
            survey.reasons[str(fault)] += 1
    return survey


def select(
    valid: Sequence[tuple[int, record.Header]], capacity_bytes: int, cost_bytes: Callable[[record.Header], int]
) -> tuple[list[tuple[int, record.Header]], list[int], Counter[str]]:
    """Newest record of each key, newest first, as many as fit; then the slots of the others, and why they were dropped."""
    kept: list[tuple[int, record.Header]] = []
    dropped: list[int] = []
    reasons: Counter[str] = Counter()
    seen: set[bytes] = set()
    used_bytes = 0
    for slot, header in sorted(valid, key=lambda item: -item[1].sequence):
        fault = "duplicate" if header.page.key in seen else "capacity" if used_bytes + cost_bytes(header) > capacity_bytes else None
        if fault is None:
            seen.add(header.page.key)
            used_bytes += cost_bytes(header)
            kept.append((slot, header))
        else:
            dropped.append(slot)
            reasons[fault] += 1
    return kept, dropped, reasons
