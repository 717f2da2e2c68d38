"""Fetch pages to the device, or attend to them in place? Decided per request, by the load balancer of the memory manager document:

    cost in place = .5 * attention + .3 * utilisation of the cores + .2 * their share of what is queued
    cost fetching = .5 * (1 - attention) + .3 * utilisation of the device + .2 * its share of what is queued

`attention` is the share of the request's attention that goes to the pages in question: what is looked at much is worth fetching. A class
of work shifts the balance: with everything else equal, fetching wins above its threshold (the document's: .3 for creative writing, .5 for
code, .7 for simple questions). The document names queue lengths and gives them no weight; theirs here is what is left of 1.

Its costs know nothing of what the two ways take on this machine. Where that was measured (`kvtier.attention.learned`), the way that is
expected to take r times as long costs `measured_weight * ln r` more: of ways that take about as long, the load balancer chooses. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from kvtier.errors import ConfigError

Choice = Literal["fetch", "in_place"]
Mode = Literal["auto", "fetch", "in_place"]


@dataclass(frozen=True)
class Side:
    """How busy one side is: tasks `queued`, and the share of it that works, 0 to 1."""

    queued: int
    utilisation: float


@dataclass(frozen=True)
class Expected:
    """Seconds that either way is expected to take; None: not known."""

    fetch_s: float | None = None
    in_place_s: float | None = None


@dataclass(frozen=True)
class Decision:
    """`choice`, what either would cost, and the attention and the seconds it was decided with. `why` says if the costs did not decide."""

    choice: Choice
    fetch_cost: float
    in_place_cost: float
    attention: float
    why: str = ""
    expected: Expected = Expected()


@dataclass(frozen=True)
class Router:
    """The weights and, by workload class, the thresholds; one is called "default"."""

    thresholds: Mapping[str, float]
    mode: Mode = "auto"
    attention_weight: float = 0.5
    utilisation_weight: float = 0.3
    queue_weight: float = 0.2
    measured_weight: float = 7.0

    def decide(
        self,
        attention: float | None,
        cores: Side,
        device: Side,
        workload: str = "default",
        fits: bool = True,
        expected: Expected = Expected(),
    ) -> Decision:
        """`attention`: None or NaN if nobody told; then it is the threshold, and the loads decide. `fits`: whether the device has room.

        ConfigError for a workload class that is not configured.
        """
        if workload not in self.thresholds:
            known = ", ".join(sorted(self.thresholds))
            raise ConfigError(f"workload {workload!r} is not among routing.workloads: {known}; add it there, or use default")
        threshold = self.thresholds[workload]
        share = threshold if attention is None or math.isnan(attention) else min(1.0, max(0.0, attention))
        queued = cores.queued + device.queued
        in_place = self.attention_weight * share + self._load(cores, queued)
        # At a threshold of .5 this is the document's 1 - attention; others move the point where both are equal.
        fetch = self.attention_weight * (2 * threshold - share) + self._load(device, queued)
        if expected.fetch_s and expected.in_place_s:
            longer = self.measured_weight * math.log(expected.fetch_s / expected.in_place_s)
            fetch, in_place = fetch + max(0.0, longer), in_place + max(0.0, -longer)
        if self.mode != "auto":
            return Decision(self.mode, fetch, in_place, share, f"routing.mode is {self.mode}", expected)
        if not fits:
            return Decision("in_place", fetch, in_place, share, "the device has no room", expected)
        return Decision("fetch" if fetch < in_place else "in_place", fetch, in_place, share, "", expected)

    def _load(self, side: Side, queued: int) -> float:
        return self.utilisation_weight * side.utilisation + self.queue_weight * (side.queued / queued if queued else 0.0)
