"""Host memory registered with a GPU in chunks: one giant registration fails as a whole, and holds the driver's lock for seconds.

A copy may not cross the border of two registrations (the driver refuses some such copies), so chunks end where a slot ends, and `covers`
says what may be copied directly. State belongs to the owner of the memory.
"""

from __future__ import annotations

import logging
from math import lcm

import numpy as np
from numpy.typing import NDArray

from kvtier.cuda.surface import Accelerator, Addresses
from kvtier.errors import DeviceError

log = logging.getLogger(__name__)
CHUNK_BYTES = 1 << 30
_PAGE_BYTES = 4096


class Registration:
    """`size_bytes` of memory from `address` (aligned to 4096), made of slots of `slot_bytes`: registered from the start as far as it goes.

    `registered_bytes` is how far; `why` is why not further, empty if all of it is.
    """

    def __init__(
        self, accelerator: Accelerator | None, address: int, size_bytes: int, slot_bytes: int, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        self._accelerator = accelerator
        self._address = address
        unit = lcm(slot_bytes, _PAGE_BYTES)
        self.chunk_bytes = max(1, chunk_bytes // unit) * unit if unit <= chunk_bytes else max(1, chunk_bytes // _PAGE_BYTES) * _PAGE_BYTES
        self.registered_bytes = 0
        self.why = "there is no GPU" if accelerator is None else ""
        self._starts: list[int] = []
        if accelerator is None:
            return
        for start in range(0, size_bytes, self.chunk_bytes):
            length = min(self.chunk_bytes, size_bytes - start)
            refused = accelerator.register(address + start, length)
            if refused is not None:
                self.why = f"{refused}, after {start} of {size_bytes} bytes"
                return
            self._starts.append(start)
            self.registered_bytes = start + length

    @property
    def chunks(self) -> int:
        """How many pieces are registered."""
        return len(self._starts)

    def covers(self, addresses: Addresses, size_bytes: int) -> NDArray[np.bool_]:
        """Which stretches of `size_bytes` can be copied directly: those inside one chunk."""
        first = addresses - self._address
        last = first + size_bytes - 1
        inside: NDArray[np.bool_] = (first >= 0) & (last < self.registered_bytes) & (first // self.chunk_bytes == last // self.chunk_bytes)
        return inside

    def undo(self) -> None:
        """Unregister everything. Safe to call twice; no copy may be using the memory.

        A GPU that failed refuses that too: the log says so, and whoever closes goes on with the rest.
        """
        starts, self._starts, self.registered_bytes = self._starts, [], 0
        if self._accelerator is not None:
            for start in starts:
                try:
                    self._accelerator.unregister(self._address + start)
                except DeviceError as error:
                    log.warning("host memory stays registered: %s", error)
