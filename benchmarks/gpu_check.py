"""Before any figure of a GPU counts: do pages come back from the host as the formats promise?

For every format, pages go device -> host -> device the way the mover carries them. What is on the host must decode, on the CPU, to the very
bits that came back; and must be no further from the pages than what the CPU's own encoding loses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from kvtier.cuda.surface import Accelerator
from kvtier.errors import KVTierError
from kvtier.formats import FORMAT_NAMES, get_format
from kvtier.layout import PageLayout
from kvtier.mover.stage import carry
from kvtier.mover.staging import StagingPool
from kvtier.mover.transfer import Move, Priority, Transfer
from kvtier.tiers.base import PageId
from kvtier.tiers.gpu import GpuPool
from kvtier.tiers.host import HostTier

FORMATS = (*FORMAT_NAMES, "q8/sparse24", "q4;0-1:q8")
LAYOUTS = (
    PageLayout(layers=4, planes=2, page_tokens=16, kv_heads=2, head_dim=128, dtype="bf16"),
    PageLayout(layers=3, planes=2, page_tokens=16, kv_heads=2, head_dim=64, dtype="fp16"),
    PageLayout(layers=2, planes=1, page_tokens=64, kv_heads=1, head_dim=256, dtype="bf16"),
)
PAGES = 6
WORSE = 1.02
"""How much more error than the CPU's encoding is still rounding: one code in a hundred one step away is far less."""


@contextmanager
def tiers_of(accelerator: Accelerator, layout: PageLayout, name: str, pages: int) -> Iterator[tuple[GpuPool, HostTier, StagingPool]]:
    """A pool of twice `pages`, a host tier in format `name`, and one worker's memory; the first `pages` slots of both are taken."""
    format = get_format(name)
    pool = GpuPool(layout, 2 * pages * layout.page_bytes, accelerator)
    host = HostTier(layout, format, pages * (format.payload_bytes(layout) + 64), mlock="off", accelerator=accelerator)
    staging = StagingPool(1, 4 * pages * layout.page_bytes + (1 << 20), [pool, host])
    pool.reserve(2 * pages)
    host.reserve(pages)
    try:
        yield pool, host, staging
    finally:
        staging.close()
        host.close()
        pool.close()


def moves_of(pages: int, target_shift: int = 0) -> tuple[Move, ...]:
    """Page i from slot i to slot i + `target_shift`; page 0 begins a sequence."""
    return tuple(Move(i, PageId(i.to_bytes(32, "big"), bytes(32), i), i, i + target_shift) for i in range(pages))


def check(accelerator: Accelerator) -> int:
    """How many combinations of format and layout were checked. KVTierError names the first that is wrong."""
    done = 0
    for layout in LAYOUTS:
        pages = torch.randn(PAGES, *layout.shape, generator=torch.Generator().manual_seed(0)).to(layout.torch_dtype)
        pages[:, :, 0, :, :, 3] *= 8  # keys have channels that are larger than others
        for name in FORMATS:
            try:
                get_format(name).payload_bytes(layout)
            except KVTierError:
                continue  # not for pages of this shape
            _check_one(accelerator, layout, name, pages)
            done += 1
    return done


def _check_one(accelerator: Accelerator, layout: PageLayout, name: str, pages: torch.Tensor) -> None:
    format = get_format(name)
    with tiers_of(accelerator, layout, name, PAGES) as (pool, host, staging):
        pool.scatter(list(range(PAGES)), pages)
        for source, target, moves in ((0, 1, moves_of(PAGES)), (1, 0, moves_of(PAGES, PAGES))):
            transfer = Transfer(source, target, moves, Priority.DEMAND, 0)
            carry(transfer, (pool, host), staging)
            if transfer.refused:
                raise KVTierError(
                    f"check: {name} of {layout}: pages are refused: {sorted({each.reason for each in transfer.refused.values()})}"
                )
        stored = host.load(list(range(PAGES)), [move.page.key for move in moves_of(PAGES)], np.empty((PAGES, 0), np.uint8))
        payloads = [payload for payload in stored if isinstance(payload, np.ndarray)]
        expected = format.decode(payloads, layout)
        came_back = pool.gather([PAGES + i for i in range(PAGES)])
    if not torch.equal(came_back.view(torch.int16), expected.view(torch.int16)):
        raise KVTierError(f"check: {name} of {layout}: what the GPU decoded is not what the CPU decodes from the same bytes")
    own = format.decode(format.encode(pages, layout, first=[0]), layout)
    lost, allowed = (float((each.double() - pages.double()).norm()) for each in (came_back, own))
    if lost > WORSE * allowed:
        raise KVTierError(f"check: {name} of {layout}: the GPU's encoding is off by {lost:.4g}, the CPU's by {allowed:.4g}")
