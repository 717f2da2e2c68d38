"""The keys of a request's pages: kvtier's own chained hashes over tokens, and over what else the KV depends on.

vLLM's block hashes may depend on a random seed of the process (`xxhash` without PYTHONHASHSEED), and say nothing of model or layout, so
they do not name pages that outlive it. What makes equal tokens unequal is
the tenant's salt and the LoRA adapter (from the first page on) and images and the like (from the page they are in on). State: one list of
keys per request, the scheduler's.
"""

from __future__ import annotations

import json
from typing import Any

from kvtier.keys import PageKey, page_keys, root_key


def salt_of(request: Any, adapter_revision: str = "") -> str:
    """What separates the whole request from others with the same tokens: its `cache_salt` and its LoRA adapter, as one text."""
    lora = request.lora_request
    if not request.cache_salt and lora is None:
        return ""
    return json.dumps([request.cache_salt or "", [lora.lora_name, lora.lora_path, adapter_revision] if lora is not None else None])


def media_in(features: Any, start: int, end: int, apart: str = "") -> str:
    """What images and other media the tokens from `start` to `end` show, and where; empty if none.

    `apart`: what separates them from others of the same names.
    """
    within = [
        [feature.identifier, feature.mm_position.offset - start]
        for feature in features
        if feature.mm_position.offset < end and feature.mm_position.offset + feature.mm_position.length > start
    ]
    return json.dumps([apart, within] if apart else within) if within else ""


class RequestKeys:
    """Keys of one request's full pages, hashed as they are asked for."""

    def __init__(self, request: Any, namespace: bytes, page_tokens: int, adapter_revision: str = "", media: str = "") -> None:
        self._request = request
        self._media = media
        self._page_tokens = page_tokens
        self.root = root_key(namespace, salt_of(request, adapter_revision))
        self._keys: list[PageKey] = []

    def first(self, pages: int) -> list[PageKey]:
        """Keys of the first `pages` pages, all of which must have their tokens by now."""
        known, size = len(self._keys), self._page_tokens
        if known < pages:
            tokens = self._request.all_token_ids[known * size : pages * size]
            if not self._request.mm_features:
                self._keys += page_keys(tokens, size, self.before(known))
            else:
                for page in range(known, pages):
                    media = media_in(self._request.mm_features, page * size, (page + 1) * size, self._media)
                    parent = root_key(self.before(page), media) if media else self.before(page)
                    self._keys += page_keys(tokens[(page - known) * size : (page - known + 1) * size], size, parent)
        return self._keys[:pages]

    def before(self, page: int) -> PageKey:
        """The key of the page before page `page`, or the root."""
        return self._keys[page - 1] if page else self.root
