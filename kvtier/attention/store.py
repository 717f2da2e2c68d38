"""Where the digests of committed pages are kept: one place per page, a bounded number of places, the least recently used one goes first.

Digests are found by the page's row and proven by its key, because rows are reused: what is left of a page that is gone is never given
out. The store belongs to whoever made it and has no lock; in a running cache that is the residency, under its lock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch

from kvtier.attention.digest import DigestLayout, digest_page_bytes
from kvtier.errors import ConfigError
from kvtier.layout import PageLayout


class DigestStore:
    """Room for the digests of `capacity_bytes // digest_page_bytes(layout)` pages on `place`. ConfigError if that is none."""

    def __init__(self, layout: PageLayout, capacity_bytes: int, place: torch.device) -> None:
        page_bytes = digest_page_bytes(layout)
        places = capacity_bytes // page_bytes
        if places < 1:
            raise ConfigError(
                f"attention.digest_bytes is {capacity_bytes}, but the digests of one page of this model take {page_bytes} bytes; "
                "give at least that much, better 3 % of the tiers, or 0 to keep none"
            )
        self.shape = DigestLayout.of(layout)
        shape = (places, layout.layers, layout.kv_heads, self.shape.digest_bytes)
        try:
            self._digests = torch.empty(shape, dtype=torch.uint8, device=place)
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            raise ConfigError(f"attention.digest_bytes: {capacity_bytes} bytes cannot be allocated on {place}: {why}; lower it") from error
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
        self._digests[torch.tensor(places, dtype=torch.int64, device=self._digests.device)] = digests[start:].to(self._digests.device)

    def get(self, rows: Sequence[int], keys: Sequence[bytes | None]) -> tuple[list[int], torch.Tensor]:
        """Which of these pages have digests (positions in `rows`), and the digests `[found, layers, kv_heads, digest_bytes]`, a copy."""
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
        return found, self._digests[torch.tensor(places, dtype=torch.int64, device=self._digests.device)]

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
