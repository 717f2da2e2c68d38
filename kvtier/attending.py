"""Where a lease's attention goes, from queries and what is known of its pages' keys. Stateless; reads under the residency's lock."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from kvtier.attention.digest import key_logits
from kvtier.attention.on_device import page_logits
from kvtier.attention.select import page_mass
from kvtier.digesting import pool_digests
from kvtier.errors import IntegrityError
from kvtier.lease import Lease
from kvtier.pages import READY
from kvtier.residency import DEVICE, Residency


def lease_mass(residency: Residency, lease: Lease, layer: int, queries: torch.Tensor) -> NDArray[np.float64]:
    """The share of attention that `queries` `[tokens, heads, head_dim]` pay to each page of the lease, mean over tokens and heads.

    Pages on the device without a digest get one now; the partly filled page counts with its keys; what is neither on the device nor
    digested is NaN. The lease must be ready and held.
    """
    store, table, pool = residency.digests, residency.table, residency.device
    if store is None:
        raise IntegrityError("attention is asked for, but this cache keeps no digests")
    queries = queries.to(pool.place)
    rows, fill = lease.rows[: lease.pages], lease.tokens % residency.layout.page_tokens
    full = len(rows) - (fill > 0)
    with residency.lock:
        keys = table.key[rows[:full]].tolist()
        found, digests = store.get(rows[:full], keys, slice(layer, layer + 1))
        here = table.state[DEVICE][rows] == READY
        slots = table.slot[DEVICE][rows].tolist()
    logits = torch.full((*queries.shape[:2], len(rows)), -torch.inf, device=pool.place)
    if found:
        logits[:, :, found] = page_logits(digests[:, 0], queries, store.shape)
    fresh = [page for page in sorted(set(range(full)) - set(found)) if here[page]]
    if fresh:
        made = pool_digests(pool, [slots[page] for page in fresh])
        with residency.lock:
            store.put([rows[page] for page in fresh], [keys[page] for page in fresh], made)
        logits[:, :, fresh] = page_logits(made[:, layer], queries, store.shape)
    if fill and here[-1]:
        logits[:, :, -1:] = key_logits(pool.keys(slots[-1:], slice(layer, layer + 1))[0, 0, :fill], queries)
    mass: NDArray[np.float64] = page_mass(logits).mean(0).clamp_max(1.0).double().cpu().numpy()
    mass[(~logits.isfinite()).all(0).all(0).cpu().numpy()] = np.nan
    return mass
