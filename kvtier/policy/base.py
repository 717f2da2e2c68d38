"""The contract of an eviction policy: pure over plain data, no tensors, no I/O, no clock of its own.

One policy object serves one tier. It knows the pages that live in that tier, by page id (a small whole number that stays the same while
the page exists), and answers one question: which should leave. The live cache and the trace replay run the same objects.
Called under the owner's lock; not thread-safe by itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container

ROOT = -1
"""Parent of a page that has none."""


class EvictionPolicy(ABC):
    """Chooses victims in one tier. Victims are leaves first: a page with a child in the same tier is never a victim.

    Times are seconds on any clock that does not run backwards (an earlier `now` is treated as the latest one seen). `pressure` is used
    / capacity of the tier, 0 to 1, smoothed by the owner.
    """

    name: str

    @abstractmethod
    def insert(self, page: int, parent: int, depth: int, now: float) -> None:
        """A copy of `page` was committed in this tier; counts as its first touch.

        `parent` is the page before it (ROOT for none); it need not live in this tier, now or ever. `depth` is the number of pages
        before it. ValueError if the page is already here.
        """

    @abstractmethod
    def touch(self, page: int, now: float) -> None:
        """`page` was used. O(1). KeyError if it is not here."""

    @abstractmethod
    def remove(self, page: int) -> None:
        """`page` left this tier for another reason than `evict`. KeyError if it is not here."""

    @abstractmethod
    def evict(self, count: int, protected: Container[int], now: float, pressure: float) -> list[int] | None:
        """Exactly `count` victims, in leaving order, already removed from the policy; or None and nothing changed.

        Pages for which `page in protected` are passed over (asked for candidates only, so it may be computed on demand). A parent may
        follow its last child within one call. Cost grows with `count` and with the protected candidates met, never with the number of
        pages.
        """

    @abstractmethod
    def peek(self, count: int, protected: Container[int], now: float, pressure: float) -> list[int]:
        """Up to `count` pages that `evict` would choose, in that order; nothing changes."""

    def expired(self, count: int, protected: Container[int], now: float, pressure: float) -> list[int]:
        """Up to `count` pages whose score fell below the policy's threshold at this pressure, coldest first; nothing changes.

        Policies without a threshold have none.
        """
        return []

    def record_attention(self, page: int, mass: float) -> None:
        """The engine saw `mass` (0 to 1: share of the attention of one step) on `page`. Ignored by policies that do not use it.

        ValueError for NaN, negative or above one; KeyError if the page is not here. Policies that do not use it may accept anything.
        """
        return

    @abstractmethod
    def score(self, page: int, now: float, pressure: float) -> float:
        """What `evict` compares: larger stays. KeyError if the page is not here."""

    @abstractmethod
    def __len__(self) -> int:
        """Pages in this tier."""

    @abstractmethod
    def __contains__(self, page: object) -> bool:
        """Whether the page is in this tier."""

    @abstractmethod
    def check_integrity(self) -> None:
        """IntegrityError if the policy's structures disagree. May be slow; for tests."""
