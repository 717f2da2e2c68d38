"""Least recently used, leaves first: what a radix tree's leaf LRU does (SGLang, vLLM's free list freed tail first).

A strong default for prefix caches: on the public Mooncake conversation trace nothing online beats it once a tier holds a fifth of the
distinct blocks. Not for small tiers in front of much one-shot traffic, where counts that outlive eviction help.
"""

# ruff: noqa: ARG001 - the contract gives every policy a clock and a pressure; this one needs neither.

from __future__ import annotations

from collections.abc import Container

from kvtier.policy.base import EvictionPolicy
from kvtier.policy.leaves import Leaves


class LRU(EvictionPolicy):
    """The score is the time of the last touch, in seconds; pressure plays no part. Ties: deeper first."""

    name = "lru"

    def __init__(self) -> None:
        self._leaves = Leaves()

    def insert(self, page: int, parent: int, depth: int, now: float) -> None:
        self._leaves.insert(page, parent, depth, now, group=0)

    def touch(self, page: int, now: float) -> None:
        self._leaves.touch(page, now)

    def remove(self, page: int) -> None:
        self._leaves.remove(page)

    def evict(self, count: int, protected: Container[int], now: float, pressure: float) -> list[int] | None:
        victims = self._leaves.take(count, protected, _last_touch)
        if victims is not None:
            self._leaves.note(now)
        return victims

    def peek(self, count: int, protected: Container[int], now: float, pressure: float) -> list[int]:
        return self._leaves.first(count, protected, _last_touch)

    def score(self, page: int, now: float, pressure: float) -> float:
        return self._leaves.last_touch(page)

    def __len__(self) -> int:
        return len(self._leaves)

    def __contains__(self, page: object) -> bool:
        return page in self._leaves

    def check_integrity(self) -> None:
        self._leaves.check_integrity(_last_touch)


def _last_touch(group: int, last: float) -> float:
    return last
