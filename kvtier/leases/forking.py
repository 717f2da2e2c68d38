"""Forks onto another cache of the same model: what a lease covers there is written here, as a lease of this cache.

Runs on the caller's thread and holds no lock; how pages are written is in `writing.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from kvtier.errors import LayoutError
from kvtier.keys import PageKey
from kvtier.leases.lease import Lease
from kvtier.leases.writing import Writer


def take_over(lease: Lease, same_model: bool, writer: Writer, begin: Callable[[PageKey], Lease]) -> Lease:
    """A lease of the cache that `writer` and `begin` belong to, on the tokens of `lease`, of another cache; see `TieredKVCache.fork`."""
    lease.check_whole()
    if not same_model:
        raise LayoutError(
            f"fork onto a cache of another model, revision or layout ({writer.layout}); its pages are not those of this lease "
            f"({lease.residency.layout})"
        )
    twin = begin(lease.root)
    try:
        writer.take_over(twin, lease)
    except BaseException:
        twin.release()
        raise
    return twin
