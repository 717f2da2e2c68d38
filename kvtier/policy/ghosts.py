"""Ghosts: what a policy still knows about pages that have left its tier, in bounded memory.

Owned by one policy, called under the policy owner's lock. A ghost goes by the page's name (`EvictionPolicy.names`), never by its id: the
live cache gives the id of a page that is gone to the next one, often at once, and a page that comes back then has another id.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Generic, TypeVar

Fact = TypeVar("Fact")

GHOSTS_PER_PAGE = 32
"""Ghosts kept for every page the tier holds."""


class Ghosts(Generic[Fact]):
    """One fact about each of the last `per_page` x pages names that left; the oldest is forgotten first. About 100 bytes a ghost."""

    def __init__(self, per_page: float = GHOSTS_PER_PAGE) -> None:
        self.per_page = per_page
        self._facts: dict[int, Fact] = {}

    def __len__(self) -> int:
        return len(self._facts)

    def __contains__(self, name: object) -> bool:
        return name in self._facts

    def leave(self, facts: Iterable[tuple[int, Fact]], pages: int) -> None:
        """Pages by these names left, and this is what to remember of them; the tier held `pages` pages until now. O(1) a page."""
        known = self._facts
        for name, fact in facts:
            known.pop(name, None)
            known[name] = fact
        self.shrink(int(self.per_page * pages))

    def recall(self, name: int) -> Fact | None:
        """What was remembered about a page that comes back, which is then no ghost any more; None for a page not known."""
        return self._facts.pop(name, None)

    def shrink(self, most: int) -> None:
        """Forget the oldest until `most` are left. Paid for by the calls that brought them."""
        if (excess := len(self._facts) - most) > 0:
            for name in list(islice(self._facts, excess)):
                del self._facts[name]
