"""What this machine is, for reports: nobody should compare figures without it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path


def describe_machine() -> dict[str, object]:
    """CPU model, usable cores, memory in bytes, GPU names, and the versions that matter."""
    import torch

    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kvtier": version("kvtier"),
    }


def last_level_cache_bytes() -> int:
    """Bytes of the largest cache the first usable core has a share in; 8 MiB where the system does not say."""
    core = min(os.sched_getaffinity(0))
    sizes = []
    for entry in Path(f"/sys/devices/system/cpu/cpu{core}/cache").glob("index*/size"):
        text = entry.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]] if text[-1:] in "KMG" else int(text))
    return max(sizes, default=8 << 20)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
