"""What attending takes here, on the device and in place, and how much requests of a class attend: learned from requests as they end.

So the router (`kvtier.attention.router`) can foresee both ways of a request: bringing its pages up and attending there as often as others
of its class did, against attending in place as often. Both are measured as the calling thread sees them: attention on a GPU counts with
its launches, since nobody waits for it here. Plain numbers, no clock; state belongs to the cache's lock.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvtier.attention.router import Choice, Decision, Expected
from kvtier.pricing import EXPLORE_SHARE, FORGET, CostModel

LEAST_REQUESTS = 2
"""A side that served fewer is not known."""


@dataclass
class Attended:
    """What one request attended to on one side so far: `calls`, their query tokens, and both times the tokens they went over."""

    calls: int = 0
    query_tokens: int = 0
    seconds: float = 0.0

    def add(self, query_tokens: int, seconds: float) -> None:
        """One call more."""
        self.calls += 1
        self.query_tokens += query_tokens
        self.seconds += seconds


class LearnedCosts:
    """What one cache knows of both sides."""

    def __init__(self) -> None:
        self.explored = 0
        """Requests that went a way that seemed the slower one, or that nothing was known of, to see."""
        self._sides: dict[Choice, CostModel] = {"fetch": CostModel(3), "in_place": CostModel(3)}
        """Terms: tokens gone over, these times query tokens, calls; each summed over the calls of a request."""
        self._work: dict[str, tuple[float, float, float]] = {}
        """By workload class, fading: requests, their calls, their query tokens."""
        self._saved_s = 0.0
        """Seconds saved up for exploring."""

    def ended(self, workload: str, side: Choice, tokens: int, did: Attended) -> None:
        """A request of this class attended to `tokens` tokens of this side, and is over. One that never attended says nothing."""
        if not did.calls:
            return
        requests, calls, query_tokens = (FORGET * each for each in self._work.get(workload, (0.0, 0.0, 0.0)))
        self._work[workload] = (requests + 1, calls + did.calls, query_tokens + did.query_tokens)
        if tokens and did.seconds > 0:
            self._sides[side].observe(_terms(tokens, did.calls, did.query_tokens), did.seconds)

    def expect(self, workload: str, tokens: int, restore_s: float | None) -> Expected:
        """Seconds of both ways for a request of this class and `tokens` tokens in host memory, which `restore_s` seconds bring up. None for
        what is not known, such as the first request of a class."""
        if workload not in self._work or not tokens:
            return Expected()
        requests, calls, query_tokens = self._work[workload]
        terms = _terms(tokens, calls / requests, query_tokens / requests)
        device_s, cores_s = (self._sides[side].seconds(terms) if self._known(side) else None for side in ("fetch", "in_place"))
        return Expected(None if device_s is None or restore_s is None else restore_s + device_s, cores_s)

    def exploring(self, decision: Decision) -> str:
        """Why this request had better go the other way, to learn; empty if it had not. Counts what it says."""
        chosen, other = ("fetch", "in_place") if decision.choice == "fetch" else ("in_place", "fetch")
        seconds = {"fetch": decision.expected.fetch_s, "in_place": decision.expected.in_place_s}
        best, worst = seconds[chosen], seconds[other]
        if best is None:
            return ""  # the one that was chosen has to be learned first, or the class
        if worst is None:
            self.explored += 1
            return f"to learn what {other.replace('_', ' ')} takes"
        self._saved_s += EXPLORE_SHARE * best
        if worst < best or self._saved_s < worst - best:
            return ""
        self._saved_s = 0.0
        self.explored += 1
        return f"to see whether {other.replace('_', ' ')} still takes longer"

    def as_json(self) -> dict[str, object]:
        """For `stats()`: requests seen of each side and what a call over 1,000 tokens takes, None if not known; the work of each class."""
        return {
            "sides": {
                side: {"requests": model.observations, "s_per_call": model.seconds(_terms(1000, 1, 1)) if self._known(side) else None}
                for side, model in self._sides.items()
            },
            "calls_per_request": {name: round(calls / requests, 3) for name, (requests, calls, _) in self._work.items()},
            "explored": self.explored,
        }

    def _known(self, side: Choice) -> bool:
        return self._sides[side].observations >= LEAST_REQUESTS


def _terms(tokens: int, calls: float, query_tokens: float) -> list[float]:
    return [tokens * calls, tokens * query_tokens, calls]
