"""Made-up pages for tests of tiers: what they are called, what they hold, and putting them into a tier and getting them back.

Everything follows from a page's number, so that nothing has to be remembered to know whether the right bytes came.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from kvtier.formats.base import Payload
from kvtier.keys import PageKey
from kvtier.layout import PageLayout
from kvtier.tiers.base import PageId, Refused, Tier

LAYOUT = PageLayout(layers=2, planes=2, page_tokens=8, kv_heads=2, head_dim=32, dtype="bf16")
"""A small page: 4096 bytes raw."""


def page_id(number: int) -> PageId:
    """The id of page `number` of one long made-up sequence."""
    return PageId(_hash32(number), _hash32(number - 1), number)


def payload(tier: Tier, number: int) -> Payload:
    """Bytes for page `number` that nothing compresses, always the same, of a size that `tier` takes."""
    most = tier.format.payload_bytes(tier.layout)
    random = np.random.default_rng(number)
    size = most if tier.format.fixed_size or number % 2 else int(random.integers(1, most + 1))
    return random.integers(0, 256, size, dtype=np.uint8)


def staging(tier: Tier, count: int) -> NDArray[np.uint8]:
    """Scratch memory for a `load` of `count` slots."""
    return np.zeros((max(1, count), tier.slot_bytes), dtype=np.uint8)


def put(tier: Tier, numbers: Sequence[int]) -> list[int]:
    """Reserve and store pages `numbers`; their slots."""
    slots = tier.reserve(len(numbers))
    assert slots is not None, f"{tier.name}: no room for {len(numbers)} copies"
    results = tier.store(slots, [page_id(n) for n in numbers], [payload(tier, n) for n in numbers])
    assert results == [None] * len(numbers), f"{tier.name}: store refused: {results}"
    return slots


def get(tier: Tier, slot: int, key: PageKey) -> Payload | Refused:
    """Load one copy."""
    return tier.load([slot], [key], staging(tier, 1))[0]


def holds(tier: Tier, slot: int, number: int) -> bool:
    """Whether `slot` gives exactly the bytes of page `number`."""
    found = get(tier, slot, page_id(number).key)
    return not isinstance(found, Refused) and np.array_equal(found, payload(tier, number))


def _hash32(number: int) -> bytes:
    return blake2b(number.to_bytes(8, "little", signed=True), digest_size=32).digest()
