"""Triton kernels in tests: interpreted or on the GPU, and compiled for a GPU that need not be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kvtier.cuda.kernels import triton_version, why_missing

CUDA = torch.device("cuda", 0)
ON_GPU = torch.cuda.is_available() and not why_missing(CUDA)
DEVICE = CUDA if ON_GPU else torch.device("cpu")
needs_triton = pytest.mark.skipif(triton_version() is None, reason="Triton is not installed or too old: its kernels are not tested")


def found_by(program: Path, cache: Path) -> dict[str, Any]:
    """What `program` prints as JSON, run in a process of its own, in which Triton does not interpret; `cache`: an empty folder."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found
