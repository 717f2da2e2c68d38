"""The contract of an eviction policy: pure over plain data, no tensors, no I/O, no clock of its own.

One policy object serves one tier. It knows the pages that live in that tier, by page id (a small whole number that stays the same while
the page exists), and answers one question: which should leave. The live cache and the trace replay run the same objects.
Called under the owner's lock; not thread-safe by itself.

Pages come and go by the hundred, one request at a time, so calls take whole arrays (int64 `[n]`, no page twice in one call). A call that
raises has changed nothing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kvtier import columns

ROOT = -1
"""Parent of a page that has none."""

Pages = NDArray[np.int64]
"""Page ids `[n]`."""
Mask = NDArray[np.bool_]
"""One answer per page `[n]`."""
Protection = Callable[[Pages], Mask]
"""Says which of these pages may not leave. Within one call of a policy it is asked about a page once at most, in leaving order, and only
about pages that would be leaves once those asked about before them are gone. Not all of them need to leave in the end.

One with an attribute `exit` lets compiled loops answer instead, by the columns of a page table (`exit_of`): both must say the same.
"""


Names = Callable[[Pages], Pages]
"""What pages are called for as long as anybody could remember them, int64 `[n]`: equal content, equal name, whatever the id."""


def by_id(pages: Pages) -> Pages:
    """The `Names` of an owner that never gives the id of one page to another, like a replay."""
    return pages


def exit_of(protected: Protection) -> columns.Exit | None:
    """By what compiled loops can answer for `protected`; None where only it can."""
    exit: columns.Exit | None = getattr(protected, "exit", None)
    return exit


def nothing_protected(pages: Pages) -> Mask:
    """The `Protection` under which every page may leave."""
    return np.zeros(len(pages), np.bool_)


class EvictionPolicy(ABC):
    """Chooses victims in one tier. Victims are leaves first: a page with a child in the same tier is never a victim.

    Times are seconds on any clock that does not run backwards (an earlier `now` is treated as the latest one seen). `pressure` is used
    / capacity of the tier, 0 to 1, smoothed by the owner.
    """

    name: str

    def __init_subclass__(cls) -> None:
        """A policy with an `insert` of its own hears of all pages there, unless it has a `settle` of its own, too; so with `evict`."""
        super().__init_subclass__()
        for usual, at_once in (("insert", "settle"), ("evict", "give_way"), ("evict", "gives_way")):
            if usual in cls.__dict__ and at_once not in cls.__dict__:
                setattr(cls, at_once, getattr(EvictionPolicy, at_once))

    def __init__(self) -> None:
        self.names: Names = by_id
        """How to tell that a page is one that was here before. Ids say nothing about that when the owner gives the id of a page that is
        gone to another page; such an owner sets this before the first `insert`. It is asked within `insert`, about the pages that come,
        and at no other time; policies that remember pages that left (`kvtier.policy.ghosts`) do so by these names."""

    @abstractmethod
    def insert(self, pages: Pages, parents: Pages, depths: Pages, now: float) -> None:
        """Copies of `pages` were committed in this tier; counts as their first touch.

        `parents` are the pages before them (ROOT for none); they need not live in this tier, now or ever. `depths` are the numbers of
        pages before them. ValueError naming the first page that is already here, or for impossible numbers.
        """

    def settle(self, chain: columns.NewChain, now: float) -> Pages | None:
        """Pages that follow each other settle in a page table whose names are `names`, and come into this tier, in one step: `insert`.

        None, with nothing changed, where it cannot be done in one step: without compiled loops that know both, or if one finds anything
        unusual.
        """
        return None

    @abstractmethod
    def touch(self, pages: Pages, now: float) -> None:
        """`pages` were used, all at the same time. O(1) a page. KeyError naming the first page that is not here."""

    @abstractmethod
    def remove(self, pages: Pages) -> None:
        """`pages` left this tier for another reason than `evict`. KeyError naming the first page that is not here."""

    @abstractmethod
    def evict(self, count: int, protected: Protection, now: float, pressure: float) -> Pages | None:
        """Exactly `count` victims, in leaving order, already removed from the policy; or None and nothing changed.

        A parent may follow its last child within one call. Cost grows with `count` and with the protected pages met, never with the
        number of pages. ValueError for a negative count.
        """

    @property
    def gives_way(self) -> bool:
        """Whether there are compiled loops for `give_way`: then its None says that fewer pages may leave, or not all of the first can by
        themselves."""
        return False

    def give_way(self, count: int, exit: columns.Exit, now: float) -> tuple[Pages, list[int]] | None:
        """`evict` `count` pages, of those that may leave by what `exit` says, and drop their copies from the page table, in one step.

        These pages, and the slots of their copies in the tier, those of the last page first. None, with nothing changed, where it cannot be
        done in one step: without compiled loops that know both, or if one finds anything unusual. What `peek` may do to the order, this
        may, too.
        """
        return None

    @abstractmethod
    def peek(self, count: int, protected: Protection, now: float, pressure: float) -> Pages:
        """Up to `count` pages that `evict` would choose, in that order; nothing changes. ValueError for a negative count."""

    def expired(self, count: int, protected: Protection, now: float, pressure: float) -> Pages:
        """Up to `count` pages whose score fell below the policy's threshold at this pressure, coldest first; nothing changes.

        Policies without a threshold have none.
        """
        return np.empty(0, np.int64)

    def record_attention(self, page: int, mass: float) -> None:
        """The engine saw `mass` (0 to 1: share of the attention of one step) on `page`. Ignored by policies that do not use it.

        ValueError for NaN, negative or above one; KeyError if the page is not here. Policies that do not use it may accept anything.
        """
        return

    @abstractmethod
    def score(self, page: int, now: float, pressure: float) -> float:
        """What `evict` compares: larger stays. KeyError if the page is not here."""

    def chance(self, pages: Pages, now: float) -> NDArray[np.float64]:
        """The chance, 0 to 1, that each of these pages is ever used again, `[n]`: of pages that are here, or were and have not come back.

        Whether a page is worth the write into a colder tier is told by this (`kvtier.policy.admission`). Policies that cannot tell say 1.
        """
        return np.ones(len(pages))

    def promised(self, within_s: float, now: float) -> float:
        """What `score` would be for a page that is sure to be used within so many seconds. Policies that cannot tell put it above all."""
        return math.inf

    @abstractmethod
    def here(self, pages: Pages) -> Mask:
        """Which of `pages` are in this tier."""

    def __contains__(self, page: object) -> bool:
        """Whether the page is in this tier."""
        return isinstance(page, int) and bool(self.here(np.array([page], np.int64))[0])

    @abstractmethod
    def __len__(self) -> int:
        """Pages in this tier."""

    @abstractmethod
    def check_integrity(self) -> None:
        """IntegrityError if the policy's structures disagree. May be slow; for tests."""
