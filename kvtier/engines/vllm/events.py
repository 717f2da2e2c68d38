"""KV events in vLLM's format: which of its blocks kvtier's host and disk tiers hold, for routers that follow them.

Blocks are named by vLLM's own hashes, as in the events of its GPU cache; those are known once a request with these tokens was seen, so what
an earlier run left on disk is announced when it is first asked for. One event per page and tier, after the copy is complete on all workers.
State: vLLM's scheduler thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.distributed.kv_events import MEDIUM_CPU, MEDIUM_STORAGE, AllBlocksCleared, BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys, maybe_convert_block_hash, to_event_extra_keys

from kvtier.engines.vllm.mirror import Mirror
from kvtier.keys import PageKey

MEDIA = {"host": MEDIUM_CPU, "disk": MEDIUM_STORAGE}
"""vLLM's word for a tier. What is only in the staging area is not announced: it does not stay there."""


class Announcer:
    """Turns changes of the mirror into events."""

    def __init__(self, mirror: Mirror, page_tokens: int) -> None:
        self._mirror = mirror
        self._page_tokens = page_tokens
        self._tiers: Sequence[str] = ()
        self._stored: dict[PageKey, dict[str, Any]] = {}
        """What a BlockStored event says of a page, but for the medium."""
        self._events: list[Any] = []

    def greet(self, tiers: Sequence[str]) -> None:
        """The names of the tiers."""
        self._tiers = tiers

    def describe(self, request: Any, keys: Sequence[PageKey], pages: Sequence[int]) -> None:
        """These pages of a request are held, or are about to be; `keys` are those of all its pages."""
        size = self._page_tokens
        for page in pages:
            if keys[page] in self._stored:
                continue
            extra, _ = generate_block_hash_extra_keys(request, page * size, (page + 1) * size, 0)
            lora = request.lora_request
            self._stored[keys[page]] = {
                "block_hashes": [maybe_convert_block_hash(request.block_hashes[page])],
                "parent_block_hash": maybe_convert_block_hash(request.block_hashes[page - 1]) if page else None,
                "token_ids": list(request.all_token_ids[page * size : (page + 1) * size]),
                "block_size": size,
                "lora_id": lora.adapter_id if lora else None,
                "lora_name": lora.name if lora else None,
                "extra_keys": to_event_extra_keys([extra]),
                "group_idx": 0,
                "kv_cache_spec_kind": "full_attention",
                "session_id": request.session_id,
            }
            if now := self._mirror.tiers(keys[page]):
                self.moved(keys[page], 0, now)

    def moved(self, key: PageKey, before: int, now: int) -> None:
        """A page is in the tiers `now` (bits) and was in those `before`."""
        about = self._stored.get(key)
        if about is None:
            return
        for tier, name in enumerate(self._tiers):
            medium, bit = MEDIA.get(name), 1 << tier
            if medium is not None and now & bit and not before & bit:
                self._events.append(BlockStored(medium=medium, **about))
            elif medium is not None and before & bit and not now & bit:
                self._events.append(BlockRemoved(block_hashes=about["block_hashes"], medium=medium, group_idx=0))
        if not now:
            del self._stored[key]

    def forget(self, keys: Sequence[PageKey]) -> None:
        """Pages that were about to be stored and are nowhere."""
        for key in keys:
            if not self._mirror.holds(key):
                self._stored.pop(key, None)

    def cleared(self) -> None:
        """Everything is gone."""
        self._stored.clear()
        self._events.append(AllBlocksCleared())

    def taken(self) -> list[Any]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events
