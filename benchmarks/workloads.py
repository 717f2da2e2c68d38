"""What `engines.py` asks engines: long documents, chats, agents. Scripted, so that every system gets the same prompts to the token.

Each workload plays in rounds before a restart, once right after it, and in as many rounds again; a request says in which case it is, and
how much of its prompt was sent before. Tokens are random: the time does not depend on them. A chat's replies are scripted too, and are not
what the model answered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

TOKEN_IDS = (1000, 49000)
QUESTION_TOKENS = 40
CASES = ("cold", "own", "ram", "restart", "disk")
"""A prompt never seen; one that the engine's own cache holds; one that comes from elsewhere: memory, a store after a restart with its
files out of the page cache, the same with the engine warm and too little memory for all."""


@dataclass(frozen=True)
class Request:
    """A prompt, its case, and how many of its first tokens were part of a prompt before."""

    case: str
    prompt: list[int]
    known_tokens: int


@dataclass(frozen=True)
class Workload:
    """Rounds of requests, one request at a time. What is stored has arrived before the next round begins."""

    rounds: list[list[Request]]
    after_restart: list[list[Request]]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(request.prompt) for each in (*self.rounds, *self.after_restart) for request in each)

    @property
    def new_tokens(self) -> int:
        """Tokens of all prompts that were in none before."""
        return sum(len(request.prompt) - request.known_tokens for each in (*self.rounds, *self.after_restart) for request in each)


@dataclass(frozen=True)
class Sizes:
    """How much: `contexts` documents, chats or agents, documents of `document_tokens`; the others follow from that."""

    contexts: int
    document_tokens: int
    rounds: int


def random_tokens(seed: int, count: int) -> list[int]:
    """Token ids, the same for the same seed."""
    ids: list[int] = np.random.default_rng(seed).integers(*TOKEN_IDS, count).tolist()
    return ids


def restarted(sizes: Sizes) -> list[str]:
    """The cases of the rounds after a restart."""
    return ["restart"] + ["disk"] * sizes.rounds


def documents(sizes: Sizes) -> Workload:
    """Questions about long documents in turn; the first two about each follow each other."""
    tokens = sizes.document_tokens

    def about(case: str, question: int, document: int) -> Request:
        prompt = random_tokens(document, tokens) + random_tokens(1000 + question, QUESTION_TOKENS)
        return Request(case, prompt, 0 if case == "cold" else tokens)

    each = range(sizes.contexts)
    first = [request for document in each for request in (about("cold", 0, document), about("own", 1, document))]
    rounds = [first] + [[about("ram", question, document) for document in each] for question in range(2, 2 + sizes.rounds)]
    return Workload(rounds, [[about(case, 100 + place, document) for document in each] for place, case in enumerate(restarted(sizes))])


def chat(sizes: Sizes) -> Workload:
    """Chats that take turns, each growing by a reply and a message per turn; meanwhile the others push it out of the engine's own cache."""
    start, turn = sizes.document_tokens // 3, max(QUESTION_TOKENS, sizes.document_tokens // 20)

    def say(case: str, number: int) -> list[Request]:
        tokens, known = start + number * turn, start + (number - 1) * turn if number else 0
        return [Request(case, random_tokens(20_000 + session, start + 100 * turn)[:tokens], known) for session in range(sizes.contexts)]

    rounds = [say("ram" if number else "cold", number) for number in range(1 + sizes.rounds)]
    return Workload(rounds, [say(case, 1 + sizes.rounds + place) for place, case in enumerate(restarted(sizes))])


def agent(sizes: Sizes) -> Workload:
    """Agents with one long system prompt in common, each at its task for some steps that grow its context, one agent after the other; then
    each is taken up again and tries another branch."""
    steps, step = 4, max(QUESTION_TOKENS, sizes.document_tokens // 20)
    common, task = random_tokens(30_000, sizes.document_tokens // 3), sizes.document_tokens // 5

    def own(number: int, taken: int) -> list[int]:
        return common + random_tokens(30_001 + number, task + steps * step)[: task + taken * step]

    def work(number: int) -> list[Request]:
        first = Request("cold", own(number, 0), len(common) if number else 0)
        return [first] + [Request("own", own(number, taken), len(own(number, taken - 1))) for taken in range(1, steps)]

    def branch(case: str, place: int) -> list[Request]:
        made = []
        for number in range(sizes.contexts):
            context = own(number, steps - 1)
            made.append(Request(case, context + random_tokens(40_000 + 100 * number + place, step), len(context)))
        return made

    rounds = [[request for number in range(sizes.contexts) for request in work(number)]]
    rounds += [branch("ram", place) for place in range(sizes.rounds)]
    return Workload(rounds, [branch(case, 50 + place) for place, case in enumerate(restarted(sizes))])


WORKLOADS: dict[str, Callable[[Sizes], Workload]] = {"documents": documents, "chat": chat, "agent": agent}
"""By name."""
