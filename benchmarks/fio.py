"""fio as a ceiling: what it makes of one file that is already there, at a block size and depth of our choice. No state.

fio and whatever is compared to it read into and write from memory of the same kind: huge pages where there are any. A disk reaches memory
piece by piece, and a block of 256 KiB is one piece of a huge page, but up to 64 of small ones, fewer where these happen to be neighbours.
In small pages the same fio on the same virtual disk gave 1.1 to 2.0 GB/s from one start to the next, in huge ones 2.2 to 2.5.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kvtier.errors import KVTierError
from kvtier.memory.region import HUGE_PAGE_BYTES

_IN_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""malloc(3) then asks for them; other C libraries ignore it."""


@dataclass(frozen=True)
class Work:
    """`io_bytes` of random I/O in blocks of `block_bytes`, `depth` at once, within the first `size_bytes` of `file`.

    `direct`: past the page cache, else cold through it.
    """

    file: Path
    operation: Literal["read", "write"]
    block_bytes: int
    depth: int
    size_bytes: int
    io_bytes: int
    direct: bool


def is_there() -> bool:
    """Whether fio is on PATH."""
    return shutil.which("fio") is not None


def run(work: Work) -> dict[str, Any]:
    """What fio says of its one job, as in its JSON. KVTierError if it fails."""
    # By its name alone, from its folder: fio takes a colon in a path for the end of one file and the beginning of another.
    command = [
        *("fio", "--name=ceiling", f"--filename={work.file.name}", f"--size={work.size_bytes}", f"--io_size={work.io_bytes}"),
        *(f"--rw=rand{work.operation}", f"--bs={work.block_bytes}", f"--iodepth={work.depth}", "--ioengine=libaio", "--thread"),
        *(f"--direct={int(work.direct)}", f"--invalidate={int(not work.direct)}", f"--iomem_align={HUGE_PAGE_BYTES}"),
        *("--randrepeat=0", "--output-format=json"),
    ]
    environment = {**os.environ, **_IN_HUGE_PAGES}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=work.file.parent, env=environment)
    except OSError as error:
        raise KVTierError(f"fio cannot be started: {error.strerror}; without fio on PATH, a bare pool is the ceiling") from None
    if done.returncode != 0:
        why = (done.stderr or done.stdout).strip().splitlines()
        raise KVTierError(f"fio failed: {why[-1] if why else done.returncode}; without fio on PATH, a bare pool is the ceiling")
    try:
        job: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    except (ValueError, LookupError, TypeError):
        said = f"{done.stdout.strip()!r:.80}"
        raise KVTierError(f"fio gave no figures but {said}; is it fio 3? without fio on PATH, a bare pool is the ceiling") from None
    return job
