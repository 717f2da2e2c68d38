"""Block stores of small opaque blocks: each named by its number, and with bytes that follow from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kvtier.blocks import BlockStore, Chain
from kvtier.engines.settings import store_config
from kvtier.tiers.disk.record import record_bytes
from kvtier.tiers.lent import BlockLayout

SIZE = 6000
OPAQUE = BlockLayout.opaque(SIZE)
FACTS = {"model": "m", "rank": 0}
RECORD = record_bytes(SIZE)


def block(number: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 255, size, np.uint8)


def key(number: int) -> bytes:
    return f"key {number}".encode()


def keys(*numbers: int) -> list[bytes]:
    return [key(number) for number in numbers]


def open_store(path: Path, records: int = 16, blocks: BlockLayout = OPAQUE, facts: dict[str, object] = FACTS, **more: object) -> BlockStore:
    given = {"disk.path": str(path), "disk.capacity_bytes": records * RECORD, "disk.format": "raw", "mover.staging_bytes": "1MiB"}
    return BlockStore(store_config(given | {name.replace("__", "."): value for name, value in more.items()}), blocks, facts)


def put(store: BlockStore, *numbers: int, chain: Chain | None = None) -> list[bool]:
    return store.put(keys(*numbers), [block(number) for number in numbers], chain)


def get(store: BlockStore, *numbers: int) -> list[bool]:
    """Which came; those that did have to be right."""
    memory = [np.zeros(SIZE, np.uint8) for _ in numbers]
    came = store.get(keys(*numbers), memory)
    for number, found, here in zip(numbers, memory, came, strict=True):
        if here:
            np.testing.assert_array_equal(found, block(number))
    return came


def damage(path: Path, number: int) -> None:
    """Flip a bit in the record of a block, as it is on disk."""
    segment = next(path.glob("segment-*.kvt"))
    at = segment.read_bytes().index(block(number).tobytes()) + 100
    with segment.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
