"""Made-up traces, the same for the same seed: what people and programs do with a language model, as far as a prefix cache can see it.

Sessions of each kind start at random (a Poisson process) and send requests whose prompts grow. Numbers marked [M] are those of
Mooncake's conversation trace (FAST'25), [C] of the card of the GitHub Copilot coding agent traces (Azure public datasets, 2026), [B] of
"KVCache Cache in the Wild" (ATC'25, Alibaba Bailian); the others are round and plausible. Lengths and gaps are log-normal, popularity is
Zipf's.

- `chat`: people. 3 turns on average, 123 s apart (5 % under 27, 5 % over 609) [M]; answers of 340 tokens [M]; four in ten bring a document
  of 12,000 tokens, so that prompts are as long as there (p90 about 25,000) [M]. Every chat is over one of 20 system prompts.
- `system`: programs with a fixed prompt and a short input, one request each, as most of a business service's reuse is [B]: 300 prompts.
- `retrieval`: a question after 3 to 6 passages, the most fitting first, of 5,000 passages; some are asked further.
- `agents`: 4 turns of 8 model calls each [C]; a call adds 530 tokens of output [C] and a tool's result; prompts come to some 60,000
  tokens on average [C]. Calls follow in seconds, turns in minutes. What grows over 160,000 tokens is summed up and goes on from that.
- `scan`: a batch job, 10 requests a second over 200 documents that nobody reads again, each after the job's instructions.
"""

from __future__ import annotations

import heapq
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import ClassVar

from kvtier.errors import KVTierError
from kvtier.replay.blocks import BlockIds, Prompt
from kvtier.replay.trace import BLOCK_TOKENS, Request


@dataclass(frozen=True)
class Call:
    """A request of a session: seconds after the one before (the first: after the session's start), prompt, tokens of the answer."""

    after_s: float
    input_tokens: int
    hash_ids: list[int]
    output_tokens: int


@dataclass
class World:
    """What all sessions of a trace share: block ids, and numbers for texts that nobody has written yet."""

    blocks: BlockIds
    texts: Iterator[int] = field(default_factory=itertools.count)


class Workload(ABC):
    """Sessions of one kind. `chance` is for what they share; every session brings its own."""

    name: ClassVar[str]
    requests_per_session: ClassVar[float]
    """On average: turns the rate of requests into one of sessions."""

    def __init__(self, chance: Random, world: World) -> None:
        self.chance, self.world = chance, world

    @abstractmethod
    def session(self, chance: Random) -> Iterator[Call]:
        """The requests of one session."""

    def shared(self, count: int, median: float, spread: float) -> list[tuple[int, int]]:
        """Texts with their tokens, most popular first."""
        return [(next(self.world.texts), tokens(self.chance, median, spread)) for _ in range(count)]

    def prompt(self) -> Prompt:
        """An empty prompt."""
        return Prompt(self.world.blocks)

    def new(self, prompt: Prompt, length: int) -> Prompt:
        """The prompt with `length` tokens more that were never seen before."""
        return prompt.add(next(self.world.texts), length)


class Chat(Workload):
    """See the head of the file."""

    name = "chat"
    requests_per_session = 3.0

    def __init__(self, chance: Random, world: World) -> None:
        super().__init__(chance, world)
        self.prompts = Popular(self.shared(20, median=400, spread=1.0), skew=1.1)

    def session(self, chance: Random) -> Iterator[Call]:
        prompt = self.prompt().add(*self.prompts.draw(chance))
        if chance.random() < 0.4:
            self.new(prompt, tokens(chance, 12000, 0.9))
        for turn in range(geometric(chance, 3.0)):
            self.new(prompt, tokens(chance, 250, 1.3))
            answer = tokens(chance, 280, 0.6)
            yield Call(lognormal(chance, 123, 0.96) if turn else 0.0, prompt.tokens, prompt.ids(), answer)
            self.new(prompt, answer)


class SystemPrompts(Workload):
    """See the head of the file."""

    name = "system"
    requests_per_session = 1.0

    def __init__(self, chance: Random, world: World) -> None:
        super().__init__(chance, world)
        self.prompts = Popular(self.shared(300, median=1500, spread=0.8), skew=1.1)

    def session(self, chance: Random) -> Iterator[Call]:
        prompt = self.new(self.prompt().add(*self.prompts.draw(chance)), tokens(chance, 300, 1.0))
        yield Call(0.0, prompt.tokens, prompt.ids(), tokens(chance, 100, 1.0))


class Retrieval(Workload):
    """See the head of the file."""

    name = "retrieval"
    requests_per_session = 1.4

    def __init__(self, chance: Random, world: World) -> None:
        super().__init__(chance, world)
        self.instructions = self.shared(1, median=600, spread=0.1)[0]
        self.passages = Popular(self.shared(5000, median=900, spread=0.5), skew=0.9)

    def session(self, chance: Random) -> Iterator[Call]:
        prompt = self.prompt().add(*self.instructions)
        for turn in range(geometric(chance, 1.4)):
            for passage in dict.fromkeys(self.passages.draw(chance) for _ in range(chance.randint(3, 6))):
                prompt.add(*passage)
            self.new(prompt, tokens(chance, 40, 0.6))
            answer = tokens(chance, 200, 0.7)
            yield Call(lognormal(chance, 60, 1.0) if turn else 0.0, prompt.tokens, prompt.ids(), answer)
            self.new(prompt, answer)


class Agents(Workload):
    """See the head of the file."""

    name = "agents"
    requests_per_session = 32.0
    full_tokens = 160_000

    def __init__(self, chance: Random, world: World) -> None:
        super().__init__(chance, world)
        self.tools = Popular(self.shared(6, median=12000, spread=0.4), skew=1.0)

    def session(self, chance: Random) -> Iterator[Call]:
        tools = self.tools.draw(chance)
        prompt = self.new(self.prompt().add(*tools), tokens(chance, 3000, 1.0))
        for turn in range(geometric(chance, 4.0)):
            self.new(prompt, tokens(chance, 120, 1.0))
            for call in range(geometric(chance, 8.0)):
                pause = lognormal(chance, 5, 1.0) if call else lognormal(chance, 90, 1.2)
                answer = tokens(chance, 280, 1.13)
                yield Call(pause if turn or call else 0.0, prompt.tokens, prompt.ids(), answer)
                self.new(self.new(prompt, answer), tokens(chance, 700, 1.3))
                if prompt.tokens > self.full_tokens:
                    prompt = self.new(self.prompt().add(*tools), tokens(chance, 6000, 0.4))


class Scan(Workload):
    """See the head of the file."""

    name = "scan"
    requests_per_session = 200.0

    def session(self, chance: Random) -> Iterator[Call]:
        instructions = (next(self.world.texts), tokens(chance, 800, 0.7))
        for item in range(geometric(chance, 200.0)):
            prompt = self.new(self.prompt().add(*instructions), tokens(chance, 3000, 0.7))
            yield Call(chance.expovariate(10.0) if item else 0.0, prompt.tokens, prompt.ids(), tokens(chance, 150, 0.5))


WORKLOADS: Mapping[str, type[Workload]] = {kind.name: kind for kind in (Chat, SystemPrompts, Retrieval, Agents, Scan)}


def make_requests(mix: Mapping[str, float], requests: int, rate: float, seed: int, block_tokens: int = BLOCK_TOKENS) -> Iterator[Request]:
    """`requests` requests, `rate` a second, of which each workload of `mix` sends its share (any positive numbers).

    The first minutes hold more first requests of sessions than later ones, as in a service that has just been started. KVTierError for
    an unknown workload or numbers that make no sense.
    """
    for name, share in mix.items():
        if name not in WORKLOADS:
            raise KVTierError(f"unknown workload {name!r}; known: {', '.join(WORKLOADS)}")
        if not 0 < share < math.inf:
            raise KVTierError(f"workload {name} has the share {share:g}; expected a number above 0")
    for what, value in (("requests", requests), ("rate", rate), ("tokens of a block", block_tokens)):
        if not 0 < value < math.inf:
            raise KVTierError(f"{what}: {value:g}; expected a number above 0")
    if not mix:
        raise KVTierError(f"no workload; known: {', '.join(WORKLOADS)}")
    return itertools.islice(_in_order_of_time(mix, rate, seed, block_tokens), requests)


def _in_order_of_time(mix: Mapping[str, float], rate: float, seed: int, block_tokens: int) -> Iterator[Request]:
    world = World(BlockIds(block_tokens))
    order = itertools.count()
    sending: list[tuple[float, int, Call, Iterator[Call]]] = []
    arriving: list[tuple[float, int, float, int, Workload]] = []
    for name, share in mix.items():
        workload = WORKLOADS[name](Random(f"{seed}/{name}"), world)
        sessions_per_s = rate * share / sum(mix.values()) / workload.requests_per_session
        arriving.append((workload.chance.expovariate(sessions_per_s), next(order), sessions_per_s, 0, workload))
    heapq.heapify(arriving)

    def send_next(at_s: float, session: Iterator[Call]) -> None:
        call = next(session, None)
        if call is not None:
            heapq.heappush(sending, (at_s + call.after_s, next(order), call, session))

    while True:
        if not sending or arriving[0][0] <= sending[0][0]:
            at_s, place, sessions_per_s, number, workload = arriving[0]
            send_next(at_s, workload.session(Random(f"{seed}/{workload.name}/{number}")))
            following = at_s + workload.chance.expovariate(sessions_per_s)
            heapq.heapreplace(arriving, (following, place, sessions_per_s, number + 1, workload))
            continue
        at_s, _, call, session = heapq.heappop(sending)
        yield Request(round(at_s * 1000), call.input_tokens, call.output_tokens, call.hash_ids)
        send_next(at_s, session)


class Popular:
    """Texts of which the first is drawn most often: the n-th with probability proportional to n ** -skew."""

    def __init__(self, texts: list[tuple[int, int]], skew: float) -> None:
        self.texts = texts
        self.weights = list(itertools.accumulate((place + 1) ** -skew for place in range(len(texts))))

    def draw(self, chance: Random) -> tuple[int, int]:
        """A text and its tokens."""
        return chance.choices(self.texts, cum_weights=self.weights)[0]


def lognormal(chance: Random, median: float, spread: float) -> float:
    """`spread` is the standard deviation of the logarithm."""
    return chance.lognormvariate(math.log(median), spread)


def tokens(chance: Random, median: float, spread: float) -> int:
    """A log-normal length, at least 1 and at most 40 medians: what a context window would cut."""
    return 1 + int(min(lognormal(chance, median, spread), 40 * median))


def geometric(chance: Random, mean: float) -> int:
    """1, 2, 3, ..., so many on average."""
    return 1 + int(math.log(1.0 - chance.random()) / math.log(1.0 - 1.0 / mean))
