"""The bound behind "never worse than LRU": what LRU would have found is counted beside, and followed while the score owes it too much.

An LRU tier of `room` pages holds the `room` pages used last, so whether it had found a page is told by when that page was used before: no
second tier is simulated. Counted are the pages by the call that used them last (`ring`), and `first`, the oldest call whose pages LRU
would still hold; both move with every use, O(1) amortised. A use that only the tier found pays back, one that only LRU would have found
is *debt*; debt does not fall below 0, so credit from long ago buys nothing.

When the debt exceeds the room, pages leave in LRU's order for BASE_USES x room uses, twice as long after every such fall; a net gain of
twice the room takes that back. Following LRU, the tier finds what LRU finds, but for at most `room` pages that it did not hold at the
beginning. So in `n` uses a tier finds at most (2 x room + the pages of a request) x (1 + log2(1 + n / room)) pages less than LRU
whatever the traffic, and after every net gain the count starts anew. (The idea is that of metrical task systems: pay for a switch only
after as much was lost by not switching. The bound assumes that pages may leave when they should: nobody holds or pins them.)

`kvtier.columns` does the counting where it is compiled, `count` without. Owned by one policy, called under the policy owner's lock.
"""

from __future__ import annotations

import numpy as np

from kvtier.policy.base import Pages

BASE_USES = 8
"""Uses per page of room for which LRU is followed after the first fall."""
CALLS_PER_PAGE = 4
"""Calls that are told apart, per page of room: what was used before all of them, LRU would not hold."""
FEWEST_CALLS = 1 << 12
UNKNOWN_CALL = -1
"""Last use of a page that nobody would hold, whatever the order."""

MOST_DOUBLINGS = 24
"""After so many falls in a row LRU is followed no longer than before."""

STATE = FIRST, HELD, OWED, SETTLED, ROOM, FOLLOWS, DEBT, GAIN, LEFT, DOUBLINGS, FALLS = range(11)
"""Cells of `state`: oldest call whose pages LRU holds; pages that LRU holds; pages that LRU would have found and the tier did not, less
those that only the tier did; as many at the last `settle`; room; 1 while LRU is followed; the debt; pages found beyond LRU since the last
return; uses until the next return; falls since the last gain; falls in all."""
_BOUNDLESS = 1 << 61


class Guard:
    """Counts for one tier. `state` and `ring` are columns that compiled loops write, too."""

    def __init__(self) -> None:
        self.state: Pages = np.zeros(len(STATE), np.int64)
        self.state[ROOM] = _BOUNDLESS
        self.ring: Pages = np.zeros(FEWEST_CALLS, np.int64)

    @property
    def falls(self) -> int:
        """How often LRU was followed."""
        return int(self.state[FALLS])

    @property
    def debt(self) -> int:
        """Pages that LRU would have found and the tier did not, less those that only the tier did; 0 or more."""
        return int(self.state[DEBT])

    @property
    def follows_lru(self) -> bool:
        """Whether pages leave in LRU's order now."""
        return bool(self.state[FOLLOWS])

    def fit(self, room: int, call: int) -> None:
        """The tier is full with `room` pages, as call number `call` begins."""
        self.state[ROOM] = room
        if CALLS_PER_PAGE * room <= len(self.ring):
            return
        ring = np.zeros(1 << (CALLS_PER_PAGE * room - 1).bit_length(), np.int64)
        calls = np.arange(int(self.state[FIRST]), call)
        ring[calls % len(ring)] = self.ring[calls % len(self.ring)]
        self.ring = ring

    def found(self, calls: Pages) -> None:
        """Pages last used by these calls are here and used."""
        self.state[OWED] -= len(calls) - self._forget(calls)

    def missed(self, calls: Pages) -> None:
        """Pages last used by these calls come back."""
        self.state[OWED] += self._forget(calls)

    def removed(self, calls: Pages) -> None:
        """Pages last used by these calls leave whatever the order."""
        self._forget(calls)

    def count(self, pages: int, call: int) -> None:
        """So many pages were used by `call`."""
        state, ring = self.state, self.ring
        ring[call % len(ring)] += pages
        state[HELD] += pages
        while state[FIRST] < call and (state[HELD] > state[ROOM] or call - state[FIRST] >= len(ring) - 1):
            state[HELD] -= ring[state[FIRST] % len(ring)]
            ring[state[FIRST] % len(ring)] = 0
            state[FIRST] += 1

    def _forget(self, calls: Pages) -> int:
        """Takes these uses out of the count, of those that LRU holds; how many were."""
        held = calls[calls >= self.state[FIRST]]
        np.subtract.at(self.ring, held % len(self.ring), 1)
        self.state[HELD] -= len(held)
        return len(held)

    def settle(self, uses: int) -> bool:
        """After a call of so many uses: whether it is the other order's turn now."""
        state = self.state
        owed, room = int(state[OWED] - state[SETTLED]), int(state[ROOM])
        state[SETTLED] = state[OWED]
        if state[FOLLOWS]:
            state[LEFT] -= uses
            if state[LEFT] > 0:
                return False
            state[FOLLOWS] = state[DEBT] = state[GAIN] = 0
            return True
        state[DEBT] = max(0, state[DEBT] + owed)
        state[GAIN] -= owed
        if state[GAIN] > 2 * room:
            state[GAIN] = state[DOUBLINGS] = 0
        if state[DEBT] <= room:
            return False
        state[FOLLOWS] = 1
        state[FALLS] += 1
        state[LEFT] = BASE_USES * room << int(state[DOUBLINGS])
        state[DOUBLINGS] = min(state[DOUBLINGS] + 1, MOST_DOUBLINGS)
        return True
