"""Which pages should move to another node: the migration score of the NUMA models document (section 16.2.2), with what keeps it calm.

    score(page, node) = alpha * accesses from `node` - beta * accesses from elsewhere - gamma * cost of moving there

A page moves if the best node's score is more than theta above that of the node it is on. Accesses fade, those from elsewhere weigh by
distance (at the kernel's usual 20 they count as they are), staying costs nothing. Nothing ping-pongs: one access more or less never pays
for a move, a page that moved rests, twice as long after each further move, and a full node only exchanges pages where the pair gains more
than theta. Moves come in batches, the largest gains first. Pure but for the history, which belongs to whoever made it and has no lock.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass

from kvtier.errors import NumaError
from kvtier.numa.topology import LOCAL_DISTANCE

_FADED = 0.05  # accesses: a page with less is as good as never accessed
_MOST_DOUBLINGS = 16
Distance = Callable[[int, int], int]
"""The kernel's distance of two nodes, such as `Topology.distance`."""


@dataclass(frozen=True)
class PlannedMove:
    """One page that should go from node `source` to node `target`. `gain`: by how many accesses the scores differ; negative for a page that
    only makes room."""

    page: int
    source: int
    target: int
    gain: float


@dataclass(frozen=True)
class MigrationRule:
    """The weights: `local_weight` alpha, `remote_weight` beta, `cost_weight` gamma, `threshold` theta (in accesses). Accesses lose half of
    their weight in `half_life_s`; a page rests `rest_s` after its first move; at most `batch_pages` move at a time.

    NumaError for negative weights, a threshold or times that are not above 0, and an empty batch.
    """

    local_weight: float = 1.0
    remote_weight: float = 1.0
    cost_weight: float = 1.0
    threshold: float = 2.0
    half_life_s: float = 30.0
    rest_s: float = 30.0
    batch_pages: int = 64

    def __post_init__(self) -> None:
        if min(self.local_weight, self.remote_weight, self.cost_weight) < 0:
            raise NumaError(f"migration: the weights of {self} must not be negative")
        if not (self.threshold > 0 and self.half_life_s > 0 and self.rest_s > 0 and self.batch_pages >= 1):
            raise NumaError(f"migration: threshold, times and batch of {self} must be above 0, or pages would move for nothing")

    def score(self, accesses: Mapping[int, float], node: int, current: int, distance: Distance) -> float:
        """The score of a page with these `accesses` by node, which is on `current`, for being on `node`."""
        remote = sum(count * farness(distance(source, node)) for source, count in accesses.items() if source != node)
        # Moving reads the page from afar and writes it once: as much as one access from there and one at home.
        cost = 0.0 if node == current else 1 + farness(distance(current, node))
        return self.local_weight * accesses.get(node, 0.0) - self.remote_weight * remote - self.cost_weight * cost

    def plan(
        self,
        history: AccessHistory,
        node_of: Callable[[int], int | None],
        room: Mapping[int, int],
        idle: Mapping[int, Iterable[int]],
        distance: Distance,
        now: float,
    ) -> list[PlannedMove]:
        """The moves that pay now, in an order in which each finds room.

        `node_of` a page (None: it is gone, or may not move), `room`: free places by node, for every node that pages may be on. `idle`: by
        node, pages nobody accessed lately, which may make room for others. An exchange takes one free place somewhere.
        """
        places = dict(room)
        wishes = []
        for page in history.pages():
            current = node_of(page)
            if current is None or current not in places or history.rests(page, now):
                continue
            accesses = history.accesses(page, now)
            if accesses.keys() <= {current}:
                continue
            here = self.score(accesses, current, current, distance)
            target = max(places, key=lambda node: (self.score(accesses, node, current, distance), node == current))
            gain = self.score(accesses, target, current, distance) - here
            if target != current and gain > self.threshold:
                wishes.append(PlannedMove(page, current, target, gain))
        wishes.sort(key=lambda move: (-move.gain, move.page))
        partners = {node: self._partners(history, node_of, node, idle.get(node, ()), now) for node in {wish.target for wish in wishes}}
        taken = {wish.page for wish in wishes}
        moves: list[PlannedMove] = []
        for wish in wishes:
            exchanged = [] if places[wish.target] else self._make_room(wish, partners[wish.target], taken, places, distance)
            if exchanged is None or len(moves) + len(exchanged) + 1 > self.batch_pages:
                continue
            for move in (*exchanged, wish):
                places[move.target] -= 1
                places[move.source] += 1
                moves.append(move)
        return moves

    def _partners(
        self, history: AccessHistory, node_of: Callable[[int], int | None], node: int, idle: Iterable[int], now: float
    ) -> Iterator[tuple[int, Mapping[int, float]]]:
        """Pages on `node` that may make room, with their accesses: first those nobody accessed, then those with few."""
        for page in idle:
            if node_of(page) == node and page not in history:
                yield page, {}
        known = [(sum(history.accesses(page, now).values()), page) for page in history.pages() if node_of(page) == node]
        for _, page in heapq.nsmallest(self.batch_pages, known):
            if not history.rests(page, now):
                yield page, history.accesses(page, now)

    def _make_room(
        self,
        wish: PlannedMove,
        partners: Iterator[tuple[int, Mapping[int, float]]],
        taken: set[int],
        places: MutableMapping[int, int],
        distance: Distance,
    ) -> list[PlannedMove] | None:
        """The move of another page out of the way; None if there is no place for it, or nobody whose loss is worth it."""
        aside = min((node for node, free in places.items() if free), key=lambda node: (node != wish.source, node), default=None)
        if aside is None:
            return None
        for page, accesses in partners:
            if page in taken:
                continue
            gain = self.score(accesses, aside, wish.target, distance) - self.score(accesses, wish.target, wish.target, distance)
            if wish.gain + gain > self.threshold:
                taken.add(page)
                return [PlannedMove(page, wish.target, aside, gain)]
        return None


@dataclass
class _Page:
    accesses: dict[int, float]
    seen_s: float
    moves: int = 0
    rests_until_s: float = float("-inf")


class AccessHistory:
    """From which nodes pages were accessed lately, of at most `most_pages` pages: the least recently accessed one is forgotten first."""

    def __init__(self, rule: MigrationRule, most_pages: int = 1 << 16) -> None:
        self._rule = rule
        self._most_pages = most_pages
        self._pages: OrderedDict[int, _Page] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, page: int) -> bool:
        return page in self._pages

    def pages(self) -> list[int]:
        """Those that are known, the least recently accessed first."""
        return list(self._pages)

    def record(self, page: int, node: int, now: float, count: float = 1.0) -> None:
        """`count` accesses to a page by CPUs of `node` (or by a device there)."""
        known = self._pages.get(page)
        if known is None:
            self._pages[page] = _Page({node: count}, now)
            if len(self._pages) > self._most_pages:
                self._pages.popitem(last=False)
            return
        known.accesses = self._faded(known, now)
        known.accesses[node] = known.accesses.get(node, 0.0) + count
        known.seen_s = now
        self._pages.move_to_end(page)

    def accesses(self, page: int, now: float) -> Mapping[int, float]:
        """What is left of a page's accesses, by node."""
        known = self._pages.get(page)
        return {} if known is None else self._faded(known, now)

    def rests(self, page: int, now: float) -> bool:
        """Whether the page moved so lately that it stays where it is."""
        known = self._pages.get(page)
        return known is not None and now < known.rests_until_s

    def moved(self, page: int, now: float, to_page: int | None = None) -> None:
        """A page moved (and is called `to_page` from now on): it rests, twice as long each time."""
        known = self._pages.pop(page, None) or _Page({}, now)
        known.rests_until_s = now + self._rule.rest_s * 2 ** min(known.moves, _MOST_DOUBLINGS)
        known.moves += 1
        self._pages[page if to_page is None else to_page] = known

    def forget(self, page: int) -> None:
        """The page is gone."""
        self._pages.pop(page, None)

    def fade(self, now: float) -> None:
        """Forget pages whose accesses have faded and that do not rest."""
        for page, known in list(self._pages.items()):
            if now >= known.rests_until_s and sum(self._faded(known, now).values()) < _FADED:
                del self._pages[page]

    def _faded(self, page: _Page, now: float) -> dict[int, float]:
        left = 0.5 ** (max(0.0, now - page.seen_s) / self._rule.half_life_s)
        return {node: count * left for node, count in page.accesses.items()}


def farness(distance: int) -> float:
    """What an access over a distance costs beyond a local one, in accesses: 0 at home, 1 at the kernel's usual distance of 20."""
    return max(0.0, distance / LOCAL_DISTANCE - 1)
