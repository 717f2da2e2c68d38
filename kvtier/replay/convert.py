"""Other people's traces as Mooncake JSONL. What a format cannot say is made up or left out, and `notes` say so.

- `mooncake`: lines with `timestamp` (ms), `input_length`, `hash_ids`; `output_length` may be missing. For blocks of another size (as NVIDIA
  Dynamo's tools write them), ids that only stand for a block and not for its prefix, times that do not start at 0 or are out of order.
- `bailian`: the Qwen-Bailian usage traces (github.com/alibaba-edu/qwen-bailian-usagetraces-anon; "KVCache Cache in the Wild", ATC'25).
  Lines with `timestamp` in seconds, `input_length`, `output_length`, `hash_ids` of 16 tokens each; type, turn and parent are not needed.
- `azure`: the Azure LLM inference traces of 2023 and 2024 (github.com/Azure/AzurePublicDataset): CSV with TIMESTAMP, ContextTokens,
  GeneratedTokens. They do not say what prompts share.
- `sharegpt`: conversations as ShareGPT has them (`conversations` of `{"from": "human", "value": ...}`) or as vLLM's multi-turn benchmark
  does (`messages` of `{"role": "user", "content": ...}`); a JSON list, or one a line. They have neither tokens nor times.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

from kvtier.errors import KVTierError, TraceError
from kvtier.replay.blocks import BlockIds
from kvtier.replay.lines import number_at_least_0, read_lines, read_text_lines, whole
from kvtier.replay.trace import BLOCK_TOKENS, EXAMPLE, Request, block_ids
from kvtier.replay.workloads import lognormal

BAILIAN_BLOCK_TOKENS = 16
BYTES_PER_TOKEN = 4
"""Of English text, in UTF-8: the usual rule of thumb."""
ASKS = frozenset({"human", "user"})
ANSWERS = frozenset({"gpt", "assistant", "chatgpt", "bing", "bard"})
"""Who speaks, in the files that go by the name of ShareGPT."""


@dataclass(frozen=True)
class Wish:
    """What the result should be like, and what to make up.

    `from_block_tokens`: tokens of a block in the source, where it does not say. `rate`, `seed`: requests a second, for sources without
    times.
    """

    block_tokens: int = BLOCK_TOKENS
    from_block_tokens: int = BLOCK_TOKENS
    rate: float = 3.4
    seed: int = 0


@dataclass(frozen=True)
class Converted:
    """Requests in order of time, from 0 on, and what the reader should know about them."""

    requests: list[Request]
    notes: list[str]


def convert(path: Path, source: str | None, wish: Wish) -> Converted:
    """The trace in `path`, which is in the format `source`, or in the one its beginning looks like.

    TraceError naming the line for what is not in that format, KVTierError for an unknown one or numbers that make no sense.
    """
    guessed = []
    if source is None:
        source = guess_format(path)
        guessed = [f"taken for {source}; say --from FORMAT if it is something else"]
    if source not in FORMATS:
        raise KVTierError(f"unknown trace format {source!r}; known: {', '.join(FORMATS)}")
    for what, value in (("tokens of a block", wish.block_tokens), ("tokens of a block", wish.from_block_tokens), ("rate", wish.rate)):
        if not 0 < value < math.inf:
            raise KVTierError(f"{what}: {value:g}; expected a number above 0")
    requests = sorted(FORMATS[source].read(path, wish), key=lambda request: request.timestamp)
    if not requests:
        raise TraceError(f"{path} has no requests in the format {source}")
    begin = requests[0].timestamp
    notes = [note.format(rate=wish.rate, seed=wish.seed) for note in FORMATS[source].notes]
    return Converted([replace(request, timestamp=round(request.timestamp - begin, 3)) for request in requests], guessed + notes)


def guess_format(path: Path) -> str:
    """The name of the format that the first line is in. TraceError, naming all there are, if it is in none."""
    line = next((line.strip() for _, line in read_text_lines(path) if line.strip()), "")
    if line.startswith("TIMESTAMP,"):
        return "azure"
    if line.startswith("["):
        return "sharegpt"
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        fields = None
    if isinstance(fields, dict):
        if {"conversations", "messages"} & set(fields):
            return "sharegpt"
        if "hash_ids" in fields:
            # Both have the same fields; only Bailian's also say which turn of which chat a request is.
            return "bailian" if {"chat_id", "parent_chat_id", "turn"} & set(fields) else "mooncake"
    raise TraceError(f"{path} looks like none of the formats {', '.join(FORMATS)} (it begins {line[:60]!r}); say which it is with --from")


def _mooncake(path: Path, wish: Wish) -> Iterator[Request]:
    return _hashed(path, wish, wish.from_block_tokens, ms_per_unit=1)


def _bailian(path: Path, wish: Wish) -> Iterator[Request]:
    return _hashed(path, wish, BAILIAN_BLOCK_TOKENS, ms_per_unit=1000)


def _hashed(path: Path, wish: Wish, from_tokens: int, ms_per_unit: int) -> Iterator[Request]:
    """Lines with `hash_ids` of small blocks, as larger blocks: each stands for the small ones in it and all before it."""
    if wish.block_tokens % from_tokens:
        raise KVTierError(f"blocks of {from_tokens} tokens do not make blocks of {wish.block_tokens}; expected a multiple")
    merged = wish.block_tokens // from_tokens
    blocks = BlockIds(wish.block_tokens)
    for number, fields in read_lines(path, EXAMPLE):
        where = f"{path}: line {number}"
        length = whole(fields, "input_length", 1, where)
        ids: list[object] = list(block_ids(fields, where))
        if len(ids) == length // from_tokens < -(-length // from_tokens):
            ids.append(f"the rest of line {number}")  # a partial block without an id: nobody else has it
        if len(ids) != -(-length // from_tokens):
            expected = f"{-(-length // from_tokens)}, one for each {from_tokens} tokens"
            raise TraceError(f"{where}: {len(ids)} hash_ids for {length} tokens; expected {expected} (--from-block-tokens)")
        chain = blocks.chain([tuple(ids[start : start + merged]) for start in range(0, len(ids), merged)])
        at_ms = number_at_least_0(fields, "timestamp", where) * ms_per_unit
        yield Request(round(at_ms, 3), length, whole(fields, "output_length", 0, where, default=0), chain)


def _azure(path: Path, wish: Wish) -> Iterator[Request]:
    blocks = BlockIds(wish.block_tokens)
    rows = csv.reader(line for _, line in read_text_lines(path))
    try:
        header = next(rows, [])
        if header != ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]:
            raise TraceError(f"{path}: line 1 is {','.join(header)[:60]!r}; expected TIMESTAMP,ContextTokens,GeneratedTokens")
        for row in rows:
            where = f"{path}: line {rows.line_num}"
            try:
                stamp, context, generated = row
                at = datetime.fromisoformat(stamp)
                lengths = {"ContextTokens": int(context), "GeneratedTokens": int(generated)}
            except ValueError:
                expected = "2023-11-16 18:17:03.9799600,4808,10"
                raise TraceError(f"{where} is {','.join(row)[:60]!r}; expected a line like {expected}") from None
            at = at if at.tzinfo else at.replace(tzinfo=UTC)
            length = whole(lengths, "ContextTokens", 1, where)
            ids = blocks.chain([(rows.line_num, place) for place in range(-(-length // wish.block_tokens))])
            yield Request(round(at.timestamp() * 1000, 3), length, whole(lengths, "GeneratedTokens", 0, where), ids)
    except csv.Error as error:
        raise TraceError(f"{path}: line {rows.line_num} is no CSV: {error}") from None


def _sharegpt(path: Path, wish: Wish) -> Iterator[Request]:
    chance = Random(wish.seed)
    blocks = BlockIds(wish.block_tokens)
    conversations = [turns for turns in (_turns(where, entry) for where, entry in _entries(path)) if turns]
    per_conversation = sum(map(len, conversations)) / max(1, len(conversations))
    begin_s = 0.0
    for turns in conversations:
        begin_s += chance.expovariate(wish.rate / per_conversation)
        at_s = begin_s
        for prompt, answer in turns:
            size = wish.block_tokens * BYTES_PER_TOKEN
            chain = blocks.chain([prompt[start : start + size] for start in range(0, len(prompt), size)])
            yield Request(round(at_s * 1000), _tokens(prompt), _tokens(answer), chain)
            at_s += lognormal(chance, 123, 0.96)


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Conversations, each with where it is: of a JSON list, or of lines."""
    lines = list(read_text_lines(path))
    if not any(line.lstrip().startswith("[") for _, line in lines[:1]):
        for number, fields in read_lines(path, '{"conversations": [...]}'):
            yield f"{path}: line {number}", fields
        return
    try:
        entries = json.loads("".join(line for _, line in lines))
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{path} is no JSON list of conversations: {error}") from None
    for number, entry in enumerate(entries, 1):
        yield f"{path}: conversation {number}", entry


def _turns(where: str, entry: Any) -> list[tuple[bytes, bytes]]:
    """Prompt and answer of every turn that somebody asked in."""
    expected = (
        'expected {"conversations": [{"from": "human", "value": "..."}, ...]} or {"messages": [{"role": "user", "content": "..."}, ...]}'
    )
    if not isinstance(entry, dict):
        raise TraceError(f"{where} is no object; {expected}")
    said = entry.get("conversations", entry.get("messages"))
    if not isinstance(said, list):
        raise TraceError(f"{where} has neither conversations nor messages; {expected}")
    prompt, asked = b"", False
    turns: list[tuple[bytes, bytes]] = []
    for message in said:
        fields = message if isinstance(message, dict) else {}
        speaker, text = fields.get("from", fields.get("role")), fields.get("value", fields.get("content"))
        if not isinstance(speaker, str) or not isinstance(text, str):
            raise TraceError(f"{where}: a message is {str(message)[:60]!r}; {expected}")
        # The name of the speaker stands for what a chat template writes, and keeps "" from being no tokens at all.
        spoken = f"{speaker}: {text}\n".encode(errors="replace")
        if speaker in ANSWERS and asked:
            turns.append((prompt, text.encode(errors="replace")))
        asked = speaker in ASKS or (asked and speaker not in ANSWERS)
        prompt += spoken
    if asked:
        turns.append((prompt, b""))
    return turns


def _tokens(text: bytes) -> int:
    return -(-len(text) // BYTES_PER_TOKEN)


@dataclass(frozen=True)
class Format:
    """How requests are read, and what is to be said about them."""

    read: Callable[[Path, Wish], Iterable[Request]]
    notes: tuple[str, ...] = ()


FORMATS: Mapping[str, Format] = {
    "mooncake": Format(_mooncake),
    "bailian": Format(_bailian),
    "azure": Format(_azure, ("there are no hashes: lengths and times are real, but no prompt shares anything, so every hit ratio is 0",)),
    "sharegpt": Format(
        _sharegpt,
        (
            f"tokens are guessed: {BYTES_PER_TOKEN} bytes of text each",
            "times are made up: {rate:g} requests a second, turns of one conversation about two minutes apart (seed {seed})",
        ),
    ),
}
