"""The engine that goes through the page cache: works on every file system, copies every byte once more, and its reads look fast only
while the system has memory to spare. Taken where O_DIRECT is refused. The state is the pool's, see `pooled`."""

from __future__ import annotations

from kvtier.io.pooled import PooledEngine


class BufferedEngine(PooledEngine):
    """System calls through the page cache, buffers of any alignment."""

    name = "buffered"
