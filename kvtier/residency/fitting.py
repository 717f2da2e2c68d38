"""How many waiting requests the device tier could hold at once: a question of an engine's scheduler, answered from the page table alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvtier.keys import PageKey
from kvtier.pages import ABSENT, DEVICE, NO_ROW
from kvtier.residency.residency import Residency


def fitting(residency: Residency, requests: Iterable[tuple[Sequence[PageKey], int]]) -> int:
    """How many of `requests`, taken in order, fit: each the keys of its full pages, and the pages that have no key yet.

    What is neither leased nor pinned to the device can be evicted; pages that requests share, or that stay anyway, count once. Takes the
    lock.
    """
    with residency.lock:
        table = residency.table
        used = slice(0, table.rows)
        pinned = (table.pin_tier[used] == DEVICE) & (table.pin_until[used] > residency.clock())
        stays = ((table.leases[used] > 0) | pinned) & (table.state[DEVICE, used] != ABSENT)
        room = residency.device.capacity_slots - int(stays.sum())
        counted: set[PageKey] = set()
        count = 0
        for keys, more in requests:
            new = set(keys) - counted
            held = sum(1 for key in new if (row := table.row(key)) != NO_ROW and stays[row])
            room -= len(new) - held + more
            if room < 0:
                break
            counted |= new
            count += 1
        return count
