"""The read side of a disk store: records are read while the caller works on those that are there, and verified before anyone sees them.

No state. `operation` is the store's: it keeps the files open meanwhile, and says whether they are. Any thread may call anything.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Sequence
from contextlib import AbstractContextManager, closing
from itertools import chain, compress, islice

import torch

from kvtier.formats.base import Format, Payload
from kvtier.formats.blocks import BlockFormat, Receive
from kvtier.io.files import Bytes, SomeOutcomes
from kvtier.keys import PageKey
from kvtier.layout import PageLayout
from kvtier.tiers.base import Loaded, Placed, Refused, one_by_one
from kvtier.tiers.disk import record
from kvtier.tiers.disk.batches import Read, Reads, check_staging, fetch
from kvtier.tiers.disk.segments import Segments
from kvtier.tiers.disk.slots import SlotBook
from kvtier.tiers.disk.tidying import Tally


class RecordReader:
    """Reads copies of one store. Those that are refused are counted in `tally` by reason. `decoders`: so many threads decode at once."""

    def __init__(
        self,
        operation: Callable[[], AbstractContextManager[bool]],
        segments: Segments,
        book: SlotBook,
        tally: Tally,
        layout: PageLayout,
        format: Format,
        decoders: int,
    ) -> None:
        self._operation = operation
        self._segments = segments
        self._book = book
        self._tally = tally
        self._layout = layout
        self._format = format
        self._decoders = decoders
        self._format_hash = record.format_hash(format.name)
        self._most_payload_bytes = format.payload_bytes(layout)
        self._proof = record.proof(layout.fingerprint, self._format_hash, self._most_payload_bytes)

    def load_each(self, slots: Sequence[int], keys: Sequence[PageKey], staging: Bytes) -> Loaded:
        """See `Tier.load_each`. LayoutError at once if `staging` does not fit."""
        check_staging(staging, len(slots), self._segments.slot_bytes)
        return self._load_each(slots, keys, staging)

    def place_some(
        self, slots: Sequence[int], keys: Sequence[PageKey], staging: Bytes, memory: torch.Tensor, rows: Sequence[int]
    ) -> Placed:
        """See `Tier.place_some`. LayoutError at once if `staging` or `memory` does not fit."""
        check_staging(staging, len(slots), self._segments.slot_bytes)
        receive = self._receiver(memory)
        if receive is None:
            return one_by_one(self._load_each(slots, keys, staging))
        return self._place_some(slots, keys, staging, receive, rows)

    def place_ahead(
        self, slots: Sequence[int], keys: Sequence[PageKey], staging: Bytes, memory: torch.Tensor, rows: Sequence[int]
    ) -> Placed | None:
        """See `Tier.place_ahead`. LayoutError if `staging` or `memory` does not fit."""
        check_staging(staging, len(slots), self._segments.slot_bytes)
        receive = self._receiver(memory)
        if receive is None or not self._segments.engine.reads_ahead or not self._segments.are_open(slots):
            return None
        placing = self._place_some(slots, keys, staging, receive, rows)
        next(placing)
        return placing

    @property
    def reads_ahead(self) -> bool:
        """Whether `place_ahead` begins where files are open."""
        return self._segments.engine.reads_ahead and isinstance(self._format, BlockFormat) and self._format.receives(self._layout)

    def _receiver(self, memory: torch.Tensor) -> Receive | None:
        return self._format.receiver(self._layout, self._proof, memory) if isinstance(self._format, BlockFormat) else None

    def proves(self, header: Bytes, key: PageKey, checksum: bytes) -> bool:
        """See `DiskTier.proves`."""
        found = record.parse(header)
        return found is not None and found.page.key == key and self.fault(found) is None and found.payload_checksum == checksum

    def fault(self, header: record.Header) -> str | None:
        """What keeps a sound header from being one of this store's copies."""
        if (header.layout_fingerprint, header.format_hash) != (self._layout.fingerprint, self._format_hash):
            return "format"
        whole = header.payload_bytes == self._most_payload_bytes or not self._format.fixed_size
        return None if whole and header.payload_bytes <= self._most_payload_bytes else "truncated"

    def _load_each(self, slots: Sequence[int], keys: Sequence[PageKey], staging: Bytes) -> Loaded:
        with closing(self._arrived(slots, staging)) as arrived:
            for group in arrived:
                for index, found in group:
                    yield index, found if isinstance(found, Refused) else self._verified(found, keys[index])

    def _place_some(self, slots: Sequence[int], keys: Sequence[PageKey], staging: Bytes, receive: Receive, rows: Sequence[int]) -> Placed:
        placed: dict[int, int] = {}  # and payload bytes

        def read(reads: Reads) -> SomeOutcomes:
            copies, counts = reads.copies(), [run.count for run in reads.runs]
            arrivals = receive(reads.slot_bytes, counts, [keys[index] for index in copies], [rows[index] for index in copies])
            with closing(self._segments.engine.read_then(reads.requests, arrivals, self._decoders)) as groups:
                for group in groups:
                    placed.update(dict.fromkeys(compress(copies, arrivals.placed() if group else b""), self._most_payload_bytes))
                    yield group

        told = 0
        with closing(self._arrived(slots, staging, read, placed)) as arrived:
            first = next(arrived, [])
            yield []  # reading has begun
            for group in chain([first], arrived):
                new: list[tuple[int, int | Payload | Refused]] = [*islice(placed.items(), told, None)]
                told += len(new)
                # Of what did not prove itself, `_verified` says why.
                yield [*new, *((index, each if isinstance(each, Refused) else self._verified(each, keys[index])) for index, each in group)]

    def _arrived(
        self, slots: Sequence[int], staging: Bytes, read: Read | None = None, settled: Container[int] = ()
    ) -> Generator[list[tuple[int, Bytes | Refused]], None, None]:
        """Whole records as they were read, or why not, each time all that came meanwhile; nobody has verified them. `read` and `settled`
        as of `fetch`."""
        with self._operation() as open_:
            lengths = self._book.stored_bytes(slots) if open_ else [0] * len(slots)
            missing: list[tuple[int, Bytes | Refused]]
            missing = [(index, self._refused("key" if open_ else "closed")) for index, length in enumerate(lengths) if length == 0]
            if len(missing) < len(slots):
                with closing(fetch(self._segments, slots, lengths, staging, read, settled)) as fetched:
                    for group in fetched:
                        found, missing = missing, []
                        yield [*found, *((index, self._whole(each, lengths[index])) for index, each in group)]
            if missing:
                yield missing

    def _whole(self, found: Bytes | OSError, length: int) -> Bytes | Refused:
        if isinstance(found, OSError):
            return self._refused(f"io: {found.strerror}")
        return found if len(found) == length else self._refused("truncated")

    def _verified(self, data: Bytes, key: PageKey) -> Payload | Refused:
        header = record.parse(data)
        if header is None:
            return self._refused("checksum")
        if header.page.key != key:
            return self._refused("key")
        fault = self.fault(header)
        if fault is not None:
            return self._refused(fault)
        payload = record.payload_of(header, data)
        return self._refused(payload.reason) if isinstance(payload, Refused) else payload

    def _refused(self, reason: str) -> Refused:
        self._tally.add(f"refused: {reason}")
        return Refused(reason)
