"""How pages of the host tier move to the NUMA node they are used from, as the tier's rule says (`kvtier.tiers.host`).

Copied on a worker, taken over under the residency's lock: until then a page is where it was, and one that somebody wants meanwhile stays
there. Coroutines of the mover's loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kvtier.pages import NO_ROW, READY
from kvtier.tiers.host import HostTier
from kvtier.tiers.host_moves import Pair

if TYPE_CHECKING:
    from kvtier.residency.residency import Residency


async def move_between_nodes(residency: Residency) -> int:
    """Move what should; how many pages moved. Only pages that nobody leases, reads or brings up."""
    for index, tier in enumerate(residency.tiers):
        if isinstance(tier, HostTier) and tier.moves_pages:
            return await _Moves(residency, index, tier).run()
    return 0


class _Moves:
    def __init__(self, residency: Residency, index: int, host: HostTier) -> None:
        self._residency = residency
        self._index = index
        self._host = host

    async def run(self) -> int:
        residency, done = self._residency, 0
        waiting = await residency.mover.work(self._host.plan_moves, lambda slot: self._at_rest(slot) is not None, residency.clock())
        while waiting:
            with residency.lock:
                pairs, rows, waiting = self._begin(waiting)
            if not pairs:
                break
            done += await self._carry(pairs, rows)
        return done

    def _begin(self, waiting: Sequence[tuple[int, int]]) -> tuple[dict[int, list[Pair]], list[int], list[tuple[int, int]]]:
        """Of (slot, node): pairs by node, their rows, which are held now, and those for which there is no room yet. Lock held."""
        pairs: dict[int, list[Pair]] = {}
        rows: list[int] = []
        later: list[tuple[int, int]] = []
        for source, node in waiting:
            row = self._at_rest(source)
            if row is None:
                self._host.gave_up()
            elif (target := self._host.reserve_on(node)) is None:
                later.append((source, node))
            else:
                pairs.setdefault(node, []).append((source, target))
                rows.append(row)
        self._residency.table.hold(rows, self._index)
        return pairs, rows, later

    async def _carry(self, pairs: Mapping[int, Sequence[Pair]], rows: Sequence[int]) -> int:
        """Copy the pages and let the copies take their places; how many did."""
        residency = self._residency
        arrived: list[bool] = []
        try:
            for node, some in pairs.items():
                arrived += await residency.mover.work(self._host.carry, some, node, node=node)
        finally:
            with residency.lock:
                residency.table.unhold(rows, self._index)
                moves = [pair for some in pairs.values() for pair in some]
                arrived += [False] * (len(moves) - len(arrived))
                moved = sum([self._settle(pair, whole) for pair, whole in zip(moves, arrived, strict=True)])
        return moved

    def _settle(self, pair: Pair, whole: bool) -> bool:
        """Let the copy in the pair's second slot take the place of the first, unless that is in use or did not arrive. Lock held."""
        residency, host, (source, target) = self._residency, self._host, pair
        row = self._at_rest(source) if whole else None
        if row is None:
            host.gave_up()
            host.free([target])
            return False
        host.moved(pair, residency.clock())
        residency.table.slot[self._index, row] = target
        host.free([source])
        return True

    def _at_rest(self, slot: int) -> int | None:
        """The row of the page in a slot, if nobody needs it there. Lock held, or else what it says may be over."""
        table, index = self._residency.table, self._index
        key = self._host.key_of(slot)
        row = NO_ROW if key is None else table.row(key)
        if row == NO_ROW or table.state[index, row] != READY or table.slot[index, row] != slot:
            return None
        return None if table.leases[row] or table.readers[index, row] else row
