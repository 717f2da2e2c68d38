"""Where a lease's attention goes: told by the engine per page, or estimated from its queries and what is known of the pages' keys.

Stateless; what the policies are told is written under the residency's lock.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kvtier.attention.digest import key_logits
from kvtier.attention.on_device import page_logits
from kvtier.attention.select import page_mass
from kvtier.errors import ConfigError, IntegrityError, LayoutError, LeaseError
from kvtier.leases.digesting import pool_digests
from kvtier.leases.lease import Lease
from kvtier.pages import DEVICE, READY
from kvtier.residency import Residency


def record_attention(residency: Residency, lease: Lease, mass: Sequence[float] | np.ndarray[tuple[int], np.dtype[np.float64]]) -> None:
    """See `TieredKVCache.record_attention`."""
    values = np.asarray(mass, np.float64)
    if values.shape != (lease.pages,):
        raise LeaseError(f"record_attention: got shape {values.shape}; expected one value for each of the {lease.pages} pages")
    with residency.lock:
        usable = (values >= 0) & (values <= 1) & (not lease.released)
        residency.metrics.attention_ignored += int((~usable).sum())
        for row, value, good in zip(lease.rows, values.tolist(), usable.tolist(), strict=False):
            if not good:
                continue
            residency.table.attention[row] = value
            for policy in residency.policies:
                if row in policy:
                    policy.record_attention(row, value)


def record_queries(residency: Residency, lease: Lease, layer: int, queries: torch.Tensor) -> None:
    """See `TieredKVCache.record_queries`."""
    layout = residency.layout
    if residency.digests is None:
        raise ConfigError("record_queries needs page digests, and this cache keeps none; set attention.digest_bytes")
    if not 0 <= layer < layout.layers:
        raise LeaseError(f"record_queries: layer {layer}; this model has layers 0 to {layout.layers - 1}")
    asked = queries.detach()
    asked = asked[None] if asked.ndim == 2 else asked
    if asked.ndim != 3 or not len(asked) or not asked.shape[1] or asked.shape[1] % layout.kv_heads or asked.shape[2] != layout.head_dim:
        raise LayoutError(
            f"record_queries: queries have shape {list(queries.shape)}; expected [heads, head_dim] or [tokens, heads, head_dim] with a "
            f"multiple of {layout.kv_heads} heads of {layout.head_dim}"
        )
    if not lease.pages:
        return
    if lease.released or not asked.isfinite().all():
        with residency.lock:
            residency.metrics.attention_ignored += lease.pages
        return
    mass = lease_mass(residency, lease, layer, asked)
    before, calls = lease.attention, min(lease.attention_calls, layout.layers - 1)
    if before is not None:
        known = min(len(before), len(mass))
        mass[:known] = np.where(np.isnan(before[:known]), mass[:known], (calls * before[:known] + mass[:known]) / (calls + 1))
    lease.attention, lease.attention_calls = mass, calls + 1
    record_attention(residency, lease, mass)


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
