"""vLLM's tiered offloading without a GPU: its own spec refuses CPUs, so this one copies rows with torch. For benchmarks and tests."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class RowCopier(OffloadingWorker):  # type: ignore[misc]
    """Copies blocks between the engine's cache and rows of the CPU tier, one block a chunk, one KV group."""

    def __init__(self, kv_caches: CanonicalKVCaches, region: SharedOffloadRegion) -> None:
        self._region = region
        self._pool = ThreadPoolExecutor(1)
        self._jobs: dict[int, Future[tuple[int, float]]] = {}
        self._device = [each.tensor.view(each.tensor.shape[0], -1) for each in kv_caches.tensors]
        self._host = [region.create_next_worker_view(each.page_size_bytes) for each in kv_caches.tensors]

    def _start(self, job_id: int, sources: list[torch.Tensor], source: Any, targets: list[torch.Tensor], target: Any) -> bool:
        taken, given = (torch.as_tensor(spec.block_ids.astype("int64")) for spec in (source, target))

        def copy() -> tuple[int, float]:
            start = time.perf_counter()
            for one, other in zip(sources, targets, strict=True):
                other[given] = one[taken]
            return len(taken) * sum(one.shape[1] for one in sources), time.perf_counter() - start

        self._jobs[job_id] = self._pool.submit(copy)
        return True

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._start(job_id, self._device, src_spec, self._host, dst_spec)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._start(job_id, self._host, src_spec, self._device, dst_spec)

    def get_finished(self) -> list[TransferResult]:
        ended = [job_id for job_id, job in self._jobs.items() if job.done()]
        return [TransferResult(job_id, True, *self._jobs.pop(job_id).result()) for job_id in ended]

    def wait(self, job_ids: set[int]) -> None:
        for job_id in job_ids & self._jobs.keys():
            self._jobs[job_id].result()

    def shutdown(self) -> None:
        self._pool.shutdown()
        self._device, self._host = [], []
        self._region.cleanup()


class CpuTieringSpec(TieringOffloadingSpec):  # type: ignore[misc]
    """vLLM's tiers with a worker for CPUs."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if not self._worker:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker: OffloadingWorker | None = RowCopier(kv_caches, region)
        return self._worker
