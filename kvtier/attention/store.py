"""Where the digests of committed pages are kept: one place per page, a bounded number of places, the least recently used one goes first.

Digests are found by the page's row and proven by its key, because rows are reused: what is left of a page that is gone is never given
out. The store belongs to whoever made it and has no lock; in a running cache that is the residency, under its lock. On a GPU the digests
are written and read on the calling thread's stream, after what other streams do with them; no thread waits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch

from kvtier.attention.digest import DigestLayout, digest_page_bytes
from kvtier.cuda.fences import Fences
from kvtier.cuda.surface import Accelerator
from kvtier.errors import ConfigError, DeviceError
from kvtier.layout import PageLayout


class DigestStore:
    """Room for the digests of `capacity_bytes // digest_page_bytes(layout)` pages on `accelerator`, or in CPU memory. ConfigError if that
    is none."""

    def __init__(self, layout: PageLayout, capacity_bytes: int, accelerator: Accelerator | None = None) -> None:
        page_bytes = digest_page_bytes(layout)
        places = capacity_bytes // page_bytes
        if places < 1:
            raise ConfigError(
                f"attention.digest_bytes is {capacity_bytes}, but the digests of one page of this model take {page_bytes} bytes; "
                "give at least that much, better 3 % of the tiers, or 0 to keep none"
            )
        self.shape = DigestLayout.of(layout)
        shape = (places, layout.layers, layout.kv_heads, self.shape.digest_bytes)
        self._accelerator, self._fences = accelerator, Fences()
        try:
            memory = accelerator.allocate(places * page_bytes) if accelerator else torch.empty(places * page_bytes, dtype=torch.uint8)
        except (DeviceError, RuntimeError) as error:
            why = str(error).splitlines()[0]
            where = accelerator.device if accelerator else "the CPU"
            raise ConfigError(f"attention.digest_bytes: {capacity_bytes} bytes cannot be allocated on {where}: {why}; lower it") from error
        self._digests = memory.view(shape)
        self._place_of: OrderedDict[int, int] = OrderedDict()
        self._key: list[bytes | None] = [None] * places
        self._free = list(range(places - 1, -1, -1))

    def __len__(self) -> int:
        """Pages whose digests are kept."""
        return len(self._place_of)

    @property
    def capacity_pages(self) -> int:
        """Pages there is room for."""
        return len(self._key)

    def put(self, rows: Sequence[int], keys: Sequence[bytes], digests: torch.Tensor) -> None:
        """Keep `digests` `[pages, layers, kv_heads, digest_bytes]` in place of what these rows had; of too many pages the last ones."""
        start = max(0, len(rows) - self.capacity_pages)
        places = [self._room(row, key) for row, key in zip(rows[start:], keys[start:], strict=True)]
        self._write(places, digests[start:])

    def get(self, rows: Sequence[int], keys: Sequence[bytes | None], layers: slice = slice(None)) -> tuple[list[int], torch.Tensor]:
        """Which of these pages have digests (positions in `rows`), and those of `layers`, `[found, layers, kv_heads, digest_bytes]`, a
        copy."""
        found, places = [], []
        for position, (row, key) in enumerate(zip(rows, keys, strict=True)):
            place = self._place_of.get(row)
            if place is None:
                continue
            if self._key[place] != key:
                self.drop([row])
                continue
            self._place_of.move_to_end(row)
            found.append(position)
            places.append(place)
        return found, self._read(places, layers)

    def drop(self, rows: Sequence[int]) -> None:
        """Forget the digests of these rows, where there are any."""
        for row in rows:
            place = self._place_of.pop(row, None)
            if place is not None:
                self._key[place] = None
                self._free.append(place)

    def _room(self, row: int, key: bytes) -> int:
        place = self._place_of.pop(row, None)
        if place is None:
            place = self._free.pop() if self._free else self._place_of.popitem(last=False)[1]
        self._place_of[row] = place
        self._key[place] = key
        return place

    def _write(self, places: Sequence[int], digests: torch.Tensor) -> None:
        def place() -> None:
            self._digests[self._index(places)] = digests.to(self._digests.device)

        if self._accelerator is None:
            place()
            return
        stream = self._accelerator.engine_stream()
        self._fences.before(stream)
        stream.run(place)
        self._fences.used(stream)

    def _read(self, places: Sequence[int], layers: slice) -> torch.Tensor:
        if self._accelerator is None:
            return self._digests[self._index(places), layers]
        stream = self._accelerator.engine_stream()
        self._fences.before(stream)
        found = stream.result(lambda: self._digests[self._index(places), layers])
        self._fences.used(stream)
        return found

    def _index(self, places: Sequence[int]) -> torch.Tensor:
        # Not blocking: see `GpuPool._index`.
        return torch.as_tensor(places, dtype=torch.int64).to(self._digests.device, non_blocking=True)
