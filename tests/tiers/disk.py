"""A disk tier of tiny pages, its file, what a restart finds in it, and ways to damage it; the contract every variant of it keeps."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from kvtier.formats import Format, get_format
from kvtier.formats.digests import digests_of
from kvtier.layout import PageLayout
from kvtier.testing.tiers import LAYOUT, TierContract, get, holds, page_id, payload
from kvtier.tiers.base import Refused
from kvtier.tiers.disk import DiskTier
from kvtier.tiers.disk.record import HEADER_BYTES

RAW, VARIABLE = get_format("raw"), get_format("raw+lz4")
NAMESPACE = bytes(range(32))
SLOT = 8192  # of LAYOUT in RAW: 256 + 4096 bytes, padded
CAPACITY = 16 * SLOT


def open_disk(
    path: Path,
    *,
    layout: PageLayout = LAYOUT,
    format: Format = RAW,
    capacity: int = CAPACITY,
    namespace: bytes = NAMESPACE,
    **options: Any,
) -> DiskTier:
    return DiskTier(path, layout, format, capacity, namespace, **options)


def segment(tier_path: Path) -> Path:
    return tier_path / "segment-00000.kvt"


def flip(path: Path, offset: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


def image_of(path: Path, image: Path) -> Path:
    """What a process that starts now would find: the files as they are, without the lock."""
    return Path(shutil.copytree(path, image, ignore=shutil.ignore_patterns("lock")))


def disk_bytes(path: Path) -> int:
    """Bytes of the segment files that are not holes. (`st_blocks` would count the file system's own extent blocks too.)"""
    total = 0
    for name in path.glob("segment-*.kvt"):
        with name.open("rb") as file:
            end = 0
            while end < name.stat().st_size:
                try:
                    start = os.lseek(file.fileno(), end, os.SEEK_DATA)
                except OSError:  # only a hole is left
                    break
                end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
                total += end - start
    return total


def recovered(tier: DiskTier) -> dict[int, int]:
    """Slot by page number; every id must be whole."""
    found = {}
    for slot, page in tier.recover():
        assert page == page_id(page.depth)
        assert page.depth not in found
        found[page.depth] = slot
    tier.check_integrity()
    return found


class DiskContract(TierContract):
    format = RAW

    def make_tier(self, tmp_path: Path, layout: PageLayout) -> DiskTier:
        return open_disk(tmp_path, layout=layout, format=self.format, **self.make_options())

    def make_options(self) -> dict[str, Any]:
        return {}

    def corrupt(self, tier, slot) -> None:
        flip(segment(tier._directory.path), slot * SLOT + HEADER_BYTES + 5)

    def test_law_1_a_copy_is_judged_by_the_digest_that_came_with_it(self, tmp_path) -> None:
        judged_by_digests(self, tmp_path)


def judged_by_digests(contract: TierContract, tmp_path: Path) -> None:
    """For tiers that take a caller's digests: bytes that were others when they were digested are not given."""
    with contract.opened(tmp_path) as tier:
        slots = tier.reserve(2)
        assert slots is not None
        data = [payload(tier, number) for number in (1, 3)]
        digests = digests_of(data)
        data[1][:] ^= 1
        assert tier.store(slots, [page_id(1), page_id(3)], data, digests) == [None, None]
        assert holds(tier, slots[0], 1)
        assert get(tier, slots[1], page_id(3).key) == Refused("checksum")
