"""What is searched: the policy, the parameters of those that have any, and how pages come into the tiers below the first.

The optimiser knows a point as `Raw`, one entry for each choice it made; a configuration knows it as `Values`, dotted keys of
`kvtier.config`. Keys that replay cannot tell apart (time, memory, formats, clean-up by thresholds) are not here.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from kvtier.config import Config
from kvtier.config.tree import WritePolicy
from kvtier.errors import KVTierError
from kvtier.policy import A2CRClassic

Raw = dict[str, str | float | int]
Values = dict[str, object]

POLICY = "policy.name"
FREQUENCY_SHARE = "frequency share"
"""Of the weights of frequency and recency together. Their sum, and the weight of attention that no trace tells, stay as they are."""
DECAY = "policy.time_decay_factor"
WRITES: tuple[str, ...] = get_args(WritePolicy)
SELECTIVE = "write_through_selective"
LEAST_DECAY, MOST_DECAY = 1e-6, 1.0
LEAST_USES, MOST_USES = 2, 5
USUAL_WEIGHTS = 0.6
"""Of frequency and recency together, where the configuration gives neither any."""


@dataclass(frozen=True)
class Choice:
    """One of a few values."""

    values: tuple[str, ...]


@dataclass(frozen=True)
class Number:
    """A number in a range, whole or not, looked for by its logarithm or not."""

    low: float
    high: float
    whole: bool = False
    logarithmic: bool = False


@dataclass(frozen=True)
class Space:
    """`policies` to choose from; `below`, the tiers (host, disk) whose write policy is searched; `weights`, see FREQUENCY_SHARE."""

    policies: tuple[str, ...]
    below: tuple[str, ...]
    weights: float

    @classmethod
    def of(cls, config: Config, policies: Sequence[str], below: Sequence[str]) -> Space:
        """The space around a configuration. KVTierError if there is only one point in it."""
        space = cls(tuple(policies), tuple(below), config.policy.frequency_weight + config.policy.recency_weight or USUAL_WEIGHTS)
        if space.policies != (A2CRClassic.name,) and len(space.policies) == 1 and not below:
            remedy = "name more policies (--policy all), or several tiers (--tiers), whose write policies can be searched"
            raise KVTierError(f"there is nothing to search: {space.policies[0]} has no parameters; {remedy}")
        return space

    def parameters(self, chosen: Mapping[str, object]) -> dict[str, Choice | Number]:
        """What is to be chosen, given what was chosen so far: some parameters are there only if others have certain values."""
        wanted: dict[str, Choice | Number] = {POLICY: Choice(self.policies)}
        if chosen.get(POLICY) == A2CRClassic.name:
            wanted |= {FREQUENCY_SHARE: Number(0.0, 1.0), DECAY: Number(LEAST_DECAY, MOST_DECAY, logarithmic=True)}
        for tier in self.below:
            wanted[f"{tier}.write_policy"] = Choice(WRITES)
        if any(chosen.get(f"{tier}.write_policy") == SELECTIVE for tier in self.below):
            wanted["selective_uses"] = Number(LEAST_USES, MOST_USES, whole=True)
        return wanted

    def first_points(self, config: Config) -> list[Raw]:
        """Where the search begins: every policy, written down as now, then the default ways to write with the policy as it is."""
        now: Raw = {}
        for tier in self.below:
            now |= {f"{tier}.write_policy": getattr(config, tier).write_policy}
        points = [self._complete({POLICY: name, **now}) for name in self.policies]
        if self.below:
            own = config.policy.name if config.policy.name in self.policies else self.policies[0]
            for writes in itertools.product(WRITES, repeat=len(self.below)):
                chosen: Raw = {POLICY: own}
                chosen |= {f"{tier}.write_policy": entry for tier, entry in zip(self.below, writes, strict=True)}
                points.append(self._complete(chosen))
        return list({tuple(point.items()): point for point in points}.values())

    def _complete(self, chosen: Raw) -> Raw:
        """With the middle of the ranges that are left."""
        usual: Raw = {FREQUENCY_SHARE: 0.5, DECAY: 1e-3, "selective_uses": LEAST_USES}
        return {name: chosen.get(name, usual.get(name, "")) for name in self.parameters(chosen)}

    def values(self, raw: Raw) -> Values:
        """The keys of a configuration."""
        values: Values = {POLICY: raw[POLICY]}
        if raw[POLICY] == A2CRClassic.name:
            frequency = round(float(raw[FREQUENCY_SHARE]) * self.weights, 4)
            # Pressure is 1 wherever somebody must leave, so of the bands only the highest could be judged; the threshold, which lets
            # pages go while there is room, is what replay does not do, so a configuration that was judged without has none.
            values |= {
                "policy.frequency_weight": frequency,
                "policy.recency_weight": round(self.weights - frequency, 4),
                "policy.adaptive": False,
                DECAY: float(f"{float(raw[DECAY]):.3g}"),
                "policy.eviction_threshold": 0.0,
            }
        for tier in self.below:
            entry = raw[f"{tier}.write_policy"]
            values[f"{tier}.write_policy"] = entry
            if entry == SELECTIVE:
                values[f"{tier}.selective_uses"] = int(raw["selective_uses"])
        return values
