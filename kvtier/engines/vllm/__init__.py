"""kvtier inside vLLM: `KvtierConnector`, loaded by vLLM from this module (docs/vllm.md). Needs vLLM, which users install themselves.

`connector.py` is what vLLM calls. In its scheduler: `scheduler.py` (what to load, and the whole), `requests.py`, `keys.py`, `storing.py`,
`steps.py`, `mirror.py` (what the workers hold), `events.py`. In its workers: `worker.py`, `layouts.py` (how vLLM lays KV out). Both:
`settings.py`, `messages.py` (what they tell each other), `resets.py`, `metrics.py`.

The connector is imported when it is asked for: what reads memory layouts and names pages works, and is tested, without vLLM.
"""

from __future__ import annotations

from typing import Any

from kvtier.engines.versions import require_engine


def __getattr__(name: str) -> Any:
    if name != "KvtierConnector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_engine("vllm")  # before anything of vLLM's is imported: other releases have it in other places
    from kvtier.engines.vllm.connector import KvtierConnector

    return KvtierConnector
