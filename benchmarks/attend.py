"""Attend to pages in host memory where they are, or fetch them first? Both, for requests of different length, and the router between them.

`attend.fetch.16steps`: one request that acquires a prefix in host memory by fetching it to the device, and then decodes so many steps, each
attending over all of it at every layer; `attend.in_place`: the same with its pages left in host memory. Milliseconds per request, less is
better; the ceiling is the faster of the two. `attend.mix.*`: requests of two classes together: half ask for one step and pay little
attention to the prefix (`simple_qa`), half for many and pay much (`creative_writing`); always fetching, always in place, and routed by the
attention reported before and by what both ways took in the rounds that warm up (as many as it needs to know both). Their ceiling is the
faster way for each class. `attend.mix.right`: share of the routed requests that went the faster way.

Attention is the torch reference of `kvtier.attention.partial` on both sides; without a GPU the device is host memory too, so what fetching
costs is decoding and copying.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch

from kvtier.attention.learned import LEAST_REQUESTS
from kvtier.cache import TieredKVCache
from kvtier.errors import KVTierError
from kvtier.layout import PageLayout

from .measure import Row, Run
from .rig import Room, layout_named, made_kv, open_cache, restore, timed, token_ids

STEPS = (1, 4, 16)
TINY_STEPS = (1, 2)
GROUP = 4
"""Query heads per KV head."""
Fixed = Literal["fetch", "in_place"]
WAYS: tuple[Fixed, ...] = ("fetch", "in_place")


@dataclass(frozen=True)
class Kind:
    """Requests that call themselves `workload`, decode so many `steps`, and pay this share of their `attention` to the prefix."""

    workload: str
    steps: int
    attention: float


class Bench:
    """A cache whose device holds either of two sequences, the host both: what is asked for is in host memory only."""

    def __init__(self, cache: TieredKVCache, tokens: int) -> None:
        self._cache = cache
        self._prefix, self._other = token_ids(0, tokens), token_ids(1, tokens)
        kv = made_kv(cache.layout, tokens)
        for ids in (self._prefix, self._other):
            cache.put(ids, kv)
            cache.settle()
        self._queries = torch.randn(1, GROUP * cache.layout.kv_heads, cache.layout.head_dim, device=kv.device)
        self.choices: list[str] = []

    def request(self, kind: Kind) -> float:
        """Seconds of one request for the prefix, which is nowhere but in host memory; `choices` has what was done about that."""
        with self._cache.acquire(self._cache.lookup(self._prefix)) as lease:
            lease.wait()
            self._cache.record_attention(lease, [kind.attention / lease.pages] * lease.pages)
        restore(self._cache, self._other)
        self._cache.settle()
        return timed(lambda: self._serve(kind))

    def _serve(self, kind: Kind) -> None:
        with self._cache.acquire_in_place(self._cache.lookup(self._prefix), kind.workload) as lease:
            if lease.tokens < len(self._prefix):
                raise KVTierError(f"only {lease.tokens} of {len(self._prefix)} tokens were there; look for refusals in the log")
            self.choices.append(lease.decision.choice)
            for _ in range(kind.steps):
                for layer in range(self._cache.layout.layers):
                    lease.attend(layer, self._queries)


def measure(run: Run, layout: str = "smollm2", prefix_tokens: int = 1024) -> list[Row]:
    """The rows for a prefix of `prefix_tokens` tokens of a layout of LAYOUTS. KVTierError for prefixes below a page."""
    pages_of = layout_named(layout, run.tiny)
    tokens = 64 if run.tiny else prefix_tokens // pages_of.page_tokens * pages_of.page_tokens
    if tokens < 1:
        raise KVTierError(f"--prefix-tokens {prefix_tokens}: expected at least one page, {pages_of.page_tokens} tokens")
    steps = TINY_STEPS if run.tiny else STEPS
    run.expect(len(steps) + 1)
    rows = []
    for count in steps:
        run.step(f"{count} steps")
        (took,), _ = _measured(run, pages_of, tokens, [Kind("default", count, 0.5)], WAYS, warm_up=1)
        best = min(took.values())
        rows += [Row(f"attend.{way}.{count}steps", took[way], "ms", best) for way in WAYS]
    run.step("a mix of requests")
    kinds = [Kind("simple_qa", steps[0], 0.2), Kind("creative_writing", steps[-1], 0.8)]
    by_kind, choices = _measured(run, pages_of, tokens, kinds, (*WAYS, "auto"), warm_up=2 * LEAST_REQUESTS)
    best = sum(min(took[way] for way in WAYS) for took in by_kind)
    for way, name in (("fetch", "fetch"), ("in_place", "in_place"), ("auto", "routed")):
        rows.append(Row(f"attend.mix.{name}", sum(took[way] for took in by_kind), "ms", best))
    right = [choice == min(WAYS, key=took.__getitem__) for took, chosen in zip(by_kind, choices, strict=True) for choice in chosen]
    return [*rows, Row("attend.mix.right", sum(right) / len(right), "share", 1.0)]


def _measured(
    run: Run, layout: PageLayout, tokens: int, kinds: Sequence[Kind], ways: Sequence[str], warm_up: int
) -> tuple[list[dict[str, float]], list[list[str]]]:
    """Per kind the median milliseconds of each way, in turns, and what the last way chose for each request; the first `warm_up` rounds
    come on top of the repeats and do not count."""
    pages = tokens // layout.page_tokens
    with ExitStack() as stack:
        benches = {
            way: Bench(stack.enter_context(open_cache(layout, Room(pages + 1, host=3 * pages), routing__mode=way)), tokens) for way in ways
        }
        took: list[dict[str, list[float]]] = [{way: [] for way in ways} for _ in kinds]
        choices: list[list[str]] = [[] for _ in kinds]
        for number in range(-warm_up, run.repeats):
            for place, kind in enumerate(kinds):
                for way, bench in benches.items():
                    seconds = bench.request(kind)
                    if number >= 0:
                        took[place][way].append(seconds * 1e3)
                if number >= 0:
                    choices[place].append(benches[ways[-1]].choices[-1])
    return [{way: statistics.median(column) for way, column in each.items()} for each in took], choices
