"""The workload: which session plays which turn when, over which tokens, and how small the tiers are.

All of it follows from a `Size` and a seed. A session is a long document, then turns of a question (the document's own next words) and
an answer. First turns come in order. In each later round the last speaker asks on at once and the others return shuffled, so that pages
are wanted again after short and after long whiles.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from kvtier.errors import ConfigError
from kvtier.quality.texts import passages


@dataclass(frozen=True)
class Size:
    """How large the job is. `device_share` and `host_share` are the shares of all tokens that fit into those tiers."""

    sessions: int = 5
    turns: int = 3
    context_tokens: int = 1400
    question_tokens: int = 24
    new_tokens: int = 12
    probe_tokens: int = 128
    """Real text scored after each returning turn, to judge what quantized pages do to the model."""
    device_share: float = 0.30
    host_share: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("sessions", 2),
            ("turns", 2),
            ("context_tokens", 64),
            ("question_tokens", 1),
            ("new_tokens", 1),
            ("probe_tokens", 2),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected at least {least}")
        for name in ("device_share", "host_share"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected between 0 and 1")

    @property
    def session_tokens(self) -> int:
        """Tokens of one session after its last turn."""
        return self.context_tokens + self.turns * (self.question_tokens + self.new_tokens)

    @property
    def tokens(self) -> int:
        """Tokens of all sessions after their last turns."""
        return self.sessions * self.session_tokens


@dataclass(frozen=True)
class Turn:
    """One turn: what the user adds (first turns add the whole document), and the real text that is scored after it (returning turns)."""

    session: int
    index: int
    user_ids: list[int]
    probe_ids: list[int]

    @property
    def returning(self) -> bool:
        """Whether the session was here before."""
        return self.index > 0


def plan(size: Size, tokenizer: Any) -> list[Turn]:
    """All turns in playing order."""
    per_turn = size.question_tokens + size.probe_tokens
    texts = passages(tokenizer, size.sessions, size.context_tokens + size.turns * per_turn)
    order = list(range(size.sessions))
    shuffle = random.Random(size.seed).shuffle
    turns = []
    for index in range(size.turns):
        for session in order:
            start = size.context_tokens + index * per_turn
            question = texts[session][start : start + size.question_tokens]
            probe = texts[session][start + size.question_tokens : start + per_turn]
            document = [] if index else texts[session][: size.context_tokens]
            turns.append(Turn(session, index, document + question, probe))
        last, rest = order[-1], order[:-1]
        shuffle(rest)
        order = [last, *rest]
    return turns
