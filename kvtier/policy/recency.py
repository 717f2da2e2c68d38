"""When each page of a tier was used last, as a journal: what LRU is but for the choice.

Every touch appends (time, key) for all its pages at once and leaves older entries behind as dead ones. The oldest moment of the journal is
sorted, deepest page first, when eviction gets there; children touched with or after their parents so leave before them, many in one step.
What that order cannot foresee waits in a small heap: a parent that became a leaf after its turn, a page that was protected at its turn. (A
log swept from one end is the lazy queue of log-structured stores; no source beyond that.)

Where the compiled loops of `kvtier.columns` are, they do the usual cases, to the same bits.
"""

from __future__ import annotations

import math
from heapq import heapify, heappush

import numpy as np
from numpy.typing import NDArray

from kvtier import columns
from kvtier.errors import IntegrityError
from kvtier.policy.base import ROOT, EvictionPolicy, Mask, Pages

Entry = tuple[float, int]
"""(last touch in seconds, key): what leaves earlier sorts first."""

PAGE_BITS = 40
PAGE_MASK = np.array((1 << PAGE_BITS) - 1)
DEEPEST = (1 << (63 - PAGE_BITS)) - 1
"""A key is (DEEPEST - depth) above the page id, so that of pages used at the same moment the deepest sorts first."""
ABSENT = -1
"""The key of a page that is not here."""
NEVER = -math.inf
SPARE_ENTRIES = 1024

# Arrays without dimensions: with a Python number, NumPy spends longer on finding the type than on a whole request's pages.
_ONE = np.array(1)
_ABSENT, _NEVER, _FALSE = np.array(ABSENT), np.array(NEVER), np.array(False)
_DEEPEST = np.array(DEEPEST)
_BITS = np.array(PAGE_BITS)


class Recency(EvictionPolicy):
    """The pages of a tier by the time of their last touch, in seconds. Ties: deeper first.

    Journal and heap keep at most about twice as many entries as there are pages, plus a constant; the journal has room for twice that.
    """

    def __init__(self) -> None:
        super().__init__()
        self._latest = NEVER
        self._count = 0
        # One row a page, and one more at the end, which index ROOT reads and writes and nobody looks at.
        self._key: Pages = np.full(1, ABSENT)
        self._parent: Pages = np.full(1, ROOT)
        self._children: Pages = np.zeros(1, np.int64)
        self._last: NDArray[np.float64] = np.full(1, NEVER)
        self._unqueued: Mask = np.zeros(1, np.bool_)
        """Pages without an entry: their turn came while they had children. They get one when the last child leaves."""
        # Entries [head, sorted) are those of moment `front`, in leaving order; [sorted, tail) later ones, in order of time only.
        self._times: NDArray[np.float64] = np.empty(SPARE_ENTRIES)
        self._keys: Pages = np.empty(SPARE_ENTRIES, np.int64)
        self._head = self._sorted = self._tail = 0
        self._front = NEVER
        self._late: list[Entry] = []
        self._loops = self.attach()

    def attach(self) -> columns.OrderLoops | None:
        """The compiled loops over columns and journal as they are now; None where there are none."""
        loops = columns.loops()
        if loops is None:
            return None
        return loops.Order(self._key, self._parent, self._children, self._last, self._unqueued, self._keys, self._times)

    def insert(self, pages: Pages, parents: Pages, depths: Pages, now: float) -> None:
        if not len(pages):
            return
        if self._loops is not None and self._loops.arrive(pages, parents, depths):
            self._count += len(pages)
            self._note(now)
            if not self._append(pages):
                self._queue(pages, self._key[pages])
            return
        keys = _DEEPEST - depths << _BITS | pages
        if keys[keys.argmin()] < 0 or parents[parents.argmin()] < ROOT:
            told = f"pages {pages} with parents {parents} at depths {depths}"
            raise ValueError(f"{told}: ids and depths are 0 or more, a parent is another page or ROOT ({ROOT})")
        highest = max(int(pages[pages.argmax()]), int(parents[parents.argmax()]))
        if highest >= len(self._key) - 1:
            self._grow(highest + 1)
        held = self._key[pages]
        if held[held.argmax()] != ABSENT:
            raise ValueError(f"page {pages[held.argmax()]} is already in this tier")
        self._parent[pages] = parents
        self._key[pages] = keys
        np.add.at(self._children, parents, _ONE)
        self._count += len(pages)
        self._note(now)
        self._queue(pages, keys)

    def settle(self, chain: columns.NewChain, now: float) -> Pages | None:
        latest = now if now > self._latest else self._latest
        if self._loops is None or latest == self._front:
            return None
        pages = np.empty(len(chain[2]), columns.WHOLE)
        if not self._loops.settle(*chain, pages, self._tail, latest):
            return None
        self._latest = latest
        self._count += len(pages)
        self._tail += len(pages)
        return pages

    def touch(self, pages: Pages, now: float) -> None:
        if self._append(pages, now):
            return
        keys = self._require(pages)
        self._note(now)
        self._queue(pages, keys)

    def remove(self, pages: Pages) -> None:
        self._require(pages)
        self._take_out(pages)

    def score(self, page: int, now: float, pressure: float) -> float:
        self._require(np.array([page], np.int64))
        return float(self._last[page])

    def promised(self, within_s: float, now: float) -> float:
        return now

    def here(self, pages: Pages) -> Mask:
        known = (pages >= 0) & (pages < len(self._key) - 1)
        here: Mask = known & (self._key[np.where(known, pages, ROOT)] != ABSENT)
        return here

    def __len__(self) -> int:
        return self._count

    # -- columns ---------------------------------------------------------------------------------------------------------------

    def _require(self, pages: Pages) -> Pages:
        """The keys of `pages`. KeyError if one is not here; a key names its page, so wrapped-around negative ids are found, too."""
        try:
            keys = self._key[pages]
        except IndexError:
            raise KeyError(int(pages[~self.here(pages)][0])) from None
        strange = keys & PAGE_MASK != pages
        if 1 in strange.tobytes():
            raise KeyError(int(pages[strange][0]))
        return keys

    def _note(self, now: float) -> None:
        if now > self._latest:
            self._latest = now

    def _take_out(self, pages: Pages) -> None:
        """These pages are not here any more; parents that so become leaves after their turn get an entry."""
        parents = self._parent[pages]
        np.subtract.at(self._children, parents, _ONE)
        self._forget(pages, parents)

    def _forget(self, pages: Pages, parents: Pages) -> None:
        self._count -= len(pages)
        self._key[pages] = _ABSENT
        self._last[pages] = _NEVER
        self._unqueued[pages] = _FALSE
        waiting = self._unqueued[parents]
        if 1 in waiting.tobytes():
            self._free(parents[waiting])

    def _free(self, parents: Pages) -> None:
        for page in dict.fromkeys(parents.tolist()):
            if not self._children[page]:
                self._unqueued[page] = False
                heappush(self._late, (float(self._last[page]), int(self._key[page])))
        self._sweep_if_wasteful()

    def _grow(self, pages: int) -> None:
        held = len(self._key) - 1
        if pages <= held:
            return
        for name, empty in (("_key", ABSENT), ("_parent", ROOT), ("_children", 0), ("_last", NEVER), ("_unqueued", False)):
            column = getattr(self, name)
            larger = np.full(max(pages, 2 * held) + 1, empty, column.dtype)
            larger[:held] = column[:held]
            setattr(self, name, larger)
        self._loops = self.attach()

    # -- entries ---------------------------------------------------------------------------------------------------------------

    def _append(self, pages: Pages, now: float = NEVER) -> bool:
        """Entries for pages that were used now or at the latest moment, where loops and room are there and the moment is not sorted yet.

        Else False, and nothing done.
        """
        latest = now if now > self._latest else self._latest
        if self._loops is None or latest == self._front or not self._loops.queue(pages, self._tail, latest):
            return False
        self._latest = latest
        self._tail += len(pages)
        return True

    def _queue(self, pages: Pages, keys: Pages) -> None:
        """Entries for pages that were used at the latest moment."""
        self._last[pages] = latest = self._latest
        self._unqueued[pages] = _FALSE
        if latest == self._front:  # this moment is sorted already: the clock stands still
            for key in keys.tolist():
                heappush(self._late, (latest, key))
            self._sweep_if_wasteful()
            return
        tail = self._tail + len(keys)
        if tail > len(self._keys):
            self._make_room(len(keys))
            tail = self._tail + len(keys)
        self._keys[self._tail : tail] = keys
        self._times[self._tail : tail] = latest
        self._tail = tail

    def _alive(self, keys: Pages, times: NDArray[np.float64]) -> Mask:
        """Which entries still say when their page was used last, and how deep it is."""
        pages = keys & PAGE_MASK
        alive: Mask = (self._last[pages] == times) & (self._key[pages] == keys)
        return alive

    def _make_room(self, more: int) -> None:
        """Room for `more` entries at the journal's end. Paid for by the calls that brought the last as many."""
        keys, times = self._keys[self._head : self._tail], self._times[self._head : self._tail]
        most = 2 * self._count + SPARE_ENTRIES
        if len(keys) > most:
            keys, times = self._living(keys, times)
        ready = self._sorted - self._head if len(keys) == self._tail - self._head else int(np.count_nonzero(times == self._front))
        self._head, self._sorted, self._tail = 0, ready, len(keys)
        room = 2 * (most + more)
        if len(self._keys) < room or len(self._keys) > 4 * room:
            self._keys, self._times = np.empty(room, np.int64), np.empty(room)
            self._loops = self.attach()
        self._keys[: self._tail], self._times[: self._tail] = keys, times

    def _living(self, keys: Pages, times: NDArray[np.float64]) -> tuple[Pages, NDArray[np.float64]]:
        """The entries without dead and double ones, in leaving order."""
        alive = self._alive(keys, times)
        keys, times = keys[alive], times[alive]
        order = np.lexsort((keys, times))
        keys, times = keys[order], times[order]
        first = np.ones(len(keys), np.bool_)
        first[1:] = (keys[1:] != keys[:-1]) | (times[1:] != times[:-1])
        return keys[first], times[first]

    def _sweep_if_wasteful(self) -> None:
        if len(self._late) > 2 * self._count + SPARE_ENTRIES:
            late = set(self._late)
            self._late = [(time, key) for time, key in late if self._last[key & PAGE_MASK] == time and self._key[key & PAGE_MASK] == key]
            heapify(self._late)

    def _next_moment(self) -> bool:
        """Sort the entries of the journal's next moment; False if there is none. May be done again after going back."""
        while self._head == self._sorted < self._tail:
            start = self._sorted
            self._front = float(self._times[start])
            if self._loops is not None:
                self._head, self._sorted = self._loops.moment(start, self._tail)
                continue
            front = np.array(self._front)
            self._sorted = start + int(self._times[start : self._tail].searchsorted(front, "right"))
            entries = self._keys[start : self._sorted]
            alive = self._alive(entries, front)
            if 0 in alive.tobytes():
                entries = entries[alive]
            entries.sort()
            double = entries[1:] == entries[:-1]
            if 1 in double.tobytes():
                entries = np.concatenate((entries[:1], entries[1:][~double]))
            self._head = self._sorted - len(entries)
            if start < self._head < self._sorted:
                self._keys[start : self._head] = entries[0]  # read again as doubles, should the head go back
                self._keys[self._head : self._sorted] = entries
        return self._head < self._sorted

    def check_integrity(self) -> None:
        size = len(self._key) - 1
        pages = np.flatnonzero(self._key[:size] != _ABSENT)
        if len(pages) != self._count or not np.array_equal(self._key[pages] & PAGE_MASK, pages):
            raise IntegrityError(f"{len(pages)} pages are here, {self._count} were counted; or a key names another page")
        if not np.array_equal(self._last[:size] != NEVER, self._key[:size] != _ABSENT):
            raise IntegrityError("a page without a key has a last touch, or one with a key has none")
        children = np.zeros(size + 1, np.int64)
        np.add.at(children, self._parent[pages], _ONE)
        if not np.array_equal(children[:size], self._children[:size]):
            raise IntegrityError("child counts differ from the pages that are here")
        if np.count_nonzero(self._unqueued[:size] & (self._key[:size] == _ABSENT)):
            raise IntegrityError("an absent page waits for its last child to leave")
        if np.count_nonzero(self._unqueued[pages] & (children[pages] == 0)):
            raise IntegrityError("a leaf has no entry")
        if not 0 <= self._head <= self._sorted <= self._tail <= len(self._keys):
            raise IntegrityError(f"the journal's bounds are out of order: {self._head}, {self._sorted}, {self._tail} of {len(self._keys)}")
        keys, times = self._keys[self._head : self._tail], self._times[self._head : self._tail]
        ready = self._sorted - self._head
        alive = self._alive(keys, times)
        if (times[1:] < times[:-1]).any() or (times[:ready] != self._front).any() or (times[ready:] <= self._front).any():
            raise IntegrityError("the journal is out of order")
        if (keys[:ready][alive[:ready]][1:] <= keys[:ready][alive[:ready]][:-1]).any():
            raise IntegrityError("the journal's oldest moment is out of order")
        if any(self._late[(position - 1) // 2] > entry for position, entry in enumerate(self._late) if position):
            raise IntegrityError("the heap is out of order")
        queued = set((keys & PAGE_MASK)[alive].tolist())
        queued |= {page for time, key in self._late if self._last[page := key & int(PAGE_MASK)] == time and self._key[page] == key}
        if missing := set(pages[~self._unqueued[pages]].tolist()) - queued:
            raise IntegrityError(f"pages {sorted(missing)} are not queued")
