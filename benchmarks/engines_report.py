"""What `engines.py` saw of each system, and the rows and the drawing made of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvtier.errors import needing

from .contestants import SYSTEMS
from .measure import Row, percentile
from .serving import Answer
from .workloads import CASES, WORKLOADS, Request

ANSWERS = {"cold": "cold", "own": "own cache", "ram": "memory", "restart": "restarted", "disk": "disk"}
"""Cases as people read them."""
RESAMPLES = 400
"""Of the turns without reuse, for the error of what they say."""


@dataclass(frozen=True)
class Spent:
    """What prompts took that were asked right after each other: seconds of each, CPU seconds of all until the system was at rest."""

    seconds: list[float]
    cpu_s: float


class Turn(NamedTuple):
    """Prompts without reuse that were kept, and others that were passed over, or asked of a plain engine."""

    kept: Spent
    other: Spent


@dataclass
class Seen:
    """What one system showed: answers by workload and case; CPU seconds, tokens and seconds by workload, before the restart."""

    answers: dict[tuple[str, str], list[Answer]] = field(default_factory=dict)
    cpu_s: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    disk_bytes: int = 0
    no_reuse: list[Turn] = field(default_factory=list)

    def timed(self, workload: str, played: Sequence[tuple[Request, Answer]]) -> None:
        """Count a round for the throughput."""
        self.tokens[workload] = self.tokens.get(workload, 0) + sum(len(each.prompt) + answer.new_tokens for each, answer in played)
        self.seconds[workload] = self.seconds.get(workload, 0.0) + sum(answer.total_s for _, answer in played)


def found_s(answers: Sequence[Answer]) -> list[float]:
    """Seconds to the first token of those that found what they must."""
    return [answer.first_s for answer in answers if not answer.missed]


def first_s(answers: Sequence[Answer]) -> float:
    """Median seconds to the first token, NaN if no answer counts."""
    seconds = found_s(answers)
    return statistics.median(seconds) if seconds else math.nan


def to_fastest(answers: Sequence[Answer], peers: Sequence[Sequence[Answer]]) -> float:
    """Median over the requests of seconds to the first token over those of the peer that is the fastest by its median. Each request was
    asked of all in turn, so what slows the machine for a while slows both."""
    fastest = min(peers, key=lambda peer: first_s(peer))
    return statistics.median(ours.first_s / theirs.first_s for ours, theirs in zip(answers, fastest, strict=True) if not theirs.missed)


def dearer(turns: Sequence[Turn]) -> float:
    """By how much prompts that are kept take longer, as a share.

    What counts is the median over the turns of the first prompt of a turn, of the second ...: one during which others used the machine
    weighs no more than any other.
    """
    kept, other = (float(np.median([spent.seconds for spent in side], axis=0).sum()) for side in zip(*turns, strict=True))
    return kept / other - 1


def dearer_in_cpu(turns: Sequence[Turn]) -> float:
    """The same of CPU seconds."""
    kept, other = (float(np.median([spent.cpu_s for spent in side])) for side in zip(*turns, strict=True))
    return kept / other - 1


def error_of_dearer(turns: Sequence[Turn]) -> float:
    """One standard error of `dearer`: how much it varies if turns are drawn from these again and again."""
    random = np.random.default_rng(0)
    return float(np.std([dearer([turns[i] for i in random.integers(len(turns), size=len(turns))]) for _ in range(RESAMPLES)]))


def told(answers: Sequence[Answer]) -> str:
    """Seconds, and how many requests are left out of them."""
    missed = sum(answer.missed for answer in answers)
    return f"{first_s(answers):.3f}" + (f" ({missed} of {len(answers)} missed)" if missed else "")


def outcome(found: Seen) -> str:
    """What a system showed, for those who wait for the rest."""
    said = []
    for workload in WORKLOADS:
        cases = [f"{ANSWERS[case]} {told(found.answers[workload, case])}" for case in CASES if (workload, case) in found.answers]
        said += [f"{workload}: {', '.join(cases)} s"] if cases else []
    if found.no_reuse:
        said.append(f"without reuse {dearer(found.no_reuse):+.1%} (one standard error: {error_of_dearer(found.no_reuse):.1%})")
    return "; ".join(said)


def rows(seen: dict[str, Seen]) -> list[Row]:
    """Rows of what was seen."""
    peers = [found for name, found in seen.items() if SYSTEMS[name].connector is not None and not name.startswith("kvtier")]
    own = seen["plain"].answers.get(("documents", "own")) if "plain" in seen else None
    smallest = min((peer.disk_bytes for peer in peers if peer.disk_bytes), default=None)
    made = []
    for name, found in seen.items():
        title = f"engines.{name}"
        for (workload, case), answers in found.answers.items():
            row = f"{title}.{workload}.{case}"
            if missed := sum(answer.missed for answer in answers):
                made.append(Row(f"{row}.missed", missed, "requests"))
            if missed == len(answers):
                continue
            made.append(Row(row, first_s(answers), "s", first_s(own) if own and workload == "documents" else None))
            made.append(Row(f"{row}.p95", percentile(found_s(answers), 0.95), "s"))
            if case != "cold":
                made.append(Row(f"{row}.hit_tokens", min(answer.cached_tokens for answer in answers), "tokens"))
            theirs = [peer.answers[workload, case] for peer in peers if found_s(peer.answers.get((workload, case), ()))]
            if name.startswith("kvtier") and theirs:
                made.append(Row(f"{row}.to_peer", to_fastest(answers, theirs), "ratio"))
        for workload, tokens in found.tokens.items():
            made.append(Row(f"{title}.{workload}.tokens", tokens / found.seconds[workload], "tokens/s"))
            made.append(Row(f"{title}.{workload}.cpu", found.cpu_s[workload], "s"))
        if found.disk_bytes:
            made.append(Row(f"{title}.disk_bytes", found.disk_bytes, "bytes", smallest))
        if found.no_reuse:
            made.append(Row(f"{title}.no_reuse", dearer(found.no_reuse), "share"))
            made.append(Row(f"{title}.no_reuse.error", error_of_dearer(found.no_reuse), "share"))
            made.append(Row(f"{title}.no_reuse.cpu", dearer_in_cpu(found.no_reuse), "share"))
    return made


def plot(rows: Sequence[Row], path: Path) -> None:
    """Seconds to the first token: a panel per workload, a group of bars per case, a bar per system. MissingExtra without matplotlib."""
    with needing("report", "--plot", "matplotlib"):
        from matplotlib.figure import Figure
    value = {row.name: row.value for row in rows}
    workloads = [name for name in WORKLOADS if any(f".{name}." in row for row in value)]
    systems = [name for name in SYSTEMS if any(row.startswith(f"engines.{name}.") for row in value)]
    figure = Figure(figsize=(9, 1 + 2.4 * max(1, len(workloads))), layout="constrained")
    panels = figure.subplots(max(1, len(workloads)), squeeze=False)[:, 0]
    width = 0.8 / len(systems)
    for axes, workload in zip(panels, workloads, strict=False):
        for place, system in enumerate(systems):
            bars = [(number, value.get(f"engines.{system}.{workload}.{case}")) for number, case in enumerate(CASES)]
            there = [(number + (place + 0.5) * width - 0.4, seconds) for number, seconds in bars if seconds is not None]
            axes.bar([x for x, _ in there], [seconds for _, seconds in there], width, label=system)
        axes.set_xticks(range(len(CASES)), [ANSWERS[case] for case in CASES])
        axes.set(title=workload, yscale="log", ylabel="s to the first token")
    panels[0].legend(fontsize="small")
    figure.savefig(path)
