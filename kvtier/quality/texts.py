"""Real text to play: reference and library sources that every CPython ships, or the user's own files. Nothing is downloaded."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvtier.errors import ConfigError, KVTierError

_SOURCES = ("argparse", "tarfile", "asyncio.base_events", "zipfile", "logging", "typing", "inspect", "pathlib", "datetime", "subprocess")


def passages(tokenizer: Any, documents: int, tokens: int) -> list[list[int]]:
    """`documents` different texts of exactly `tokens` token ids each: prose for even ones, Python sources for odd ones.

    KVTierError if this Python does not ship that much text.
    """
    prose = _prose(tokenizer, (documents + 1) // 2 * tokens)
    code = _code(tokenizer, documents // 2 * tokens)
    if len(prose) < (documents + 1) // 2 * tokens or len(code) < documents // 2 * tokens:
        raise KVTierError(f"this Python ships too little text for {documents} documents of {tokens} tokens; ask for fewer or shorter ones")
    texts = []
    for document in range(documents):
        stream, start = (code if document % 2 else prose), document // 2 * tokens
        texts.append(stream[start : start + tokens])
    return texts


def read_texts(paths: Sequence[Path]) -> list[str]:
    """The texts of UTF-8 files. ConfigError for a file that cannot be read as one."""
    texts = []
    for path in paths:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}; name readable text files") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{path} is not UTF-8 text; convert it or name other files") from None
    return texts


def beginnings(tokenizer: Any, texts: Sequence[str], names: Sequence[object], tokens: int) -> list[list[int]]:
    """The first `tokens` token ids of each text. ConfigError, with the text's name, for one that is shorter."""
    documents = []
    for text, name in zip(texts, names, strict=True):
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
        if len(ids) < tokens:
            raise ConfigError(f"{name} has {len(ids)} tokens; expected at least {tokens}; give a longer text or fewer --tokens")
        documents.append(ids)
    return documents


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
