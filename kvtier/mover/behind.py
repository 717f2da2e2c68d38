"""Writing behind: a piece of a transfer is written while the next one is read, verified, decoded and encoded.

State belongs to the worker that carries the transfer. At most one piece is under way when the next is handed over; the memory that bounds
this is the tier's (`Tier.begin_store`). What was begun is always waited for, also when making the next piece fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvtier.formats.base import Payload
from kvtier.mover.packing import Packer
from kvtier.mover.transfer import Transfer
from kvtier.tiers.base import Refused


class WriteBehind:
    """Stores the pieces of `transfer` in its target slots. To be closed, after which `moved` and the transfer's refusals are complete."""

    def __init__(self, transfer: Transfer, packer: Packer) -> None:
        self.moved = 0
        """Encoded bytes of pages that were stored."""
        self._transfer = transfer
        self._packer = packer
        self._settle: Callable[[], None] = _nothing

    def store(self, indices: Sequence[int], payloads: Sequence[Payload], digests: Sequence[bytes] | None, last: bool) -> None:
        """Start to write one payload per index of a move; their memory is free again afterwards. Waits for the piece before.

        `last`: no other piece follows, so that the worker has nothing else to do than to write this one itself.
        """
        begun = self._packer.begin([self._transfer.moves[index] for index in indices], payloads, digests, ahead=not last)
        sizes = [len(payload) for payload in payloads]
        before, self._settle = self._settle, lambda: self._note(indices, sizes, begun())
        before()

    def close(self) -> None:
        """Wait for what is being written."""
        last, self._settle = self._settle, _nothing
        last()

    def _note(self, indices: Sequence[int], sizes: Sequence[int], stored: Sequence[Refused | None]) -> None:
        for index, size, refused in zip(indices, sizes, stored, strict=True):
            if refused is None:
                self.moved += size
            else:
                self._transfer.refused[index] = refused


def _nothing() -> None:
    """Nothing is being written."""
