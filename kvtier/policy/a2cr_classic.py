"""A²CR as the source describes it: attention, frequency and recency added up, with a threshold that follows pressure.

Kept by name so that its behaviour can be had and compared. Do not use it where the hit ratio matters: with a decay of .05 to .1 per
second the recency term is gone before the usual reuse gap (a minute or two), what remains is a count that never ages, and on public
traces it loses to LRU from 5 % of the distinct blocks up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from heapq import heappop, heappush

from kvtier.errors import ConfigError, IntegrityError
from kvtier.policy.base import ROOT, Pages, Protection
from kvtier.policy.pressure import SOURCE_BANDS, PressureBand, PressureBands, require_amount, require_share
from kvtier.policy.queued import QueuedPolicy
from kvtier.policy.queues import ABSENT, NOBODY, PAGE_MASK, Entry

COUNT_CAP = 10
"""Touches that give the full frequency term, the insert included."""
ATTENTION_LEVELS = 64
"""Attention is scored in steps of 1/64: finer changes nothing that is measurable and would leave every page in a group of its own."""
ATTENTION_SMOOTHING = 0.2
"""Weight of the newest mass in a page's moving average; the first mass is taken whole. The source names no constant."""
NEUTRAL_ATTENTION = 0.5
"""Attention of a page for which none was recorded since it was inserted."""

_COUNTS = COUNT_CAP + 1
_NO_ATTENTION = math.nan


@dataclass(frozen=True)
class A2CRParameters:
    """Names and values of the source. Times are seconds, decay is per second. ConfigError for values that make no sense.

    `bands` and `hysteresis` hold when `adaptive`; otherwise `eviction_threshold` and `time_decay_factor` do, at any pressure.
    `cleanup_interval` is for the owner of the policy: how often it asks for `expired` pages.
    """

    attention_weight: float = 0.4
    frequency_weight: float = 0.3
    recency_weight: float = 0.3
    time_decay_factor: float = 0.05
    eviction_threshold: float = 0.2
    cleanup_interval: float = 60.0
    adaptive: bool = True
    bands: tuple[PressureBand, ...] = SOURCE_BANDS
    hysteresis: float = 0.05

    def __post_init__(self) -> None:
        for name in ("attention_weight", "frequency_weight", "recency_weight", "time_decay_factor", "cleanup_interval"):
            require_amount(name, getattr(self, name))
        require_share("eviction_threshold", self.eviction_threshold)
        if self.attention_weight + self.frequency_weight + self.recency_weight == 0:
            raise ConfigError("attention_weight, frequency_weight and recency_weight are all 0; at least one must be positive")
        if self.cleanup_interval == 0:
            raise ConfigError("cleanup_interval is 0; expected seconds, more than 0")
        PressureBands(self.bands, self.hysteresis)


class A2CRClassic(QueuedPolicy):
    """score = attention_weight * attention + frequency_weight * min(1, count / 10) + recency_weight * exp(-decay * age).

    Ties: the least recently used, then deeper first. A page's group is its attention level and its count; within one only age differs, so
    every group has a queue, from when it is first met. The count starts again at one when a page is inserted again. The band held is moved
    by `evict` that succeeds and by `expired`; `peek` and `score` only apply it. Each call that compares pages looks at up to 715 queues (65
    attention levels, 11 counts), however many pages there are.
    """

    name = "a2cr-classic"
    queues = 0

    def __init__(self, parameters: A2CRParameters | None = None) -> None:
        super().__init__()
        self.parameters = parameters or A2CRParameters()
        self._bands = PressureBands(self.parameters.bands, self.parameters.hysteresis)
        self._band = 0
        self._attention: list[float] = self.column(_NO_ATTENTION)
        self._groups: list[int] = []
        """Of each queue."""
        self._queues: dict[int, int] = {}
        """Of each group that was met."""
        self._merit: list[float] = []
        """What pages of each queue score without recency."""
        self._meet(_NEW_GROUP)
        # Of the choice that is being made:
        self._decay = 0.0
        self._below = math.inf
        """Pages that score this, or more, stay."""
        self._now = 0.0
        self._front: list[Entry] = []
        """A heap of (score, last use, rank): the head of every queue, and pages that were one and are no more."""
        self._last = NOBODY
        """Whose turn it was."""

    def entered(self, pages: list[int]) -> None:
        for page in pages:
            self._attention[page] = _NO_ATTENTION

    def used(self, pages: list[int]) -> None:
        for page in pages:
            group = self._groups[self.queue[page]]
            if group % _COUNTS < COUNT_CAP:
                self.move(page, self._queue_of(group + 1), 0.0, self.latest)
            else:
                self.time[page] = self.latest

    def record_attention(self, page: int, mass: float) -> None:
        if not 0 <= mass <= 1:
            raise ValueError(f"attention mass is {mass}; expected a share from 0 to 1")
        if page not in self:
            raise KeyError(page)
        before = self._attention[page]
        after = mass if math.isnan(before) else before + ATTENTION_SMOOTHING * (mass - before)
        self._attention[page] = after
        queue = self._queue_of(_group(after, self._groups[self.queue[page]] % _COUNTS))
        if queue != self.queue[page]:
            self.move(page, queue, 0.0, self.time[page])
            self._sweep_if_wasteful()

    def _queue_of(self, group: int) -> int:
        queue = self._queues.get(group)
        return self._meet(group) if queue is None else queue

    def _meet(self, group: int) -> int:
        """A queue for a group that had none."""
        parameters, (level, count) = self.parameters, divmod(group, _COUNTS)
        self._merit.append(parameters.attention_weight * level / ATTENTION_LEVELS + parameters.frequency_weight * count / COUNT_CAP)
        self._groups.append(group)
        self._queues[group] = queue = self.add_queue()
        return queue

    # -- choosing --------------------------------------------------------------------------------------------------------------

    def evict(self, count: int, protected: Protection, now: float, pressure: float) -> Pages | None:
        band = self._bands.after(self._band, pressure)
        self._decay, self._below = self._decay_in(band), math.inf
        victims = super().evict(count, protected, now, pressure)
        if victims is not None:
            self._band = band
        return victims

    def peek(self, count: int, protected: Protection, now: float, pressure: float) -> Pages:
        self._decay, self._below = self._decay_in(self._bands.after(self._band, pressure)), math.inf
        return super().peek(count, protected, now, pressure)

    def expired(self, count: int, protected: Protection, now: float, pressure: float) -> Pages:
        self._band = self._bands.after(self._band, pressure)
        adaptive, threshold = self.parameters.adaptive, self._bands.bands[self._band].eviction_threshold
        self._decay, self._below = self._decay_in(self._band), threshold if adaptive else self.parameters.eviction_threshold
        return super().peek(count, protected, now, pressure)

    def asked(self, now: float) -> None:
        self._now, self._last = now, NOBODY
        self._front.clear()
        for queue in range(len(self._groups)):
            self._offer(queue)

    def candidate(self) -> int:
        if self._last != NOBODY:
            self._offer_after(self._last)
            self._last = NOBODY
        while self._front:
            score, _, rank = self._front[0]
            page = rank & PAGE_MASK
            if self.head(self.queue[page]) == page:
                if score >= self._below:
                    break
                self._last = page
                return page
            heappop(self._front)
        return NOBODY

    def _offer_after(self, page: int) -> None:
        """`page` is out, or passed over: its queue has another head, and so may that of its parent, which may be a leaf now."""
        queue, parent = self.queue[page], self._parent[page]
        self._offer(queue)
        if parent != ROOT and self.queue[parent] not in (ABSENT, queue) and self.head(self.queue[parent]) == parent:
            self._offer(self.queue[parent])

    def _offer(self, queue: int) -> None:
        if self.head(queue) != NOBODY:
            _, time, rank = self._heaps[queue][0]
            heappush(self._front, (self._score(queue, time, self._now, self._decay), time, rank))

    # -- scoring ---------------------------------------------------------------------------------------------------------------

    def score(self, page: int, now: float, pressure: float) -> float:
        if page not in self:
            raise KeyError(page)
        decay = self._decay_in(self._bands.after(self._band, pressure))
        return self._score(self.queue[page], self.time[page], max(self.latest, now), decay)

    def _score(self, queue: int, last: float, now: float, decay: float) -> float:
        return self._merit[queue] + self.parameters.recency_weight * math.exp(-decay * (now - last))

    def _decay_in(self, band: int) -> float:
        return self._bands.bands[band].time_decay_factor if self.parameters.adaptive else self.parameters.time_decay_factor

    def check_integrity(self) -> None:
        super().check_integrity()
        for page, attention in enumerate(self._attention):
            if page in self:
                group = self._groups[self.queue[page]]
                if group != _group(NEUTRAL_ATTENTION if math.isnan(attention) else attention, group % _COUNTS):
                    raise IntegrityError(f"page {page} is in the group of another attention than its own {attention}")


def _group(attention: float, count: int) -> int:
    return int(attention * ATTENTION_LEVELS + 0.5) * _COUNTS + count


_NEW_GROUP = _group(NEUTRAL_ATTENTION, count=1)
