"""Made-up traces of eight kinds for `kvtier bench eviction`: those of `kvtier trace make` and two on which policies are known to fail.

`drift`: documents whose popularity moves on, so that yesterday's counts mislead. `loop`: texts one after the other, over and over, more of
them than fit, where LRU finds nothing. The rest of `kvtier.replay.workloads`: people, programs with fixed prompts, retrieval, agents with
tools, people beside batch jobs, and people, programs, retrieval and agents at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from random import Random

from kvtier.replay.blocks import BlockIds, Prompt
from kvtier.replay.trace import Request, Trace, build_trace
from kvtier.replay.workloads import make_requests

RATE_PER_S = 3.4
"""Requests a second, those of Mooncake's conversation trace."""
BLOCK_TOKENS = 512
DOCUMENT_TOKENS = 5_000
QUESTION_TOKENS = 100

MIXES: dict[str, dict[str, float]] = {
    "chat": {"chat": 1},
    "prompts": {"system": 1},
    "retrieval": {"retrieval": 1},
    "agents": {"agents": 1},
    "scans": {"chat": 1, "scan": 1},
    "mixture": {"chat": 1, "system": 1, "retrieval": 1, "agents": 1},
}
"""Shares of the requests."""
KINDS = (*MIXES, "drift", "loop")


def make_traffic(kind: str, requests: int, seed: int = 0) -> Trace:
    """The trace of this kind, the same for the same numbers."""
    if kind in MIXES:
        return build_trace(kind, make_requests(MIXES[kind], requests, RATE_PER_S, seed, BLOCK_TOKENS), BLOCK_TOKENS)
    chance = Random(f"{seed}/{kind}")
    return build_trace(kind, _questions(_drifting(requests, chance) if kind == "drift" else _looping(requests), chance), BLOCK_TOKENS)


def _drifting(requests: int, chance: Random) -> Iterator[int]:
    """Zipf over the 200 newest of documents of which a new one appears with every fifth request."""
    weights = list(itertools.accumulate((place + 1) ** -0.8 for place in range(200)))
    for number in range(requests):
        yield number // 5 + 200 - chance.choices(range(200), cum_weights=weights)[0]


def _looping(requests: int) -> Iterator[int]:
    """A tenth as many documents as requests, in the same order ten times."""
    texts = max(1, requests // 10)
    return (number % texts for number in range(requests))


def _questions(documents: Iterator[int], chance: Random) -> Iterator[Request]:
    """A question of its own after each of these documents."""
    blocks, at_s = BlockIds(BLOCK_TOKENS), 0.0
    for number, document in enumerate(documents):
        at_s += chance.expovariate(RATE_PER_S)
        length = 1 + int(Random(f"{document}").expovariate(1 / DOCUMENT_TOKENS))
        prompt = Prompt(blocks).add(document, length).add(-1 - number, QUESTION_TOKENS)
        yield Request(round(at_s * 1000), prompt.tokens, QUESTION_TOKENS, prompt.ids())
