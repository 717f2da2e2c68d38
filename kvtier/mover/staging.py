"""The scratch memory of the workers: how much each has, and what of a GPU goes with it. Taken once, lent for one transfer at a time.

State belongs to the `StagingPool`, its queues are safe for any thread; a `Scratch` belongs to the worker that borrowed it.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kvtier.errors import ConfigError, DeviceError
from kvtier.machine import last_level_cache_bytes
from kvtier.memory.limits import available_memory
from kvtier.memory.region import aligned_array
from kvtier.mover.crossover import Crossover
from kvtier.mover.direct import DirectRoom
from kvtier.mover.lane import Lane, LaneFormat, lane_row_bytes
from kvtier.mover.packing import Packer
from kvtier.mover.plan import pages_per_piece
from kvtier.numa.executor import worker_node
from kvtier.tiers.base import Slots, Tier
from kvtier.tiers.disk import DiskTier
from kvtier.tiers.gpu import GpuPool


@dataclass(frozen=True)
class Scratch:
    """Memory of one worker, of NUMA node `node` if it is bound: `encoded` `[pages_per_round, slot_bytes]` for payloads as a tier reads or
    writes them, page-aligned, and `pages` `[pages_per_piece, *layout.shape]` for decoded ones; its lane, where the device is a GPU, and
    its `direct` room there, where the disk tier reads straight into that."""

    encoded: NDArray[np.uint8]
    pages: torch.Tensor
    lane: Lane | None
    direct: DirectRoom | None = None
    node: int | None = None


class StagingPool:
    """Equal scratch memories for `workers` workers, together at most `total_bytes`; never less than one page each. `nodes`: those of the
    workers, where they are bound. With `spare`, so many more of the same size, for a thread that carries while all workers are at files.

    Where the first tier is a GPU, each has a lane to it, and the transfers under way are never more bytes than the lanes hold.
    """

    def __init__(self, workers: int, total_bytes: int, tiers: Sequence[Slots], nodes: Sequence[int] = (), spare: int = 0) -> None:
        layout, device = tiers[0].layout, tiers[0]
        slot_bytes = max([tier.slot_bytes for tier in tiers[1:]], default=layout.page_bytes)
        each = total_bytes // workers
        cache_bytes = last_level_cache_bytes() // workers
        piece = pages_per_piece(slot_bytes, layout.page_bytes, cache_bytes, max(1, each // 4 // layout.page_bytes))
        gpu = device if isinstance(device, GpuPool) else None
        self.lane_formats = {tier.name: LaneFormat(tier.format, layout) for tier in tiers[1:]} if gpu is not None else {}
        row_bytes = lane_row_bytes(self.lane_formats.values())
        self.pages_per_round = max(1, (each - piece * layout.page_bytes) // (slot_bytes + row_bytes))
        places: list[int | None] = [*nodes] or [None] * (workers + spare)
        _check_room(total_bytes, len(places) * (self.pages_per_round * slot_bytes + piece * layout.page_bytes))
        self.packers = {tier.name: Packer(tier) for tier in tiers if isinstance(tier, Tier)}
        self._lanes: list[Lane] = []
        self.crossover: Crossover | None = None
        """Which way lanes copy; None where there are none."""
        self._direct: list[DirectRoom] = []
        disk = next((tier for tier in tiers if isinstance(tier, DiskTier) and tier.reads_directly), None)
        self._idle: dict[int | None, queue.SimpleQueue[Scratch]] = {node: queue.SimpleQueue() for node in places}
        try:
            for node in places:
                encoded = aligned_array(self.pages_per_round * slot_bytes).reshape(self.pages_per_round, slot_bytes)
                pages = torch.from_numpy(aligned_array(piece * layout.page_bytes)).view(layout.torch_dtype).view(piece, *layout.shape)
                if gpu is not None and row_bytes:
                    self._lanes.append(Lane(gpu.accelerator, self.pages_per_round, row_bytes, workers))
                if gpu is not None and disk is not None:
                    self._direct.append(DirectRoom(gpu.accelerator, disk.slot_bytes))
                lane, direct = self._lanes[-1] if self._lanes else None, self._direct[-1] if self._direct else None
                self._idle[node].put(Scratch(encoded, pages, lane, direct, node))
            for lane in self._lanes:
                self.crossover = lane.crossover = self.crossover or lane.measure()
        except (MemoryError, ValueError, OSError, DeviceError) as error:
            self.close()
            why = str(error) if isinstance(error, DeviceError) else "more than this machine gives"
            on_gpu = ", or mover.workers, or what the device tier takes of the GPU's memory" if isinstance(error, DeviceError) else ""
            raise ConfigError(f"mover.staging_bytes is {total_bytes}, {why}; lower it{on_gpu}") from error

    def pages_in_one(self, source: Slots, target: Slots) -> int:
        """The most pages that go from one tier to another in one round: a transfer to the device is no larger."""
        if isinstance(target, GpuPool) and isinstance(source, Tier) and source.all_direct:
            return self._lanes[0].most_pages(self.lane_formats[source.name])
        return self.pages_per_round

    def close(self) -> None:
        """Give back what the GPU knows of. Safe to call twice; no transfer may be under way."""
        for lane in self._lanes:
            lane.close()
        for room in self._direct:
            room.close()
        self._lanes, self._direct = [], []

    def take(self) -> Scratch | None:
        """Scratch memory for a transfer that a thread is free for, to be given back; None where workers are on nodes, since nobody knows
        yet which of them will carry it."""
        try:
            return self._idle[None].get_nowait() if None in self._idle else None
        except queue.Empty:
            return None

    def give_back(self, scratch: Scratch) -> None:
        """End of `take`."""
        self._idle[scratch.node].put(scratch)

    @contextmanager
    def borrow(self) -> Iterator[Scratch]:
        """Scratch memory of a worker of the caller's node, given back at the end. There is one per worker, so this never waits long."""
        idle = self._idle.get(worker_node()) or next(iter(self._idle.values()))
        scratch = idle.get()
        try:
            yield scratch
        finally:
            idle.put(scratch)


def _check_room(total_bytes: int, needed_bytes: int) -> None:
    """ConfigError if so much cannot be had now: pages come when they are first touched, and whom that leads over a limit is killed."""
    room = available_memory()
    if needed_bytes > room.bytes:
        raise ConfigError(
            f"mover.staging_bytes is {total_bytes}, for which the workers take {needed_bytes} bytes, but only {room.bytes} bytes of memory "
            f"can be had: {room.why}; lower it"
        )
