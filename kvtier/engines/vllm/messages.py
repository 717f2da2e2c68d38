"""What scheduler and workers tell each other, once per step. Plain data: it crosses process borders.

A worker is known by its rank among all workers of the engine; each keeps its own part of every page.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvtier.keys import PageKey


@dataclass
class StoreJob:
    """Pages to keep: they follow each other, the first one at `depth` after the page `before`; `blocks` hold them once the step is done."""

    number: int
    keys: list[PageKey]
    before: PageKey
    depth: int
    blocks: list[int]


@dataclass
class LoadJob:
    """Pages to bring into `blocks`, for a request that waits for them."""

    request_id: str
    keys: list[PageKey]
    blocks: list[int]
    within_s: float
    """As long as it waits for them: what has not come by then is computed."""


@dataclass
class StepPlan(KVConnectorMetadata):  # type: ignore[misc]
    """Scheduler to workers, before a step."""

    generation: int
    """Grows when everything cached has become wrong (`reset_cache`): a worker that sees a new one clears its cache first."""
    stores: list[StoreJob] = field(default_factory=list)
    loads: list[LoadJob] = field(default_factory=list)
    overwritten: list[int] = field(default_factory=list)
    """Store jobs whose blocks this step overwrites: they copy them now or give up."""
    levels: bool = False
    """Whether the workers are to say how full their tiers are."""


@dataclass
class LoadDone:
    """A load that ended: `pages` of it came, after `seconds` from when it was told."""

    request_id: str
    pages: int
    seconds: float
    late: bool = False
    """Whether the others were given up because they took too long."""


@dataclass
class RankReport:
    """One worker to the scheduler, after a step."""

    generation: int
    masks: dict[PageKey, int] = field(default_factory=dict)
    """Pages whose copies changed; bit t is set where tier t has a copy. No bit: the page is gone."""
    stored: list[int] = field(default_factory=list)
    """Store jobs that ended, kept or not."""
    loads: list[LoadDone] = field(default_factory=list)


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """What all workers report, by rank."""

    ranks: dict[int, RankReport]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerReport:
        """Both together; the ranks differ."""
        return WorkerReport(self.ranks | other.ranks)


@dataclass
class Hello(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """One worker to the scheduler, at start."""

    rank: int
    tiers: list[str]
    page_bytes: list[int]
    """Encoded bytes of a page in each tier."""
    report: RankReport
