"""What vLLM's scheduler says of a step: which requests it computes, which blocks it writes; and what its prefills took.

State of `PrefillClock`: vLLM's scheduler thread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


def fed(output: Any) -> list[tuple[str, int]]:
    """The requests of this step, and how many of their tokens had KV before it."""
    cached = output.scheduled_cached_reqs
    fresh = [(new.req_id, new.num_computed_tokens) for new in output.scheduled_new_reqs]
    return fresh + list(zip(cached.req_ids, cached.num_computed_tokens, strict=True))


def written(output: Any, page_tokens: int) -> list[Sequence[int]]:
    """Blocks that get other contents in this step, those that are loaded into left out."""
    found: list[Sequence[int]] = [new.block_ids[0][new.num_computed_tokens // page_tokens :] for new in output.scheduled_new_reqs]
    cached = output.scheduled_cached_reqs
    for request_id, computed, blocks in zip(cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True):
        if blocks is not None:
            found.append(blocks[0][computed // page_tokens :] if request_id in cached.resumed_req_ids else blocks[0])
    found.append([copy.dst_block_id for copy in output.kv_cache_block_copies or ()])
    return found


@dataclass
class _Step:
    """A step under way: the one prefill it consists of, if it does."""

    planned_s: float
    prefill: tuple[int, int] | None


class PrefillClock:
    """Times steps that are nothing but a piece of one prompt, a page of tokens at least. Steps may be planned before others end."""

    def __init__(self, page_tokens: int) -> None:
        self._page_tokens = page_tokens
        self._steps: deque[_Step] = deque()
        self._last_end_s = 0.0

    def begin(self, output: Any) -> None:
        """A step was planned."""
        requests = fed(output)
        prefill = None
        if len(requests) == 1:
            name, start = requests[0]
            tokens = output.num_scheduled_tokens[name]
            prefill = (start, tokens) if tokens >= self._page_tokens else None
        self._steps.append(_Step(time.perf_counter(), prefill))

    def end(self) -> tuple[int, int, float] | None:
        """The oldest step ended. If it was a prefill: tokens before it, tokens computed, seconds."""
        if not self._steps:
            return None
        step, now = self._steps.popleft(), time.perf_counter()
        seconds, self._last_end_s = now - max(step.planned_s, self._last_end_s), now
        return None if step.prefill is None else (*step.prefill, seconds)
