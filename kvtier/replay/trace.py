"""Traces: what requests came when, and which pages of which prefix they name. Read once, kept as columns, never changed.

The format is Mooncake's JSONL (Qin et al., FAST'25), one request a line: `{"timestamp": ms, "input_length": tokens, "output_length":
tokens, "hash_ids": [...]}`. A block is 512 tokens, the last one of a request usually fills only in part; an equal id means an equal
prefix up to and including that block, which is what a page key is in the live cache. Blocks become pages 0, 1, 2, ... in order of
appearance, so everything else is arrays indexed by page.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from kvtier.errors import TraceError
from kvtier.policy import ROOT
from kvtier.replay.lines import number_at_least_0, read_lines, shown, whole

Column = NDArray[np.int64]

BLOCK_TOKENS = 512
"""Tokens of a block in Mooncake's traces."""
EXAMPLE = '{"timestamp": 0, "input_length": 700, "output_length": 40, "hash_ids": [0, 1]}'


@dataclass(frozen=True)
class Request:
    """One line of a trace: milliseconds, tokens, and block ids of any kind of whole number."""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: Sequence[int]

    def as_json(self) -> str:
        """The line, without its end."""
        stamp = int(self.timestamp) if float(self.timestamp).is_integer() else round(self.timestamp, 3)
        fields = (stamp, self.input_length, self.output_length, list(self.hash_ids))
        return json.dumps(dict(zip(("timestamp", "input_length", "output_length", "hash_ids"), fields, strict=True)))


@dataclass(frozen=True)
class Trace:
    """Requests in the order of the file, as columns.

    `at_s` float64 `[requests]` never falls: a timestamp before the latest one counts as that, as policies take it, and `backwards` says
    how many did. `starts` `[requests + 1]`: request i names the pages `pages[starts[i]:starts[i + 1]]`, from the start of its prompt on.
    `parents` and `depths`, as policies want them, are columns of accesses too.
    """

    name: str
    block_tokens: int
    at_s: NDArray[np.float64]
    input_tokens: Column
    output_tokens: Column
    starts: Column
    pages: Column
    parents: Column
    depths: Column
    backwards: int

    @property
    def requests(self) -> int:
        """How many requests there are."""
        return len(self.at_s)

    @property
    def accesses(self) -> int:
        """Pages named by all requests."""
        return len(self.pages)

    @cached_property
    def distinct(self) -> int:
        """Different pages named."""
        return int(self.pages.max()) + 1

    @cached_property
    def lengths(self) -> Column:
        """Pages of each request."""
        return np.diff(self.starts)

    @cached_property
    def tokens(self) -> int:
        """Input tokens of all requests."""
        return int(self.input_tokens.sum())

    @cached_property
    def first_seen(self) -> NDArray[np.bool_]:
        """Per access, whether it is the first one of its page."""
        first = np.zeros(self.accesses, np.bool_)
        first[np.unique(self.pages, return_index=True)[1]] = True
        return first

    @cached_property
    def fingerprint(self) -> str:
        """Equal for traces of equal requests, whatever the file is called."""
        digest = hashlib.blake2b(str(self.block_tokens).encode(), digest_size=16)
        for column in (self.at_s, self.input_tokens, self.starts, self.pages):
            digest.update(column.tobytes())
        return digest.hexdigest()

    def head(self, requests: int) -> Trace:
        """The first `requests` requests (at least one). Their pages keep their numbers; `backwards` stays that of the whole."""
        accesses = int(self.starts[requests])
        by_request = {name: getattr(self, name)[:requests] for name in ("at_s", "input_tokens", "output_tokens")}
        by_access = {name: getattr(self, name)[:accesses] for name in ("pages", "parents", "depths")}
        return replace(self, **by_request, **by_access, starts=self.starts[: requests + 1])

    def hit_tokens(self, hit_pages: Column) -> int:
        """Input tokens in the first `hit_pages` `[requests]` pages of each request: the last page counts its real tokens."""
        return int(np.minimum(hit_pages * self.block_tokens, self.input_tokens).sum())

    def sum_per_request(self, values: NDArray[Any]) -> Column:
        """Sums of a column of accesses over each request."""
        sums = np.concatenate(([0], np.cumsum(values, dtype=np.int64)))
        totals: Column = sums[self.starts[1:]] - sums[self.starts[:-1]]
        return totals


def build_trace(name: str, requests: Iterable[Request], block_tokens: int = BLOCK_TOKENS, where: str = "request") -> Trace:
    """A trace of these requests. TraceError naming the first that cannot be (`where` is what its number is called)."""
    builder = _Builder(name, block_tokens, where)
    for number, request in enumerate(requests, 1):
        builder.add(number, request)
    return builder.finish()


def read_trace(path: Path, block_tokens: int = BLOCK_TOKENS) -> Trace:
    """A trace from a file (`.gz` too). TraceError if it cannot be read, has no requests, or a line is none."""
    name = path.name.removesuffix(".gz").removesuffix(".jsonl").removeprefix("mooncake_")
    builder = _Builder(f"{path}", block_tokens, "line")
    for number, fields in read_lines(path, EXAMPLE):
        builder.add(number, _request(path, number, fields))
    return builder.finish(name)


def write_trace(requests: Iterable[Request], file: TextIO) -> int:
    """Write requests as lines; how many there were."""
    count = 0
    for request in requests:
        file.write(request.as_json() + "\n")
        count += 1
    return count


def block_ids(fields: dict[str, Any], where: str) -> list[int]:
    """The `hash_ids`. TraceError that says `where` if they are not a list of whole numbers."""
    ids = fields.get("hash_ids")
    if not isinstance(ids, list) or not all(type(block) is int for block in ids):
        raise TraceError(f"{where}: hash_ids is {shown(json.dumps(ids))}; expected a list of whole numbers")
    return ids


def _request(path: Path, number: int, fields: dict[str, Any]) -> Request:
    where = f"{path}: line {number}"
    return Request(
        number_at_least_0(fields, "timestamp", where),
        whole(fields, "input_length", 1, where),
        whole(fields, "output_length", 0, where, default=0),
        block_ids(fields, where),
    )


class _Builder:
    """Turns requests into columns, one after the other, and checks that ids mean prefixes."""

    def __init__(self, name: str, block_tokens: int, where: str) -> None:
        if block_tokens < 1:
            raise TraceError(f"blocks of {block_tokens} tokens; expected at least 1")
        self.name, self.block_tokens, self.where = name, block_tokens, where
        self.rows: list[tuple[float, int, int, int]] = []
        self.pages: list[int] = []
        self.page_of: dict[int, int] = {}
        self.parent: list[int] = []

    def add(self, number: int, request: Request) -> None:
        wanted = -(-request.input_length // self.block_tokens)
        if len(request.hash_ids) != wanted:
            said = f"{len(request.hash_ids)} hash_ids for {request.input_length} tokens"
            raise self._error(number, f"{said}; expected {wanted}, one for each {self.block_tokens} tokens (--block-tokens)")
        before = ROOT
        for block in request.hash_ids:
            page = self.page_of.get(block)
            if page is None:
                page = self.page_of[block] = len(self.parent)
                self.parent.append(before)
            elif self.parent[page] != before:
                remedy = "an id must stand for a whole prefix; `kvtier trace convert --from mooncake` makes such ids"
                raise self._error(number, f"block {block} follows another block than where it came first; {remedy}")
            self.pages.append(page)
            before = page
        self.rows.append((request.timestamp, request.input_length, request.output_length, wanted))

    def finish(self, name: str | None = None) -> Trace:
        if not self.rows:
            raise TraceError(f"{self.name} has no requests; expected at least one {self.where} like {EXAMPLE}")
        stamps, inputs, outputs, lengths = (np.array(column) for column in zip(*self.rows, strict=True))
        latest = np.maximum.accumulate(stamps)
        pages = np.array(self.pages, np.int64)
        starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
        return Trace(
            name=self.name if name is None else name,
            block_tokens=self.block_tokens,
            at_s=(latest / 1000).astype(np.float64),
            input_tokens=inputs.astype(np.int64),
            output_tokens=outputs.astype(np.int64),
            starts=starts,
            pages=pages,
            parents=np.array(self.parent, np.int64)[pages],
            depths=np.arange(len(pages)) - np.repeat(starts[:-1], lengths),
            backwards=int(np.count_nonzero(stamps[1:] < latest[:-1])),
        )

    def _error(self, number: int, what: str) -> TraceError:
        place = f"{self.name}: line {number}" if self.where == "line" else f"{self.name}: {self.where} {number}"
        return TraceError(f"{place}: {what}")
