"""The scheduler's side of the connector: what to load for a request, what to store after a step. Never blocks, moves no bytes.

Decides on the mirror of what the workers hold. Store jobs read blocks of vLLM's cache after the step that filled them; a block that vLLM
gives to somebody else before its job copied it is fenced: the job is named in that step's plan (`overwritten`). At most `MOST_STORING`
pages are being stored at a time; the others wait in their requests, and those of requests that end first are skipped and counted.
State: vLLM's scheduler thread.
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvtier.engines.vllm.events import Announcer
from kvtier.engines.vllm.keys import RequestKeys
from kvtier.engines.vllm.messages import Hello, LoadJob, RankReport, StepPlan, StoreJob, WorkerReport
from kvtier.engines.vllm.metrics import Counts
from kvtier.engines.vllm.mirror import Mirror
from kvtier.engines.vllm.resets import announce
from kvtier.engines.vllm.settings import Settings, for_rank
from kvtier.engines.weights import adapter_revision
from kvtier.keys import PageKey, root_key
from kvtier.pricing import Prices

MOST_STORING = 256
"""Pages whose blocks the workers may be asked to copy before they have copied others."""
MOST_PER_JOB = 16
"""Pages in one store job: a step that overwrites one of its blocks waits until all of them are copied."""


@dataclass
class RequestState:
    """One request in vLLM's scheduler."""

    request: Any
    keys: RequestKeys
    asked_from: int = 0
    """Pages vLLM had itself when it last asked what there is to load."""
    declined: int = 0
    """Pages that were there then and are faster to compute."""
    waited_s: float = 0.0
    """For how long it waited for pages since it was last given blocks."""
    told: tuple[int, float] | None = None
    """The step in which vLLM was told to ask again, and when, if that was its last answer."""
    late: bool = False
    """Whether it had waited too long when vLLM last asked."""
    failed: bool = False
    """Whether pages that were loaded for it did not come. vLLM asks again if none did, which must not begin anew what was waited for."""
    priced: tuple[bytes, int] = (b"", 0)
    """Where the pages were when it was last priced, and how many to load."""
    stored: int = 0
    """Pages that need no storing any more."""
    fed: int = 0
    """Pages whose blocks were full after the last step planned."""


@dataclass
class _Step:
    """A step under way: the one prefill it consists of, if it does."""

    planned_s: float
    prefill: tuple[int, int] | None


@dataclass
class _Loading:
    keys: Sequence[PageKey]
    pages_by_tier: list[int]


class SchedulerSide:
    """See the file's head. Method names follow `KVConnectorBase_V1`."""

    def __init__(self, settings: Settings, events: bool) -> None:
        self._settings = settings
        self._size = settings.layout.page_tokens
        self._namespace = settings.namespace
        self.mirror = Mirror(settings.workers)
        self.counts = Counts()
        self._announcer = Announcer(self.mirror, self._size) if events else None
        self._requests: dict[str, RequestState] = {}
        self._adapters: dict[tuple[int, str], str] = {}
        self._loads: list[LoadJob] = []
        self._loading: dict[str, _Loading] = {}
        self._fetching: set[PageKey] = set()
        """Pages that are being loaded: whoever wants them too finds them in vLLM's own cache in a moment."""
        self._keeping: set[PageKey] = set()
        """Pages that are being stored: whoever wants them can load them in a moment."""
        self._jobs: dict[int, tuple[StoreJob, set[int]]] = {}
        """Store jobs under way, and the ranks that have not ended them."""
        self._next_job = 0
        self._storing = 0
        self._last_store_s = 0.0
        self._fences: dict[int, set[int]] = {}
        """Block to the store jobs that read it."""
        self._generation = 0
        self._acknowledged = [0] * settings.workers
        self._tiers: list[str] = []
        self._page_bytes = np.zeros(1, np.int64)
        self._prices: Prices | None = None
        self._planned = 0
        """Steps planned so far."""
        self._steps: deque[_Step] = deque()
        self._last_end_s = 0.0

    def greet(self, hellos: dict[int, Hello]) -> None:
        """The workers are up: what they hold from an earlier run."""
        first = next(iter(hellos.values()))
        self._tiers = first.tiers
        self._page_bytes = np.array(first.page_bytes)
        self._prices = Prices(len(self._tiers), self._size)
        if self._announcer is not None:
            self._announcer.greet(self._tiers)
        for hello in hellos.values():
            self._note(hello.rank, hello.report.masks)

    # -- loading ---------------------------------------------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        """Requests whose prompt is not made of tokens are passed over, and those for an adapter of which nothing is known yet."""
        adapter = self._revision(request.lora_request)
        if request.prompt_embeds is None and adapter is not None:
            keys = RequestKeys(request, self._namespace, self._size, adapter, self._settings.media)
            self._requests[request.request_id] = RequestState(request, keys)

    def _revision(self, adapter: Any) -> str | None:
        """Which weights a LoRA adapter has: read when vLLM reads them, which is once, or anew if they are to be loaded in place.

        None before vLLM has fetched them from Hugging Face.
        """
        if adapter is None:
            return ""
        name = adapter.lora_int_id, adapter.lora_path
        if adapter.load_inplace or name not in self._adapters:
            revision = adapter_revision(adapter.lora_path)
            if revision is None:
                return None
            self._adapters[name] = revision
        return self._adapters[name]

    def matched(self, request: Any, computed: int) -> int | None:
        """Tokens to load beyond the first `computed` (whole blocks); None: ask again."""
        state = self._requests.get(request.request_id)
        if state is None or state.failed or request.skip_reading_prefix_cache or self._prices is None:
            return 0
        first, state.declined = computed // self._size, 0
        state.asked_from = first
        keys = state.keys.first((request.num_tokens - 1) // self._size)
        wanted = keys[first:]
        hits = self.mirror.prefix(wanted)
        wait = (hits and wanted[0] in self._fetching) or (hits < len(wanted) and wanted[hits] in self._keeping)
        self._add_wait(state)
        state.late = bool(wait or hits) and self._patience_left_s(state) <= 0
        if state.late:
            return 0
        if wait:
            state.told = self._planned, time.perf_counter()
            self.counts.add("waits")
            return None
        if not hits:
            return 0
        if self._announcer is not None:
            self._announcer.describe(request, keys, range(first, first + hits))
        worth = self._worthwhile(state, wanted[:hits], self._prices)
        state.declined = hits - worth
        return worth * self._size

    def _add_wait(self, state: RequestState) -> None:
        """vLLM asks anew: since it was told to, the request waited for pages, unless vLLM had no place for it and passed over a step."""
        if state.told is not None:
            step, told_s = state.told
            state.waited_s += time.perf_counter() - told_s if self._planned <= step + 1 else 0.0
            state.told = None

    def _patience_left_s(self, state: RequestState) -> float:
        """Seconds that the request may still wait for pages."""
        return self._settings.config.mover.patience_s - state.waited_s

    def _worthwhile(self, state: RequestState, keys: Sequence[PageKey], prices: Prices) -> int:
        """How many of these pages, which follow those vLLM has itself, to load. Priced once for as long as they stay where they are."""
        if self._settings.config.mover.restore == "always":
            return len(keys)
        first = state.asked_from
        homes = np.concatenate((np.zeros(first, np.intp), self.mirror.homes(keys)))
        if state.priced[0] != homes.tobytes():
            state.priced = homes.tobytes(), max(0, prices.pages_to_restore(homes, self._page_bytes) - first)
        return state.priced[1]

    def allocated(self, request: Any, blocks: Sequence[int], tokens: int) -> None:
        """vLLM gave the request blocks for `tokens` tokens to load, behind those it had when it asked."""
        state = self._requests.get(request.request_id)
        if state is None:
            return
        self.counts.add("declined_tokens", state.declined * self._size)
        self.counts.add("late", state.late)
        within_s = self._patience_left_s(state)
        state.declined, state.late, state.waited_s = 0, False, 0.0
        if not tokens:
            return
        first, pages = state.asked_from, tokens // self._size
        keys = state.keys.first(first + pages)[first:]
        self._loads.append(LoadJob(request.request_id, keys, list(blocks[first : first + pages]), within_s))
        pages_by_tier = np.bincount(self.mirror.homes(keys), minlength=len(self._tiers)).tolist()
        self._loading[request.request_id] = _Loading(keys, pages_by_tier)
        self._fetching.update(keys)
        for tier, count in zip(self._tiers, pages_by_tier, strict=True):
            self.counts.add("hit_tokens", count * self._size, tier)

    def sources(self, request: Any) -> list[tuple[str, int]]:
        """The tiers that the load just planned comes from, and tokens from each."""
        loading = self._loading.get(request.request_id)
        if loading is None:
            return []
        return [(tier, pages * self._size) for tier, pages in zip(self._tiers, loading.pages_by_tier, strict=True) if pages]

    # -- storing ---------------------------------------------------------------------------------------------------------------

    def plan(self, output: Any) -> StepPlan:
        """What the workers do beside this step."""
        overwritten: set[int] = set()
        for blocks in self._written(output):
            for block in blocks:
                overwritten |= self._fences.get(block, set())
        plan = StepPlan(self._generation, [], self._loads, sorted(overwritten))
        self._loads = []
        for request_id, computed in self._fed(output):
            state = self._requests.get(request_id)
            if state is not None:
                tokens = min(computed + output.num_scheduled_tokens[request_id], state.request.num_tokens)
                state.fed = tokens // self._size
                self._store(state, output.kv_connector_block_state.get_block_ids(request_id)[0], plan.stores)
        self._planned += 1
        self._steps.append(_Step(time.perf_counter(), self._prefill(output)))
        if plan.stores:
            self._last_store_s = self._steps[-1].planned_s
        return plan

    def _fed(self, output: Any) -> list[tuple[str, int]]:
        """The requests of this step, and how many of their tokens had KV before it."""
        cached = output.scheduled_cached_reqs
        fresh = [(new.req_id, new.num_computed_tokens) for new in output.scheduled_new_reqs]
        return fresh + list(zip(cached.req_ids, cached.num_computed_tokens, strict=True))

    def _written(self, output: Any) -> list[Sequence[int]]:
        """Blocks that get other contents in this step, or while it lasts."""
        found: list[Sequence[int]] = [new.block_ids[0][new.num_computed_tokens // self._size :] for new in output.scheduled_new_reqs]
        cached = output.scheduled_cached_reqs
        for request_id, computed, blocks in zip(cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True):
            if blocks is not None:
                found.append(blocks[0][computed // self._size :] if request_id in cached.resumed_req_ids else blocks[0])
        found += [load.blocks for load in self._loads]
        found.append([copy.dst_block_id for copy in output.kv_cache_block_copies or ()])
        return found

    def _store(self, state: RequestState, blocks: Sequence[int], jobs: list[StoreJob]) -> None:
        """Add jobs for the request's full pages that are nowhere yet, one per run of them, as far as the bound allows."""
        if state.fed <= state.stored:
            return
        keys = state.keys.first(state.fed)
        run: list[int] = []
        for page in range(state.stored, state.fed):
            if self.mirror.holds(keys[page]) or keys[page] in self._keeping:
                self._job(state, keys, run, blocks, jobs)
                run = []
            elif self._storing + len(run) >= MOST_STORING:
                break
            else:
                run.append(page)
            state.stored = page + 1
            if len(run) == MOST_PER_JOB:
                self._job(state, keys, run, blocks, jobs)
                run = []
        self._job(state, keys, run, blocks, jobs)

    def _job(self, state: RequestState, keys: Sequence[PageKey], run: Sequence[int], blocks: Sequence[int], jobs: list[StoreJob]) -> None:
        if not run:
            return
        chosen = [keys[page] for page in run]
        job = StoreJob(self._next_job, chosen, state.keys.before(run[0]), run[0], [blocks[page] for page in run])
        self._next_job += 1
        self._jobs[job.number] = (job, set(range(self._settings.workers)))
        self._storing += len(run)
        self._keeping.update(chosen)
        if self._announcer is not None:
            self._announcer.describe(state.request, keys, run)
        for block in job.blocks:
            self._fences.setdefault(block, set()).add(job.number)
        jobs.append(job)

    def finished(self, request: Any) -> None:
        """The request ended; its blocks may be given to others from now on."""
        state = self._requests.pop(request.request_id, None)
        if state is not None and state.fed > state.stored:
            self.counts.add("skipped_pages", state.fed - state.stored, "busy")

    # -- what workers say ------------------------------------------------------------------------------------------------------

    def heard(self, report: WorkerReport | None) -> None:
        """The end of a step."""
        self._learn_prefill()
        for rank, said in (report.ranks if report is not None else {}).items():
            self._acknowledged[rank] = max(self._acknowledged[rank], said.generation)
            if said.generation == self._generation:
                self._note(rank, said.masks)
            for number in said.stored:
                self._ended(rank, number)
            self._loaded(said)

    def _note(self, rank: int, masks: dict[PageKey, int]) -> None:
        for key, before, now in self.mirror.update(rank, masks):
            if self._announcer is not None:
                self._announcer.moved(key, before, now)

    def _ended(self, rank: int, number: int) -> None:
        job, waiting = self._jobs[number]
        waiting.discard(rank)
        if waiting:
            return
        del self._jobs[number]
        self._storing -= len(job.keys)
        self._keeping.difference_update(job.keys)
        if self._announcer is not None:
            self._announcer.forget(job.keys)
        for block in job.blocks:
            self._fences[block].discard(number)
            if not self._fences[block]:
                del self._fences[block]

    def _loaded(self, said: RankReport) -> None:
        for done in said.loads:
            loading, state = self._loading.get(done.request_id), self._requests.get(done.request_id)
            self.counts.add("late", done.late)
            if loading is not None and state is not None and done.pages < len(loading.keys):
                state.failed = True
            if loading is not None and (done.late or done.pages == len(loading.keys)) and self._prices is not None:
                moved = np.array(loading.pages_by_tier) * self._page_bytes
                foreseen_s = self._prices.restore_s(moved) or 0.0
                # What was given up would have taken longer than this, which tells something only beyond what it should have taken.
                if moved[1:].any() and not (done.late and done.seconds < foreseen_s):
                    self._prices.restored(moved, done.seconds)

    def received(self, request_ids: Sequence[str]) -> None:
        """All workers ended these loads."""
        for request_id in request_ids:
            loading = self._loading.pop(request_id, None)
            if loading is not None:
                self._fetching.difference_update(loading.keys)

    # -- prices ----------------------------------------------------------------------------------------------------------------

    def _prefill(self, output: Any) -> tuple[int, int] | None:
        """(start, tokens) if this step is nothing but a piece of one prompt."""
        fed = self._fed(output)
        if len(fed) != 1 or output.num_scheduled_tokens[fed[0][0]] < self._size:
            return None
        return fed[0][1], output.num_scheduled_tokens[fed[0][0]]

    def _learn_prefill(self) -> None:
        if not self._steps:
            return
        step, now = self._steps.popleft(), time.perf_counter()
        seconds, self._last_end_s = now - max(step.planned_s, self._last_end_s), now
        if step.prefill is not None and self._prices is not None:
            self._prices.computed(*step.prefill, seconds)

    # -- reset -----------------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Everything kept is wrong from now on; the workers hear of it with the next step, or when they are next started.

        vLLM says the same when weights have been changed in memory, and not that they were: what is kept from now on gets keys that no
        other engine has, whose weights may be those of the model's folder.
        """
        self._generation += 1
        self._namespace = root_key(self._namespace, uuid.uuid4().hex)
        for rank in range(self._settings.workers):
            announce(for_rank(self._settings, rank), self._generation)
        self.mirror.clear()
        if self._announcer is not None:
            self._announcer.cleared()
        # What these computed before must not be kept under keys that stand for what is computed from now on.
        waiting = [state.request for state in self._requests.values() if not state.request.num_computed_tokens]
        self._requests.clear()
        for request in waiting:
            self.on_new_request(request)

    def events(self) -> list[Any]:
        """KV events since the last call."""
        return self._announcer.taken() if self._announcer is not None else []

    @property
    def must_step(self) -> bool:
        """Whether there is something to do for an engine without requests: a worker has to hear of a reset, or has yet to say that it
        copied blocks, which nobody may take away before (an engine that sleeps frees them all). For that nobody waits for ever."""
        if any(generation < self._generation for generation in self._acknowledged):
            return True
        return bool(self._jobs) and time.perf_counter() - self._last_store_s < self._settings.config.mover.patience_s
