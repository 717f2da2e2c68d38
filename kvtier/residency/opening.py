"""From a configuration to tiers: which there are, where their threads run, and which pages those that survive a process already hold.

Used once, by `kvtier.residency`, which owns what is made here.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kvtier.config import Config
from kvtier.config.tree import DiskConfig, HostConfig
from kvtier.errors import NumaError
from kvtier.formats import get_format
from kvtier.layout import PageLayout
from kvtier.numa.binding import this_machine, usable_cpus
from kvtier.pages import ABSENT, PageTable, Rows
from kvtier.policy import A2CRParameters, PressureBand
from kvtier.tiers.base import Slots, Tier
from kvtier.tiers.device import DevicePool
from kvtier.tiers.disk import DiskTier
from kvtier.tiers.gpu import open_pool
from kvtier.tiers.host import HostTier

log = logging.getLogger(__name__)

WRITE_BACK, SELECTIVE = "write_back", "write_through_selective"


def open_tiers(config: Config, layout: PageLayout, namespace: bytes) -> tuple[DevicePool, list[Slots]]:
    """The device tier of `config`, and all tiers, warmest first. Raises what they raise, and nothing is left open then.

    A disk without room, or a store of others, is found before memory is taken, which may take long.
    """
    if config.disk is not None:
        DiskTier.check(config.disk.path, layout, get_format(config.disk.format), config.disk.capacity_bytes, namespace)
    device = open_pool(layout, config.device.capacity_bytes, config.device.place, config.device.free_memory_fraction)
    tiers: list[Slots] = [device]
    try:
        if config.host is not None:
            tiers.append(_open_host(config.host, layout, device))
        if config.disk is not None:
            tiers.append(_open_disk(config.disk, layout, namespace, device, _worker_cpus(tiers), config.mover.workers))
    except BaseException:
        close_tiers(tiers)
        raise
    return device, tiers


def _open_host(own: HostConfig, layout: PageLayout, device: DevicePool) -> HostTier:
    sizes = (layout, get_format(own.format), own.capacity_bytes)
    return HostTier(*sizes, own.mlock, own.pin, own.huge_pages, own.numa, own.numa_nodes, str(device.place), device.accelerator)


def _open_disk(own: DiskConfig, layout: PageLayout, namespace: bytes, device: DevicePool, cpus: Sequence[int], workers: int) -> DiskTier:
    sizes = (Path(own.path), layout, get_format(own.format), own.capacity_bytes)
    disk = DiskTier(*sizes, namespace, own.durability, own.io_engine, own.io_depth, cpus=cpus, gpu=device.accelerator, decoders=workers)
    disk.compress = own.compress
    return disk


def close_tiers(tiers: Sequence[Slots]) -> None:
    """Close them, coldest first."""
    for tier in reversed(tiers):
        tier.close()


def worker_nodes(tiers: Sequence[Slots]) -> tuple[int, ...]:
    """The NUMA nodes of the memory that workers and storage threads read and write; none where that is not known."""
    return next((tier.worker_nodes for tier in tiers if isinstance(tier, HostTier)), ())


def _worker_cpus(tiers: Sequence[Slots]) -> tuple[int, ...]:
    """The CPUs of those nodes that this process may use."""
    try:
        return tuple(sorted({cpu for node in worker_nodes(tiers) for cpu in usable_cpus(node, this_machine())}))
    except NumaError as error:
        log.warning("storage threads run anywhere: %s", error)
        return ()


def write_policies(config: Config) -> list[str]:
    """Per tier, the write policy by which pages come into it from the tier above; of the first, where engines write, "write_back"."""
    return [WRITE_BACK, *(section.write_policy for section in (config.host, config.disk) if section is not None)]


def recover(tier: Tier, index: int, table: PageTable) -> Rows:
    """The rows of the copies that `tier`, the table's tier `index`, kept from an earlier process; READY in the table from now on."""
    found = []
    for slot, page in tier.recover():
        row = table.add(page)
        if table.state[index, row] != ABSENT:
            tier.free([slot])
            continue
        table.begin([row], index, [slot])
        table.commit([row], index)
        found.append(row)
    return np.array(found, np.int64)


def policy_parameters(config: Config) -> A2CRParameters:
    """What the configuration says to the A²CR family."""
    policy = config.policy
    bands = tuple(PressureBand(band.above, band.eviction_threshold, band.time_decay_factor) for band in policy.bands)
    return A2CRParameters(
        policy.attention_weight,
        policy.frequency_weight,
        policy.recency_weight,
        policy.time_decay_factor,
        policy.eviction_threshold,
        policy.cleanup_interval,
        policy.adaptive,
        bands,
        policy.hysteresis,
    )
