"""A process that ends with open caches: what only their warmer tiers hold is lost, and the log says so.

Nothing can be written any more by then, for Python has ended the threads that would. State: the residencies there are, weakly.
"""

from __future__ import annotations

import atexit
import logging
import os
import weakref
from typing import TYPE_CHECKING

import numpy as np

from kvtier.forked import LeftBehind
from kvtier.pages import READY
from kvtier.tiers.disk import DiskTier

if TYPE_CHECKING:
    from kvtier.residency.residency import Residency

log = logging.getLogger(__name__)

_made: weakref.WeakSet[Residency] = weakref.WeakSet()
_PATIENCE_S = 1.0
"""The lock may be held by a thread that does not go on."""


def watch(residency: Residency) -> None:
    """Tell about it if the process ends before it is closed."""
    _made.add(residency)


os.register_at_fork(after_in_child=_made.clear)  # what is lost is the parent's


@atexit.register
def _tell() -> None:
    for residency in _made:
        disk, lock = residency.tiers[residency.last], residency.lock
        if not isinstance(disk, DiskTier) or residency.closed or isinstance(lock, LeftBehind) or not lock.acquire(timeout=_PATIENCE_S):
            continue
        table, last = residency.table, residency.last
        warmer = np.concatenate([table.ready(tier) for tier in range(last)])
        lost = len(np.unique(warmer[table.state[last][warmer] != READY]))
        lock.release()
        if lost:
            told = "the process ends with an open cache: %d pages that are not in its store %s yet are lost; close() it, or use `with`"
            log.warning(told, lost, disk.report()["path"])
