"""The read side of a disk store: records are read while the caller works on those that are there, and verified before anyone sees them.

No state. `operation` is the store's: it keeps the files open meanwhile, and says whether they are. Any thread may call anything.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, closing

import torch

from kvtier.formats.base import Format, Payload
from kvtier.formats.blocks import BlockFormat, Receive
from kvtier.io.files import Bytes
from kvtier.keys import PageKey
from kvtier.layout import PageLayout
from kvtier.tiers.base import Loaded, Placed, Refused
from kvtier.tiers.disk import record
from kvtier.tiers.disk.batches import check_staging, fetch
from kvtier.tiers.disk.segments import Segments
from kvtier.tiers.disk.slots import SlotBook
from kvtier.tiers.disk.tidying import Tally


class RecordReader:
    """Reads copies of one store. Those that are refused are counted in `tally` by reason."""

    def __init__(
        self,
        operation: Callable[[], AbstractContextManager[bool]],
        segments: Segments,
        book: SlotBook,
        tally: Tally,
        layout: PageLayout,
        format: Format,
    ) -> None:
        self._operation = operation
        self._segments = segments
        self._book = book
        self._tally = tally
        self._layout = layout
        self._format = format
        self._format_hash = record.format_hash(format.name)
        self._most_payload_bytes = format.payload_bytes(layout)
        self._proof = record.proof(layout.fingerprint, self._format_hash, self._most_payload_bytes)

    def load_each(self, slots: Sequence[int], keys: Sequence[PageKey], staging: Bytes) -> Loaded:
        """See `Tier.load_each`. LayoutError at once if `staging` does not fit."""
        check_staging(staging, len(slots), self._segments.slot_bytes)
        return self._load_each(slots, keys, staging)

    def place_each(
        self, slots: Sequence[int], keys: Sequence[PageKey], staging: Bytes, memory: torch.Tensor, rows: Sequence[int]
    ) -> Placed:
        """See `Tier.place_each`. LayoutError at once if `staging` or `memory` does not fit."""
        receive = self._format.receiver(self._layout, self._proof, memory) if isinstance(self._format, BlockFormat) else None
        if receive is None:
            return self.load_each(slots, keys, staging)
        check_staging(staging, len(slots), self._segments.slot_bytes)
        return self._place_each(slots, keys, staging, receive, rows)

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

    def _place_each(self, slots: Sequence[int], keys: Sequence[PageKey], staging: Bytes, receive: Receive, rows: Sequence[int]) -> Placed:
        with closing(self._arrived(slots, staging)) as arrived:
            for group in arrived:
                places, records = [], []
                for index, found in group:
                    if isinstance(found, Refused):
                        yield index, found
                    else:
                        places.append(index)
                        records.append(found)
                proven = receive(records, [keys[index] for index in places], [rows[index] for index in places])
                for index, found, good in zip(places, records, proven, strict=True):
                    # Of what did not prove itself, `_verified` says why.
                    yield index, self._most_payload_bytes if good else self._verified(found, keys[index])

    def _arrived(self, slots: Sequence[int], staging: Bytes) -> Generator[list[tuple[int, Bytes | Refused]], None, None]:
        """Whole records as they were read, or why not, each time all that came meanwhile. Nobody has verified them."""
        with self._operation() as open_:
            lengths = self._book.stored_bytes(slots) if open_ else [0] * len(slots)
            if missing := [index for index, length in enumerate(lengths) if length == 0]:
                yield [(index, self._refused("key" if open_ else "closed")) for index in missing]
            if len(missing) == len(slots):
                return
            with closing(fetch(self._segments, slots, lengths, staging)) as fetched:
                for group in fetched:
                    yield [(index, self._whole(found, lengths[index])) for index, found in group]

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
