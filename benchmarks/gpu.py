"""What a GPU's link to the host gives kvtier, beside plain copies in the same run. Needs CUDA; first checks every format (`gpu_check.py`).

What the rows mean is said where they are measured: `copy`, `pages` and `crossover` in `gpu_copies.py`, those of formats and `launch` in
`gpu_lanes.py`, pages that come from disk in `gpu_direct.py`, `prefix` and `decode` in `gpu_serving.py`, `digest` and `sparse24` in
`gpu_kernels.py`. `FLOORS` is what the ratios ought to be. Ceilings take turns with what they are compared to.
"""

from __future__ import annotations

from pathlib import Path

from kvtier.cuda.find import find_accelerator
from kvtier.cuda.surface import Accelerator
from kvtier.errors import ConfigError, KVTierError

from . import gpu_copies, gpu_direct, gpu_kernels, gpu_lanes, gpu_serving
from .gpu_check import check as check_formats
from .gpu_timing import FULL, TINY
from .measure import Row, Run

FLOORS = {
    "pages.d2h": 0.9,
    "pages.h2d": 0.9,
    "pages.both": 0.8,
    "q8.offload": 1.6,
    "q8.restore": 1.6,
    "q4.offload": 2.4,
    "q4.restore": 2.4,
    "q8.encode": 0.6,
    "q4.encode": 0.6,
    "fp8.encode": 0.6,
}
"""The least that a ratio ought to be."""
CEILINGS = {"launch.256": 1.0, "prefix.exposed": 0.1, "decode.step": 1.03}
"""The most that a ratio ought to be."""


def measure(run: Run, accelerator: Accelerator | None = None, check: bool = True, directory: Path | None = None) -> list[Row]:
    """The rows, on `accelerator` (the current CUDA device), with files in `directory` (the system's temporary one).

    KVTierError without a GPU, or if its memory is too small, a format wrong or the disk unusable.
    """
    gpu = accelerator or find_gpu()
    sizes = TINY if run.tiny else FULL
    run.expect(8 + len(gpu_lanes.FORMATS))
    if check:
        run.step("checking every format")
        check_formats(gpu)
    run.step("plain copies and scattered pages")
    rows = gpu_copies.copies(run, gpu, sizes)
    memory_speed = {row.name: row.value for row in rows}["copy.memory"]
    rows += gpu_lanes.lanes(run, gpu, sizes, memory_speed)
    run.step("pages from disk")
    rows += gpu_direct.measure(run, gpu, sizes.layout, sizes.pages, memory_speed, directory)
    run.step("launching 256 pages")
    rows.append(gpu_lanes.launch(run, gpu))
    run.step("a long prefix, layer by layer")
    rows += gpu_serving.prefix(run, gpu, sizes)
    run.step("decoding beside an offload")
    rows.append(gpu_serving.decode_beside_offload(run, gpu, sizes))
    run.step("digests of keys")
    rows += gpu_kernels.digests(run, gpu, sizes)
    run.step("values of which half are zero")
    rows.append(gpu_kernels.sparse_product(run, gpu, sizes))
    return rows


def find_gpu() -> Accelerator:
    """The current CUDA device. KVTierError, in one line, if there is none or it cannot be used."""
    try:
        gpu = find_accelerator("cuda")
    except ConfigError as error:
        raise KVTierError(f"bench gpu needs an NVIDIA GPU: {error}") from None
    if gpu is None:
        raise KVTierError("bench gpu needs an NVIDIA GPU, and torch sees none here")
    return gpu


def note(directory: Path | None = None) -> str:
    """What is to be seen in the table, in words, and what is not."""
    least = ", ".join(f"{name} {floor:.0%}" for name, floor in FLOORS.items())
    most = ", ".join(f"{name} {limit:.0%}" for name, limit in CEILINGS.items())
    skipped = gpu_direct.why_skipped(find_gpu(), directory)
    return f"ratios to reach: {least}; not to exceed: {most}{skipped and '; '}{skipped}"


def verdict(rows: list[Row]) -> str:
    """Which floors are not met, in words."""
    missed = [row.name for row in rows if row.ratio is not None and row.ratio < FLOORS.get(row.name, 0.0)]
    missed += [row.name for row in rows if row.ratio is not None and row.ratio > CEILINGS.get(row.name, float("inf"))]
    return f"floors not met: {', '.join(missed)}" if missed else "all floors met"
