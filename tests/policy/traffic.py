"""Requests for policies to serve: seeded kinds of traffic, the public traces, and the least replay that tells how many pages are found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvtier.policy import ROOT, EvictionPolicy

BLOCK_TOKENS = 512


@dataclass(frozen=True)
class Request:
    """When it comes, in seconds, the pages of its prompt in order, and its tokens."""

    at_s: float
    pages: tuple[int, ...]
    tokens: int


class Traffic:
    """Builds requests from chains of pages; every request ends in a page of its own, the partial one."""

    def __init__(self, seed: int) -> None:
        self.chance = np.random.default_rng(seed)
        self.requests: list[Request] = []
        self._pages = 0

    def fresh(self, pages: int) -> list[int]:
        first = self._pages
        self._pages += pages
        return list(range(first, self._pages))

    def ask(self, at_s: float, chain: list[int]) -> None:
        pages = (*chain, *self.fresh(1))
        self.requests.append(Request(at_s, pages, len(pages) * BLOCK_TOKENS))

    def arrivals(self, start: float, stop: float, per_s: float) -> Iterator[float]:
        now = start
        while (now := now + float(self.chance.exponential(1 / per_s))) < stop:
            yield now

    def chat(self, start: float, stop: float, per_s: float) -> None:
        """Sessions of several turns over a few system prompts, with minutes between turns."""
        prompts = [self.fresh(int(self.chance.integers(1, 6))) for _ in range(5)]
        for now in self.arrivals(start, stop, per_s):
            chain = list(prompts[int(self.chance.integers(5))])
            for _ in range(int(self.chance.geometric(0.3))):
                chain += self.fresh(1 + int(self.chance.exponential(8)))
                self.ask(now, chain)
                now += float(self.chance.lognormal(4, 1))

    def agents(self, start: float, stop: float, per_s: float) -> None:
        """Long runs of tool calls seconds apart over a growing context, now and then a sub-agent with its own."""
        tools = [self.fresh(int(self.chance.integers(6, 20))) for _ in range(3)]
        for now in self.arrivals(start, stop, per_s):
            chain = tools[int(self.chance.integers(3))] + self.fresh(4)
            for _ in range(int(self.chance.geometric(0.08))):
                chain += self.fresh(int(self.chance.integers(0, 4)))
                self.ask(now, chain)
                if self.chance.random() < 0.1:
                    helper = tools[int(self.chance.integers(3))] + self.fresh(2)
                    for _ in range(int(self.chance.geometric(0.2))):
                        now += 0.5 + float(self.chance.exponential(4))
                        self.ask(now, helper)
                        helper += self.fresh(1)
                now += 0.5 + float(self.chance.exponential(6))

    def documents(self, start: float, stop: float, per_s: float, count: int = 400) -> None:
        """Questions about documents, some of which are asked about far more often than others."""
        texts = [self.fresh(int(self.chance.integers(4, 30))) for _ in range(count)]
        weights = 1 / np.arange(1, count + 1) ** 0.8
        for now in self.arrivals(start, stop, per_s):
            self.ask(now, texts[int(self.chance.choice(count, p=weights / weights.sum()))])

    def scan(self, start: float, stop: float, per_s: float) -> None:
        """A batch that reads every text once."""
        for now in self.arrivals(start, stop, per_s):
            self.ask(now, self.fresh(12))

    def loop(self, start: float, stop: float, per_s: float, count: int = 60) -> None:
        """The same texts over and over, in the same order."""
        texts = [self.fresh(10) for _ in range(count)]
        for turn, now in enumerate(self.arrivals(start, stop, per_s)):
            self.ask(now, texts[turn % count])

    def done(self) -> list[Request]:
        return sorted(self.requests, key=lambda request: request.at_s)


def mooncake(path: Path) -> list[Request]:
    """The requests of a Mooncake trace."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [Request(line["timestamp"] / 1000, tuple(line["hash_ids"]), line["input_length"]) for line in lines]


def distinct(requests: list[Request]) -> int:
    return 1 + max(max(request.pages) for request in requests)


def found(requests: list[Request], policy: EvictionPolicy, capacity: int) -> NDArray[np.int64]:
    """Pages found by each request, in a tier of `capacity` pages that holds every request afterwards, or its head."""
    here, running = np.zeros(distinct(requests), np.bool_), np.zeros(distinct(requests), np.bool_)
    free, hits = capacity, []
    for request in requests:
        pages = np.array(request.pages[:capacity])
        count = int(np.count_nonzero(here[pages]))
        hits.append(count)
        if count:
            policy.touch(pages[:count], request.at_s)
        coming = pages[count:]
        if not len(coming):
            continue
        if len(coming) > free:
            running[pages] = True
            victims = policy.evict(len(coming) - free, running.__getitem__, request.at_s, 1.0)
            running[pages] = False
            assert victims is not None
            here[victims] = False
            free += len(victims)
        parents = np.concatenate((pages[count - 1 : count] if count else [ROOT], coming[:-1]))
        policy.insert(coming, parents, np.arange(count, len(pages)), request.at_s)
        here[coming] = True
        free -= len(coming)
    return np.array(hits)


def hit_ratio(requests: list[Request], policy: EvictionPolicy, capacity: int) -> float:
    """Share of the tokens found."""
    tokens = np.array([request.tokens for request in requests])
    return int(np.minimum(found(requests, policy, capacity) * BLOCK_TOKENS, tokens).sum()) / int(tokens.sum())
