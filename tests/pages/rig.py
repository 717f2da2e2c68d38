"""Pages named by a path of choices, so that prefixes, siblings and orphans are easy to ask for."""

from __future__ import annotations

from hypothesis import strategies as st

from kvtier.pages import PageTable
from kvtier.tiers.base import PageId

TIERS = 3
ROOT = b"r" * 32


def key(path: tuple[int, ...]) -> bytes:
    """The key of the page at the end of a path of choices."""
    return b"".join(bytes([choice]) for choice in path).ljust(32, b"\xff") if path else ROOT


def page(path: tuple[int, ...]) -> PageId:
    return PageId(key(path), key(path[:-1]), len(path) - 1)


def chain(path: tuple[int, ...]) -> list[bytes]:
    return [key(path[: end + 1]) for end in range(len(path))]


def ready(table: PageTable, path: tuple[int, ...], tier: int = 0, slot: int | None = None) -> int:
    row = table.add(page(path))
    table.begin([row], tier, [row if slot is None else slot])
    table.commit([row], tier)
    return row


PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple)
