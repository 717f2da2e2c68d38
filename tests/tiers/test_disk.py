"""The disk tier keeps the contract of a tier, whatever its format, file system and durability."""

from __future__ import annotations

from typing import Any

from kvtier.tiers.disk.record import HEADER_BYTES
from tests.tiers.disk import SLOT, VARIABLE, DiskContract, flip, segment
from tests.tiers.faults import NoHolesEngine


class TestDisk(DiskContract):
    pass


class TestDiskVariableSize(DiskContract):
    format = VARIABLE

    def corrupt(self, tier, slot) -> None:
        flip(segment(tier._directory.path), slot * SLOT + HEADER_BYTES)


class TestDiskVariableSizeWithoutHoles(TestDiskVariableSize):
    def make_options(self) -> dict[str, Any]:
        return {"engine": NoHolesEngine()}


class TestDiskWithPowerDurability(DiskContract):
    def make_options(self) -> dict[str, Any]:
        return {"durability": "power"}
