"""Encoding for one tier, whose byte stage may rest while it does not pay.

State of a `Packer` belongs to the workers together: replaced whole, so that two at once lose an observation at worst.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch

from kvtier.formats.base import Payload
from kvtier.formats.economy import StageEconomy
from kvtier.formats.lossless import Staged
from kvtier.mover.transfer import Move
from kvtier.tiers.base import FinishStore, Refused, Tier

log = logging.getLogger(__name__)

Encoded = tuple[list[Payload], list[bytes] | None]
"""Payloads, and their xxh3-128 where it was made with them."""

MEMORY = 0.9
"""Weight that the measured write bandwidth keeps at each further write."""


class Packer:
    """Writes pages into `tier` in its format. A byte stage rests where it gains no room (`tier.refunds`), or, with `tier.compress` "auto",
    while it costs more time than it saves."""

    def __init__(self, tier: Tier) -> None:
        self._tier = tier
        self.economy = StageEconomy()
        self._bytes_per_s = 0.0

    def encode(self, pages: torch.Tensor, rows: Sequence[int] | None, room: Sequence[Payload], first: Sequence[int]) -> Encoded:
        """As `Format.encode_with_digests`; `room` as its `out`. No digests behind a byte stage: tiers make them as well from
        what that gives."""
        codec, layout = self._tier.format, self._tier.layout
        if not isinstance(codec, Staged):
            return codec.encode_with_digests(pages, layout, rows, room, first)
        if (stage := self._stage()) != "measured":
            return codec.encode(pages, layout, rows, room, first, compress=stage == "works"), None
        return self._pack(codec, codec.inner.encode(pages, layout, rows, None, first), room), None

    def pack(self, plain: Sequence[Payload], room: Sequence[Payload]) -> list[Payload]:
        """What `encode` gives, of payloads that were encoded elsewhere, by the format without its byte stage."""
        codec, layout = self._tier.format, self._tier.layout
        if not isinstance(codec, Staged):
            return list(plain)
        match self._stage():
            case "works":
                return codec.pack(plain, layout, room)
            case "rests":
                return codec.store(plain, room)
        return self._pack(codec, plain, room)

    def _stage(self) -> Literal["works", "rests", "measured"]:
        """What the byte stage does with the next batch."""
        if self._tier.compress == "always":
            return "works" if self._tier.refunds else "rests"
        if self.economy.compress_next:
            return "measured"
        self.economy = self.economy.stored()
        return "rests"

    def _pack(self, codec: Staged, plain: Sequence[Payload], room: Sequence[Payload]) -> list[Payload]:
        """Compress, and learn what it took and saved."""
        layout = self._tier.layout
        start = time.perf_counter()
        packed = codec.pack(plain, layout, room)
        if self._bytes_per_s:
            paid = self.economy.pays
            self.economy = self.economy.after(sum(map(len, plain)), sum(map(len, packed)), time.perf_counter() - start, self._bytes_per_s)
            if self.economy.pays != paid:
                log.info("tier %s: %s now %s", self._tier.name, codec.name, "compresses" if self.economy.pays else "only stores")
        return packed

    def begin(self, moves: Sequence[Move], payloads: Sequence[Payload], digests: Sequence[bytes] | None, ahead: bool) -> FinishStore:
        """Start to store one payload per move in its target slot; as `Tier.begin_store`, or, unless `ahead`, `Tier.store`.

        Bandwidth is what is stored in the time the caller waits: what is written while it does something else costs nothing.
        """
        start = time.perf_counter()
        slots, pages = [move.target_slot for move in moves], [move.page for move in moves]
        if ahead:
            finish = self._tier.begin_store(slots, pages, payloads, digests)
        else:
            finish = partial(list, self._tier.store(slots, pages, payloads, digests))
        begun_s, sizes = time.perf_counter() - start, [len(payload) for payload in payloads]

        def finished() -> list[Refused | None]:
            start = time.perf_counter()
            stored = finish()
            waited_s = begun_s + time.perf_counter() - start
            if written := sum(size for size, refused in zip(sizes, stored, strict=True) if refused is None):
                now = written / max(waited_s, 1e-9)
                self._bytes_per_s = MEMORY * self._bytes_per_s + (1 - MEMORY) * now if self._bytes_per_s else now
            return stored

        return finished
