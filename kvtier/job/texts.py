"""Real text for the sessions: the language reference and library sources that every CPython ships. Nothing is downloaded."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from kvtier.errors import KVTierError

_SOURCES = ("argparse", "tarfile", "asyncio.base_events", "zipfile", "logging", "typing", "inspect", "pathlib", "datetime", "subprocess")


def passages(tokenizer: Any, sessions: int, tokens: int) -> list[list[int]]:
    """`sessions` different texts of exactly `tokens` token ids each: prose for even ones, Python sources for odd ones.

    KVTierError if this Python does not ship that much text.
    """
    prose = _prose(tokenizer, (sessions + 1) // 2 * tokens)
    code = _code(tokenizer, sessions // 2 * tokens)
    if len(prose) < (sessions + 1) // 2 * tokens or len(code) < sessions // 2 * tokens:
        raise KVTierError(
            f"this Python ships too little text for {sessions} sessions of {tokens} tokens; ask for fewer or shorter sessions"
        )
    texts = []
    for session in range(sessions):
        stream, start = (code if session % 2 else prose), session // 2 * tokens
        texts.append(stream[start : start + tokens])
    return texts


def _prose(tokenizer: Any, tokens: int) -> list[int]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    longest = sorted(topics, key=lambda name: (-len(topics[name]), name))
    return _collect(tokenizer, (topics[name] for name in longest), tokens)


def _code(tokenizer: Any, tokens: int) -> list[int]:
    return _collect(tokenizer, (inspect.getsource(importlib.import_module(name)) for name in _SOURCES), tokens)


def _collect(tokenizer: Any, texts: Any, tokens: int) -> list[int]:
    ids: list[int] = []
    for text in texts:
        if len(ids) >= tokens:
            break
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
