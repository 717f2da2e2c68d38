"""How long a model computes a prompt, seen from inside its KV cache: from the first layer's keys to the last layer's.

One stopwatch belongs to one sequence's cache and is used by the thread that runs the model. What is missing of the last layer is made up
for in proportion. On a GPU two events are recorded and read when the result is wanted, so that nothing waits for them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

LEAST_TOKENS = 16
"""Fewer at once are decoding, which says nothing about the speed of prompts."""


@dataclass(frozen=True)
class Prefill:
    """`tokens` tokens were computed after `start` others in `seconds`."""

    start: int
    tokens: int
    seconds: float


class Stopwatch:
    """Takes the time of the first prompt that goes through `layers` layers."""

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._work: tuple[int, int] | None = None
        self._began: Any = None
        self._ended: Any = None
        self._waited_s = 0.0

    def reached(self, layer: int, start: int, tokens: int, device: torch.device) -> None:
        """The model has the keys of `layer` for `tokens` tokens after `start` others."""
        if self._ended is not None or self._layers < 2:
            return
        if layer == 0 and tokens >= LEAST_TOKENS:
            self._work, self._began, self._waited_s = (start, tokens), _moment(device), 0.0
        elif layer == self._layers - 1 and self._work == (start, tokens):
            self._ended = _moment(device)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What the model waits for in here is not computing."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waited_s += time.perf_counter() - start

    def result(self) -> Prefill | None:
        """What was measured, once: later calls give None. Waits for the GPU where the prompt is still under way."""
        if self._work is None or self._began is None or self._ended is None:
            return None
        work, seconds = self._work, _between(self._began, self._ended) - self._waited_s
        self._work = None
        return Prefill(*work, seconds * self._layers / (self._layers - 1)) if seconds > 0 else None


def _moment(device: torch.device) -> Any:
    """Now, in seconds; on a GPU an event that will know when the work before it is done."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def _between(began: Any, ended: Any) -> float:
    """Seconds between two moments of one device."""
    if isinstance(ended, float):
        return ended - float(began)
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1e3
