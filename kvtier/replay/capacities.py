"""What a replay can be asked for, as it is written: capacities, tiers with theirs (`Layout`), names of policies.

Text becomes frozen data here or is refused in one line, before anything is replayed; `runs.py` replays it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

from kvtier.errors import KVTierError
from kvtier.policy import POLICIES, make_policy
from kvtier.policy.admission import ADMISSIONS, AUTO
from kvtier.replay.tiers import EXCLUSIVE, WRITE_BACK, WRITE_POLICIES
from kvtier.replay.trace import Trace

T = TypeVar("T")


@dataclass(frozen=True)
class Capacity:
    """A share of a trace's distinct pages, or a number of pages; `text` is how it was written."""

    text: str
    share: Fraction | None
    count: int

    @classmethod
    def parse(cls, text: str) -> Capacity:
        """From text like 5% or 1000. KVTierError if it is neither, 0 or less, or over 100 %."""
        text = text.strip()
        match = re.fullmatch(r"([0-9]+|[0-9]*\.[0-9]+)(%?)", text)
        if match is None or not Fraction(match[1]) or len(text) > 20:
            raise KVTierError(f"capacity {text!r}: expected a share of the distinct pages like 5% or a number of pages like 1000, above 0")
        number = Fraction(match[1])
        if match[2]:
            if number > 100:
                raise KVTierError(f"capacity {text}: expected at most 100%, which holds every page of the trace")
            return cls(text, number / 100, 0)
        if number.denominator != 1:
            raise KVTierError(f"capacity {text}: expected a whole number of pages, or a share like {text}%")
        return cls(text, None, int(number))

    def pages(self, trace: Trace) -> int:
        """How many pages that is: a share is rounded down, but to no less than one. KVTierError for more than the trace has."""
        if self.share is not None:
            return max(1, int(self.share * trace.distinct))
        if self.count > trace.distinct:
            raise KVTierError(f"capacity {self.text}: {trace.name} has {trace.distinct} distinct pages; expected at most as many")
        return self.count


@dataclass(frozen=True)
class Layout:
    """Tiers, warmest first: names and capacities, how pages come into those below the first, how fast they come up from there.

    `writes` and `link_bytes_per_s` have one entry for each tier below the first; no speeds: transfers are not timed.
    """

    names: tuple[str, ...]
    capacities: tuple[Capacity, ...]
    writes: tuple[str, ...]
    selective_uses: int = 2
    link_bytes_per_s: tuple[float, ...] = ()
    look_ahead_ms: tuple[float, ...] = ()
    admission: str = AUTO

    @classmethod
    def parse(
        cls,
        tiers: str,
        writes: str = WRITE_BACK,
        selective_uses: int = 2,
        link_bytes_per_s: Sequence[float] = (),
        look_ahead_ms: Sequence[float] = (),
        admission: str = AUTO,
    ) -> Layout:
        """From text like `device=1%,host=9%`, and `writes` and speeds: one for all tiers below the first, or one for each.

        KVTierError for what is not understood or does not fit together.
        """
        parts = [part.partition("=") for part in tiers.split(",")]
        names = tuple(name.strip() for name, _, _ in parts)
        if not all(names) or not all(mark for _, mark, _ in parts) or len(set(names)) < len(names):
            raise KVTierError(f"--tiers {tiers}: expected names and capacities, warmest first, like device=1%,host=9%")
        below = len(names) - 1
        entries = _for_each("--write-policy", writes.split("/"), below)
        unknown = [entry for entry in entries if entry not in WRITE_POLICIES]
        if unknown:
            raise KVTierError(f"unknown write policy {unknown[0]!r}; known: {', '.join(WRITE_POLICIES)}")
        if EXCLUSIVE in entries and set(entries) != {EXCLUSIVE}:
            raise KVTierError(f"--write-policy {writes}: exclusive tiers do not mix with others; give all of them {EXCLUSIVE}, or none")
        speeds = _for_each("--link-speed", link_bytes_per_s, below) if link_bytes_per_s else ()
        if admission not in ADMISSIONS:
            raise KVTierError(f"unknown admission {admission!r}; known: {', '.join(ADMISSIONS)}")
        capacities = tuple(Capacity.parse(capacity) for _, _, capacity in parts)
        return cls(names, capacities, entries, selective_uses, speeds, tuple(look_ahead_ms), admission)

    @property
    def text(self) -> str:
        """As it was written."""
        return ",".join(f"{name}={capacity.text}" for name, capacity in zip(self.names, self.capacities, strict=True))

    def policies(self, text: str) -> list[str]:
        """Names of the tiers' policies from text like `lru/a2cr-classic`, or one name for all. KVTierError for unknown ones."""
        return list(_for_each("--policy", [_known(name) for name in text.split("/")], len(self.names)))


def check_policies(names: Sequence[str]) -> list[str]:
    """The names, each once, `all` meaning all there are. ConfigError naming an unknown one and all known."""
    wanted = [wanted for name in names for wanted in (POLICIES if name.strip() == "all" else [_known(name)])]
    return list(dict.fromkeys(wanted))


def _known(name: str) -> str:
    make_policy(name.strip())
    return name.strip()


def _for_each(option: str, given: Sequence[T], count: int) -> tuple[T, ...]:
    if len(given) == 1:
        return tuple(itertools.repeat(given[0], count))
    if len(given) != count:
        raise KVTierError(f"{option}: {len(given)} values for {count} tiers; expected one for all or one for each")
    return tuple(given)
