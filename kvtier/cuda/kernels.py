"""Whether Triton kernels can run on a device, tried once, and why not. Importing this file needs no Triton; no state but what was found."""

from __future__ import annotations

import importlib
import re
import subprocess
from functools import lru_cache

import numpy as np
import torch

OLDEST_TRITON = (3, 6)
OLDEST_ARCHITECTURE = (8, 0)
"""Compute capability of the oldest GPUs that Triton compiles for: Ampere."""


@lru_cache(maxsize=16)
def why_missing(device: torch.device) -> str:
    """One line: why there are no Triton kernels for that device and what to do; empty if there are."""
    if device.type != "cuda" or torch.version.cuda is None:
        what = "torch is built without CUDA" if torch.version.cuda is None else f"this is a device of type {device.type}"
        return f"they run on NVIDIA GPUs, and {what}; what is in CPU memory is worked on there"
    problem = _triton_problem()
    if problem:
        return problem
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST_ARCHITECTURE:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {found[0]}.{found[1]}; Triton needs 8.0 (Ampere) or newer; torch does the work, slower"
    refused = _tried(device)
    if refused:
        needs = "it needs a C compiler, Python's headers and a folder to write to (TRITON_CACHE_DIR)"
        return f"Triton {triton_version()} cannot launch a kernel on {device}: {refused}; {needs}; torch does the work, slower"
    return ""


def _tried(device: torch.device) -> str:
    """One line: why a kernel that copies 16 bytes cannot be launched there; empty if it can."""
    from kvtier.cuda.copy_kernel import copy_all  # which imports Triton

    try:
        memory = torch.zeros(32, dtype=torch.uint8, device=device)
        source = np.array([memory.data_ptr()], np.int64)
        copy_all(source + 16, source, 16, device)
    except launch_errors() as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    return ""


@lru_cache(maxsize=1)
def _triton_problem() -> str:
    remedy = "torch does the work, several times slower; install kvtier[gpu]"
    try:
        version = importlib.import_module("triton").__version__
    except ImportError as error:
        return f"Triton is not installed or does not load ({error}); {remedy}"
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST_TRITON:
        return f"Triton {version} is older than {'.'.join(map(str, OLDEST_TRITON))}, for which the kernels are written; {remedy}"
    return ""


@lru_cache(maxsize=1)
def launch_errors() -> tuple[type[Exception], ...]:
    """What torch and, where it is there, Triton raise when work on a GPU cannot be launched or has failed.

    Triton compiles when a kernel is first launched: a compiler that fails, a folder it may not write to or load from, a libcuda that it
    does not find (which it asserts) come as what Python has for these.
    """
    if _triton_problem():
        return (RuntimeError,)
    compiling = (OSError, ImportError, AssertionError, subprocess.SubprocessError, importlib.import_module("triton.errors").TritonError)
    return (RuntimeError, *compiling)


def triton_version() -> str | None:
    """The version of Triton that is there and recent enough, or None; does not ask for a GPU."""
    return None if _triton_problem() else str(importlib.import_module("triton").__version__)
