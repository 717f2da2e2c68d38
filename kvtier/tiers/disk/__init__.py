"""The disk tier: one directory, self-describing records in sparse segment files, reopened after a restart.

`record` (bytes of one copy), `slots` (who has which slot), `directory` (lock and description), `store` (the tier that joins them).
"""

from __future__ import annotations

from kvtier.tiers.disk.store import DiskTier

__all__ = ["DiskTier"]
