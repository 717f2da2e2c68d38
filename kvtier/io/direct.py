"""The default engine: O_DIRECT, so that bytes go between the disk and the caller's memory without a copy and leave the page cache alone.

Linux keeps both views of a file in step: what was written through the page cache is flushed before a direct read, and dropped from it
by a direct write, so stores written by one engine open with the other. The state is the pool's, see `pooled`.
"""

from __future__ import annotations

import os

from kvtier.io.files import BLOCK_BYTES
from kvtier.io.pooled import DEPTH, PooledEngine


class DirectEngine(PooledEngine):
    """System calls past the page cache. `alignment_bytes`: what the file system asks for, 512 or 4096; `probe` finds out."""

    name = "direct"
    flags = os.O_DIRECT

    def __init__(self, depth: int = DEPTH, alignment_bytes: int = BLOCK_BYTES) -> None:
        super().__init__(depth, alignment_bytes)
