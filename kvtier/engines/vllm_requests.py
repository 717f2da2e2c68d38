"""Which chunk of a request stands before which: what vLLM's offloading knows of a request and tells no policy or tier in one piece.

vLLM's scheduler notes the place of each of a request's chunks in the request's context as soon as the tokens are known. What is made of
that here is kept in the context's own scratch space and ends with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice

from vllm.v1.kv_offload.base import OffloadKey, ReqContext, get_offload_group_idx


@dataclass
class _Seen:
    """The first `count` of the places noted so far, turned around."""

    count: int = 0
    ends: dict[int, tuple[int, OffloadKey]] = field(default_factory=dict)
    """By KV group, end token and key of the last chunk."""
    before: dict[OffloadKey, OffloadKey | None] = field(default_factory=dict)


def chunks_before(req_context: ReqContext) -> dict[OffloadKey, OffloadKey | None]:
    """For each chunk of the request whose place is known, the one before it in its KV group, None for a first one; first ones first."""
    positions = req_context._offload_key_positions  # vLLM 0.32 has no public way to list them
    seen: _Seen = req_context.get_state(_Seen) or _Seen()
    if seen.count != len(positions):
        req_context.set_state(seen)
        for key, position in islice(positions.items(), seen.count, None):
            group = get_offload_group_idx(key)
            end = seen.ends.get(group)
            seen.before[key] = end[1] if end is not None and end[0] < position else None
            seen.ends[group] = (position, key)
        seen.count = len(positions)
    return seen.before
