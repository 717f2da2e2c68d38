"""What the tests in real engines share: the model's folder and vLLM engines in this process. Run by `make test-engines` only.

An engine takes 12 to 30 s to start, so tests share one per module where they can; only one may run at a time in a process.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# Before vLLM is imported: engine core and worker in this process, so that tests reach into them, and one compute thread, because two that
# wait for each other at every operation take seconds per token where others use the processor too.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="session")
def model_folder() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, converted once per machine."""
    from kvtier.engines.models import packaged_model

    return packaged_model()


@contextmanager
def running(model_folder: Path, **options: Any) -> Iterator[Any]:
    """A `vllm.LLM` in this process with `options`, shut down at the end."""
    from vllm import LLM

    settings: dict[str, Any] = {
        "dtype": "bfloat16",
        "max_model_len": 4096,
        "max_num_seqs": 4,
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
        "disable_log_stats": False,
    }
    llm = LLM(str(model_folder), **(settings | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
