"""The requests in vLLM's scheduler: the keys of their pages, and what is known of each.

A request may say how much of it is stored and loaded, under the names that vLLM's own offloading gave this (`kv_transfer_params` with
`max_offload_tokens`, `max_load_tokens`). State: vLLM's scheduler thread.
"""

from __future__ import annotations

import sys
import uuid
from dataclasses import dataclass
from typing import Any

from vllm.logger import init_logger

from kvtier.engines.vllm.keys import RequestKeys
from kvtier.engines.vllm.settings import Settings
from kvtier.engines.weights import adapter_revision
from kvtier.keys import root_key

log = init_logger(__name__)


@dataclass
class RequestState:
    """One request."""

    request: Any
    keys: RequestKeys
    most_stored: int
    """Pages from its first one on that may be stored."""
    most_loaded: int
    """Pages that may be loaded beyond those vLLM has itself."""
    asked_from: int = 0
    """Pages vLLM had itself when it last asked what there is to load."""
    declined: int = 0
    """Pages that were there then and are faster to compute."""
    waited_s: float = 0.0
    """For how long it waited for pages since it was last given blocks."""
    told: tuple[int, float] | None = None
    """The step in which vLLM was told to ask again, and when, if that was its last answer."""
    late: bool = False
    """Whether it had waited too long when vLLM last asked."""
    failed: bool = False
    """Whether pages that were loaded for it did not come. vLLM asks again if none did, which must not begin anew what was waited for."""
    priced: tuple[bytes, int] = (b"", 0)
    """Where the pages were when it was last priced, and how many to load."""
    stored: int = 0
    """Pages that need no storing any more."""
    fed: int = 0
    """Pages to store whose blocks were full after the last step planned."""


class Requests:
    """Those whose pages have keys.

    Requests whose prompt is not made of tokens are passed over, and those for an adapter of which nothing is known yet.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._namespace = settings.namespace
        self._states: dict[str, RequestState] = {}
        self._adapters: dict[tuple[int, str], str] = {}

    def begin(self, request: Any) -> None:
        """vLLM has a new request."""
        adapter = self._revision(request.lora_request)
        if request.prompt_embeds is None and adapter is not None:
            page_tokens = self._settings.layout.page_tokens
            keys = RequestKeys(request, self._namespace, page_tokens, adapter, self._settings.media)
            stored, loaded = (most_tokens(request, name) // page_tokens for name in ("max_offload_tokens", "max_load_tokens"))
            self._states[request.request_id] = RequestState(request, keys, stored, loaded)

    def get(self, request_id: str) -> RequestState | None:
        """What is known of a request; None for one that was passed over, or ended."""
        return self._states.get(request_id)

    def end(self, request_id: str) -> RequestState | None:
        """The request ended; what was known of it."""
        return self._states.pop(request_id, None)

    def rename(self) -> None:
        """Keys that no other engine has, from now on, and for requests of which nothing was computed yet.

        What the others computed must not be kept under keys that stand for what is computed from now on: they are forgotten.
        """
        self._namespace = root_key(self._namespace, uuid.uuid4().hex)
        waiting = [state.request for state in self._states.values() if not state.request.num_computed_tokens]
        self._states.clear()
        for request in waiting:
            self.begin(request)

    def _revision(self, adapter: Any) -> str | None:
        """Which weights a LoRA adapter has: read when vLLM reads them, which is once, or anew if they are to be loaded in place.

        None before vLLM has fetched them from Hugging Face.
        """
        if adapter is None:
            return ""
        name = adapter.lora_int_id, adapter.lora_path
        if adapter.load_inplace or name not in self._adapters:
            revision = adapter_revision(adapter.lora_path)
            if revision is None:
                return None
            self._adapters[name] = revision
        return self._adapters[name]


def most_tokens(request: Any, name: str) -> int:
    """What the request says of `name`, a number of tokens, in its `kv_transfer_params`; very many if it says nothing, or null.

    0 for what is no such number, with a warning: vLLM lets no connector refuse a request, and who writes this may not want it kept at all.
    """
    params = request.kv_transfer_params
    said = params.get(name) if isinstance(params, dict) else params
    if said is None:
        return sys.maxsize
    if type(said) is int and said >= 0:
        return said
    log.warning("kvtier: %s of request %s: expected a number of tokens, 0 or more, not %r; taken as 0", name, request.request_id, said)
    return 0
