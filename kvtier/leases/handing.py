"""Handing pages out to an engine that has blocks of its own: from memory where they are, or brought to the staging area first.

`NearPages` are verified and decoded piece by piece into a little memory that stays in the processor's cache: they wait for no room in the
staging area, and each byte goes through main memory once. `ComingPages` come up while others are handed out. Both hold their pages from
when they are made until `release`, and belong to one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from kvtier.formats.base import Payload
from kvtier.keys import PageKey
from kvtier.leases.lease import Lease
from kvtier.mover.plan import layers_per_decode
from kvtier.pages import DEVICE
from kvtier.residency import Residency
from kvtier.tiers.base import Refused, Tier

HOST = DEVICE + 1

HandOut = Callable[[Sequence[int], Sequence[torch.Tensor], slice], None]
"""Copies pages to the engine: their positions in the list of keys; of each page the layers that the slice says,
`[layers, planes, page_tokens, kv_heads, head_dim]`, in CPU memory that is another's afterwards."""


class Part(Protocol):
    """Some of the pages that are asked for, on their way to the engine together."""

    keys: Sequence[PageKey]

    def hand_out(self, first: int, hand_out: HandOut, until_s: float | None) -> int:
        """Hand the pages out in order, the first one as position `first`. How many, up to one that does not come, or not before
        `time.monotonic()` reaches `until_s`. Once."""
        ...

    def release(self) -> None:
        """Let all pages go. A second release does nothing."""
        ...


class NearPages:
    """Pages that are in the staging area, or in `host`, the tier below it, which is memory."""

    def __init__(self, residency: Residency, host: Tier, keys: Sequence[PageKey]) -> None:
        self.keys = keys
        self._residency, self._host = residency, host
        self._released = False
        with residency.lock:
            table = residency.table
            self._rows = residency.claim(keys)
            homes = table.warmest(self._rows)
            # One that has left since the keys were looked up ends this part: the caller looks again.
            self._count = int(np.append(np.flatnonzero(homes > HOST), len(homes))[0])
            self._parked = self._rows[homes == HOST]
            self._slots = table.slot[np.minimum(homes, HOST), self._rows].tolist()
            self._is_parked = (homes == HOST).tolist()
            table.hold(self._parked, HOST)

    def hand_out(self, first: int, hand_out: HandOut, until_s: float | None) -> int:
        """See `Part.hand_out`."""
        residency, began_s, parked, place = self._residency, time.perf_counter(), 0, 0
        layers = residency.layout.layers
        step = layers_per_decode(layers, residency.layout.page_bytes)
        room = torch.empty((1, step, *residency.layout.shape[1:]), dtype=residency.layout.torch_dtype)
        while place < self._count and (until_s is None or time.monotonic() < until_s):
            if not self._is_parked[place]:
                hand_out([first + place], [residency.device.page(self._slots[place])], slice(0, layers))
            elif (payload := self._verified(place)) is not None:
                for start in range(0, layers, step):
                    some = slice(start, min(start + step, layers))
                    pages = self._host.format.decode([payload], residency.layout, some, room[:, : some.stop - start])
                    hand_out([first + place], [pages[0]], some)
                parked += 1
            else:
                break
            place += 1
        if parked:
            with residency.lock:
                moved = parked * int(residency.page_bytes[HOST])
                residency.metrics.link(HOST, DEVICE).carried(parked, moved, time.perf_counter() - began_s)
        return place

    def release(self) -> None:
        """See `Part.release`."""
        residency = self._residency
        with residency.lock:
            if not self._released:
                residency.copying.let_go(self._parked, HOST)
                residency.release(self._rows)
            self._released = True

    def _verified(self, place: int) -> Payload | None:
        """What to decode; None, and the copy noted as one of no use, if it is not what was stored."""
        [payload] = self._host.load([self._slots[place]], [self.keys[place]], np.empty((1, 0), np.uint8))
        if not isinstance(payload, Refused):
            return self._host.format.unpack([payload], self._residency.layout)[0]
        with self._residency.lock:
            self._residency.copying.lose(int(self._rows[place]), HOST, payload)
        return None


class ComingPages:
    """Pages that `lease` brings up. Those that were handed out give their places in the staging area back, if they are elsewhere too."""

    def __init__(self, residency: Residency, keys: Sequence[PageKey], lease: Lease) -> None:
        self.keys = keys
        self._residency = residency
        self._lease = lease
        self._handed = 0

    def hand_out(self, first: int, hand_out: HandOut, until_s: float | None) -> int:
        """See `Part.hand_out`."""
        try:
            table = self._lease.wait(None if until_s is None else max(0.0, until_s - time.monotonic()))
        except TimeoutError:
            return 0
        slots = table[: self._lease.pages].tolist()
        device = self._residency.device
        hand_out(range(first, first + len(slots)), [device.page(slot) for slot in slots], slice(0, self._residency.layout.layers))
        self._handed = len(slots)
        return len(slots)

    def release(self) -> None:
        """See `Part.release`."""
        residency = self._residency
        with residency.lock:
            rows = np.array(self._lease.rows[: self._handed], np.int64)
            self._lease.release()
            residency.eviction.vacate(rows)
            self._handed = 0
