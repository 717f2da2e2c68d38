"""`KvtierConnector`: kvtier behind vLLM's own paged cache. Loaded out of tree:

    kv_connector: KvtierConnector
    kv_connector_module_path: kvtier.engines.vllm
    kv_connector_extra_config: {"host.capacity_bytes": "8GiB", "disk.path": "/nvme/kv"}

One object per role, usually in different processes; what they do is in `scheduler.py` and `worker.py`, this file only speaks vLLM's
interface (checked against 0.32).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.logger import init_logger
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvtier.engines.vllm.messages import Hello, StepPlan, WorkerReport
from kvtier.engines.vllm.metrics import Counts, PrometheusMetrics
from kvtier.engines.vllm.scheduler import SchedulerSide
from kvtier.engines.vllm.settings import settings_of
from kvtier.engines.vllm.worker import WorkerSide

log = init_logger(__name__)

_SOURCES = {"device": CacheHitSource.HOST, "host": CacheHitSource.HOST, "disk": CacheHitSource.DISK}


class KvtierConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """See the file's head. Refuses, at start and with one message, what kvtier cannot serve (docs/vllm.md)."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        settings = settings_of(vllm_config, kv_cache_config)
        self.scheduler_side: SchedulerSide | None = None
        self.worker_side: WorkerSide | None = None
        if role == KVConnectorRole.WORKER:
            self.worker_side = WorkerSide(settings, vllm_config.parallel_config.rank)
            return
        events = vllm_config.kv_events_config
        self.scheduler_side = SchedulerSide(settings, events is not None and events.enable_kv_cache_events)
        if self._kv_transfer_config.kv_load_failure_policy != "recompute":
            log.warning(
                "kvtier: kv_load_failure_policy is %r: a request whose pages are damaged or gone ends with an error. Set it to "
                "'recompute', and vLLM computes them again.",
                self._kv_transfer_config.kv_load_failure_policy,
            )

    @property
    def _scheduler(self) -> SchedulerSide:
        if self.scheduler_side is None:
            raise RuntimeError("this is the worker's side of the kvtier connector; vLLM asked it something for the scheduler's")
        return self.scheduler_side

    @property
    def _worker(self) -> WorkerSide:
        if self.worker_side is None:
            raise RuntimeError("this is the scheduler's side of the kvtier connector; vLLM asked it something for a worker's")
        return self.worker_side

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: what is not stored is computed again."""
        return False

    # -- scheduler -------------------------------------------------------------------------------------------------------------

    def set_xfer_handshake_metadata(self, metadata: dict[int, Hello]) -> None:
        """The workers introduce themselves."""
        self._scheduler.greet(metadata)

    def on_new_request(self, request: Any) -> None:
        """A request arrived."""
        self._scheduler.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens to load, asynchronously; None: ask again."""
        tokens = self._scheduler.matched(request, num_computed_tokens)
        return tokens, bool(tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """The blocks to load into."""
        self._scheduler.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> dict[CacheHitSource, int]:
        """Where the tokens of the load just planned are."""
        found: dict[CacheHitSource, int] = {}
        for tier, tokens in self._scheduler.sources(request):
            found[_SOURCES[tier]] = found.get(_SOURCES[tier], 0) + tokens
        return found

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """What the workers do beside this step."""
        return self._scheduler.plan(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        """What the workers did."""
        self._scheduler.heard(connector_output.kv_connector_worker_meta)
        self._scheduler.received(list(connector_output.finished_recving or ()))

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """The request's blocks may be freed at once: `scheduler.py` fences those that are still read."""
        self._scheduler.finished(request)
        return False, None

    def request_finished_all_groups(self, request: Any, block_ids: tuple[list[int], ...]) -> tuple[bool, dict[str, Any] | None]:
        """As `request_finished`; there is one group."""
        return self.request_finished(request, block_ids[0])

    def take_events(self) -> Iterable[Any]:
        """KV events since the last call."""
        return self._scheduler.events()

    def has_pending_push_work(self) -> bool:
        """Whether vLLM should step though it has nothing to do, and not count itself as paused."""
        return self._scheduler.must_step

    def reset_cache(self) -> bool:
        """Forget everything, in every tier of every worker."""
        self._scheduler.reset()
        return True

    # -- worker ----------------------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """vLLM's blocks."""
        self._worker.register(kv_caches, self._vllm_config.compilation_config.static_forward_context)

    def get_handshake_metadata(self) -> Hello:
        """This worker introduces itself."""
        return self._worker.hello()

    def handle_preemptions(self, kv_connector_metadata: StepPlan) -> None:
        """Before a step overwrites blocks."""
        self._worker.before_step(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begin to load for requests that wait; none of them is in this step."""
        self._worker.start_loads(self._get_connector_metadata())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: loads are complete before a request is scheduled."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: whole blocks are stored after the step."""

    def wait_for_save(self) -> None:
        """Begin to store what the step computed; does not wait."""
        self._worker.start_stores(self._get_connector_metadata())

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """The loads that ended, whole or not."""
        self._said, finished = self._worker.report()
        return KVConnectorTransferResults(finished_recving=finished)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """The blocks that did not come."""
        return self._worker.unloaded_blocks()

    def build_connector_worker_meta(self) -> WorkerReport:
        """What the scheduler has to know."""
        return WorkerReport({self._worker.rank: self._said})

    def get_kv_connector_stats(self) -> Counts | None:
        """Counts since the last call, of either side."""
        return self.scheduler_side.counts.taken() if self.scheduler_side is not None else self._worker.taken_counts()

    def shutdown(self) -> None:
        """The engine stops."""
        if self.worker_side is not None:
            self.worker_side.close()

    # -- class -----------------------------------------------------------------------------------------------------------------

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Counts:
        """Counts as they come back from another process."""
        return Counts(data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> PrometheusMetrics:
        """Counters and gauges in vLLM's registry."""
        return PrometheusMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
