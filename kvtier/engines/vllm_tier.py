"""kvtier's disk tier behind the CPU tier of vLLM's own offloading, named in its configuration; vLLM is not patched.

    "secondary_tiers": [{"type": "KvtierTier", "module_path": "kvtier.engines.vllm_tier", "disk.path": ..., "disk.capacity_bytes": ...}]

All methods run in the scheduler's thread and only look or submit; the store's workers move bytes between the CPU tier's memory and the
disk. To formats without loss chunks are opaque; others have to know what is inside (`vllm_blocks.py`) and are refused where nobody does.
Written for vLLM 0.32 (`vllm.v1.kv_offload.tiering`, which vLLM calls experimental).
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvtier.blocks import BlockStore, Chain, Presence, loses_bits
from kvtier.engines.settings import store_config
from kvtier.engines.versions import require_engine
from kvtier.engines.weights import given_name, only_revision
from kvtier.tiers.lent import BlockLayout

require_engine("vllm")

from vllm.v1.core.kv_cache_utils import DEFAULT_NONE_HASH_SEED, get_none_hash_seed  # noqa: E402  # after the check
from vllm.v1.kv_offload.base import (  # noqa: E402
    LookupResult,
    Medium,
    OffloadingSpec,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    get_offload_group_idx,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob  # noqa: E402

from kvtier.engines.vllm_blocks import known_blocks  # noqa: E402
from kvtier.engines.vllm_requests import chunks_before  # noqa: E402

log = logging.getLogger(__name__)


def warn_of_random_names(path: object) -> None:
    """One line if vLLM names chunks by hashes that begin with a seed of this process alone: a store in `path` outlives them."""
    if get_none_hash_seed() not in (DEFAULT_NONE_HASH_SEED, os.environ.get("PYTHONHASHSEED")):
        log.warning(
            "kvtier: what this engine keeps in %s is found by no other, nor after a restart: with this --prefix-caching-hash-algo vLLM "
            "hashes from a random seed. Set PYTHONHASHSEED to the same number for every engine, or leave the algorithm at sha256",
            path,
        )


@dataclass(frozen=True)
class _Job:
    """A job of vLLM under way: its keys in the order of what the futures will say."""

    keys: tuple[OffloadKey, ...]
    parts: tuple[Future[list[bool]], ...]
    is_load: bool
    started_s: float


@dataclass(frozen=True)
class _Begun:
    """What keys began with when a request came; kept in the request's own scratch space."""

    prefix: bytes


class KvtierTier(SecondaryTierManager):  # type: ignore[misc]  # vLLM is not there when types are checked
    """Chunks in a `kvtier.blocks.BlockStore`. `settings`: kvtier's dotted keys, and `config` (`store_config`).

    Model, weights, dtype, layers, block sizes, layout and parallel sizes are part of every key. What does not verify when it is read is
    reported as a failed load, and vLLM computes it again. Raises what `BlockStore` and `only_revision` raise.
    """

    medium: ClassVar[Medium] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        **settings: Any,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        config = offloading_spec.config
        self._rows: NDArray[np.uint8] | None = np.asarray(primary_kv_view)
        self._chunk_tokens = [tokens * config.cache.blocks_per_chunk for tokens in offloading_spec.tokens_per_block]
        own = store_config(settings)
        facts = {
            "engine": "vllm",
            "model": given_name(config.model.name),
            "revision": own.model.revision or only_revision(config.model.name),
            "dtype": str(config.model.dtype),
            "groups": [[group.tokens_per_block, *group.layer_names] for group in config.groups],
            "blocks_per_chunk": config.cache.blocks_per_chunk,
            "tokens_per_hash": config.cache.tokens_per_hash,
            "layout": config.kv_cache_layout,
            "canonical": config.canonical_layout,
            "replicated": config.replicated_layout,
            "parallel": [getattr(config.parallel, f"{axis}_size") for axis in ("world", "tp", "pp", "pcp", "dcp")],
        }
        size = self.block_size_bytes
        blocks = known_blocks(config, size) if loses_bits(own) else BlockLayout.opaque(size)
        self._store = BlockStore(own, blocks, facts)
        self._jobs: dict[int, _Job] = {}
        self._seed_unseen = True
        self._prefix = b""
        """What keys in the store begin with: nothing, until a reset after which nobody knows whose weights computed what."""

    @property
    def store(self) -> BlockStore:
        """The store behind this tier, for its `stats`."""
        return self._store

    # -- what vLLM asks --------------------------------------------------------------------------------------------------------

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        presence = self._store.lookup(self._names([key]))[0]
        return {Presence.READY: LookupResult.HIT, Presence.COMING: LookupResult.RETRY, Presence.ABSENT: LookupResult.MISS}[presence]

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        self._store.touch(self._names(keys))

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        if self._seed_unseen:  # vLLM makes its tiers before it chooses the seed
            self._seed_unseen = False
            warn_of_random_names(self._store.stats()["disk"]["path"])
        req_context.set_state(_Begun(self._prefix))
        return RequestOffloadingContext()

    # -- what vLLM has moved ---------------------------------------------------------------------------------------------------

    def submit_store(self, job_metadata: TransferJob) -> None:
        begun = job_metadata.req_context.get_state(_Begun) or _Begun(b"")
        if begun.prefix != self._prefix:  # computed in part before a reset, perhaps by other weights
            self._start(job_metadata.job_id, [], [], is_load=False)
            return
        chunks = dict(zip(job_metadata.keys, job_metadata.chunk_ids.tolist(), strict=True))
        runs = list(self._runs(list(chunks), job_metadata.req_context))
        parts = [self._store.submit_put(self._names(keys), self._memory([chunks[key] for key in keys]), chain) for keys, chain in runs]
        self._start(job_metadata.job_id, [key for keys, _ in runs for key in keys], parts, is_load=False)

    def submit_load(self, job_metadata: TransferJob) -> None:
        keys = list(job_metadata.keys)
        coming = self._store.submit_get(self._names(keys), self._memory(job_metadata.chunk_ids.tolist()))
        self._start(job_metadata.job_id, keys, [coming], is_load=True)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        ended = [job_id for job_id, job in self._jobs.items() if all(part.done() for part in job.parts)]
        return [self._result(job_id, self._jobs.pop(job_id)) for job_id in ended]

    def drain_jobs(self) -> None:
        """vLLM asks for this when it resets its cache, and for nothing else, and does so when weights were changed in memory, of which it
        says nothing: what is in the store by now is left to the next engine, and what comes is for this one alone."""
        self._store.drain()
        self._prefix = uuid.uuid4().bytes

    def shutdown(self) -> None:
        """Write what is queued, close the store, and let go of the CPU tier's memory."""
        self._store.drain()
        self._store.close()
        self._jobs.clear()
        self._rows = None

    # -- inside ----------------------------------------------------------------------------------------------------------------

    def _names(self, keys: Iterable[OffloadKey]) -> list[bytes]:
        return [self._prefix + key for key in keys]

    def _memory(self, chunk_ids: Sequence[int]) -> list[NDArray[np.uint8]]:
        assert self._rows is not None  # vLLM submits nothing after `shutdown`
        return [self._rows[chunk] for chunk in chunk_ids]

    def _start(self, job_id: int, keys: Sequence[OffloadKey], parts: Sequence[Future[list[bool]]], is_load: bool) -> None:
        self._jobs[job_id] = _Job(tuple(keys), tuple(parts), is_load, time.monotonic())

    def _result(self, job_id: int, job: _Job) -> JobResult:
        done = [each for part in job.parts for each in part.result()]
        good = tuple(key for key, each in zip(job.keys, done, strict=True) if each)
        return JobResult(
            job_id=job_id,
            success=all(done),
            successful_keys=good if job.is_load and good and not all(done) else None,
            transfer_time=time.monotonic() - job.started_s,
            transfer_bytes=len(good) * self.block_size_bytes,
        )

    def _runs(self, keys: Sequence[OffloadKey], req_context: ReqContext) -> Iterator[tuple[list[OffloadKey], Chain | None]]:
        """The keys in runs that follow each other, each with its place in the sequence; those whose place nobody knows at the end."""
        before, wanted = chunks_before(req_context), set(keys)
        run: list[OffloadKey] = []
        chain: Chain | None = None
        for key in before:
            if key not in wanted:
                continue
            wanted.discard(key)
            if run and before[key] != run[-1]:
                yield run, chain
                run = []
            if not run:
                chain = self._place(key, before[key], req_context)
            run.append(key)
        if run:
            yield run, chain
        if wanted:
            yield [key for key in keys if key in wanted], None

    def _place(self, key: OffloadKey, before: OffloadKey | None, req_context: ReqContext) -> Chain | None:
        """Where a chunk stands in its sequence; None where what is just before it is not known (sliding windows leave gaps)."""
        step, end = self._chunk_tokens[get_offload_group_idx(key)], req_context.get_offload_key_position(key)
        if end == step:
            return Chain(None, 0)
        if before is None or req_context.get_offload_key_position(before) != end - step:
            return None
        return Chain(self._prefix + before, end // step - 1)
