"""The disk tier: one directory, self-describing records in sparse segment files, reopened after a restart.

`record` (bytes of one copy), `slots` (who has which slot), `directory` (lock and description), `opening` and `recovery` (how a store comes
back), `reading`, `writer`, `tidying` and `checkpoints` (what happens to it), `calls` (what is under
way), `store` (the tier that joins them).
"""

from __future__ import annotations

from kvtier.tiers.disk.store import DiskTier

__all__ = ["DiskTier"]
