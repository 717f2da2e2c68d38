"""Attention in parts: each part sees some of the keys and says how much they weigh, so that parts computed apart merge to the exact whole.

For logits x_j = scaling * q.k_j, a part has out = sum_j exp(x_j - lse) v_j and lse = log sum_j exp(x_j). Parts merge by their lse (as
FlashAttention does between blocks, Dao et al. 2022): each weighs exp(lse - lse of all). fp32 throughout. Stateless.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvtier.errors import LayoutError


@dataclass(frozen=True)
class Partial:
    """`out` `[tokens, heads, head_dim]` and `lse` `[tokens, heads]`, fp32. A part that saw no key has zeros and -inf."""

    out: torch.Tensor
    lse: torch.Tensor


def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None = None) -> Partial:
    """Every query over every key: `queries` `[tokens, heads, head_dim]`, `keys` and `values` `[keys, kv_heads, head_dim]`, any float dtype.

    No mask: all keys stand before all queries. `scaling`: 1 / sqrt(head_dim) unless given. LayoutError for shapes that do not fit.
    """
    if queries.ndim != 3 or keys.ndim != 3 or keys.shape != values.shape or queries.shape[2] != keys.shape[2]:
        raise LayoutError(f"attend: queries {list(queries.shape)}, keys {list(keys.shape)}, values {list(values.shape)} do not fit")
    tokens, heads, head_dim = queries.shape
    count, kv_heads, _ = keys.shape
    if not kv_heads or heads % kv_heads:
        raise LayoutError(f"attend: {heads} heads for {kv_heads} KV heads; expected a multiple")
    if not count:
        return nothing(queries)
    scale = 1 / math.sqrt(head_dim) if scaling is None else scaling
    group = heads // kv_heads
    asked = queries.float().view(tokens, kv_heads, group, head_dim).permute(1, 0, 2, 3).reshape(kv_heads, tokens * group, head_dim)
    logits = (asked * scale) @ keys.float().permute(1, 2, 0)
    lse = logits.logsumexp(2)
    out = torch.exp(logits - lse[:, :, None]) @ values.float().permute(1, 0, 2)
    return Partial(
        out.view(kv_heads, tokens, group, head_dim).permute(1, 0, 2, 3).reshape(tokens, heads, head_dim),
        lse.view(kv_heads, tokens, group).permute(1, 0, 2).reshape(tokens, heads),
    )


def nothing(queries: torch.Tensor) -> Partial:
    """The part that saw no key."""
    tokens, heads, head_dim = queries.shape
    out = torch.zeros(tokens, heads, head_dim, device=queries.device)
    return Partial(out, torch.full((tokens, heads), -math.inf, device=queries.device))


def merge(parts: Sequence[Partial]) -> Partial:
    """The attention over the keys of all parts together, on the device of the first; LayoutError if there is none."""
    if not parts:
        raise LayoutError("merge: no parts; give at least one")
    if len(parts) == 1:
        return parts[0]
    place = parts[0].out.device
    lse = torch.stack([part.lse.to(place) for part in parts])
    total = lse.logsumexp(0)
    weights = torch.exp(lse - total).nan_to_num(0.0)  # -inf less -inf: nobody saw a key
    out = sum(
        (part.out.to(place) * weight[:, :, None] for part, weight in zip(parts, weights, strict=True)), torch.zeros_like(parts[0].out)
    )
    return Partial(out, total)
