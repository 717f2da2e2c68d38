"""The scheduler's side of the connector: what to load for a request, what to store after a step. Never blocks, moves no bytes.

Decides on the mirror of what the workers hold. `requests.py` is what it knows of each request, `storing.py` what the workers store,
`steps.py` what vLLM says of a step. Pages of requests that end before they could be stored are skipped and counted. State: vLLM's scheduler
thread.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from kvtier.engines.vllm.events import Announcer
from kvtier.engines.vllm.messages import Hello, LoadJob, RankReport, StepPlan, WorkerReport
from kvtier.engines.vllm.metrics import Counts
from kvtier.engines.vllm.mirror import Mirror
from kvtier.engines.vllm.requests import Requests, RequestState
from kvtier.engines.vllm.resets import announce
from kvtier.engines.vllm.settings import Settings, for_rank
from kvtier.engines.vllm.steps import PrefillClock, fed, written
from kvtier.engines.vllm.storing import Storing
from kvtier.errors import ConfigError
from kvtier.keys import PageKey
from kvtier.pricing import Prices

LEVELS_EVERY_S = 1.0
"""A scrape comes every 10 or 15 s; a reading looks through a column of the page table."""


@dataclass
class _Loading:
    keys: Sequence[PageKey]
    pages_by_tier: list[int]


class SchedulerSide:
    """See the file's head. Method names follow `KVConnectorBase_V1`."""

    def __init__(self, settings: Settings, events: bool) -> None:
        self._settings = settings
        self._size = settings.layout.page_tokens
        self.mirror = Mirror(settings.workers)
        self.counts = Counts()
        self._announcer = Announcer(self.mirror, self._size) if events else None
        self._requests = Requests(settings)
        self._storing = Storing(self.mirror, settings.workers, self._announcer)
        self._prefills = PrefillClock(self._size)
        self._loads: list[LoadJob] = []
        self._loading: dict[str, _Loading] = {}
        self._fetching: set[PageKey] = set()
        """Pages that are being loaded: whoever wants them too finds them in vLLM's own cache in a moment."""
        self._generation = 0
        self._acknowledged = [0] * settings.workers
        self._tiers: list[str] = []
        self._page_bytes = np.zeros(1, np.int64)
        self._prices: Prices | None = None
        self._planned = 0
        """Steps planned so far."""
        self._last_store_s = 0.0
        self._levels_told_s = -math.inf

    def greet(self, hellos: dict[int, Hello]) -> None:
        """The workers are up: what they hold from an earlier run. ConfigError if they are another connector's."""
        for hello in hellos.values():
            if not isinstance(hello, Hello):
                raise ConfigError(
                    f"the kvtier connector got the greeting of another one's workers ({type(hello).__name__}): vLLM's MultiConnector hands "
                    "all its connectors the first one's; use kvtier's alone, or beside connectors whose workers greet nobody"
                )
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
        """A request whose pages may have keys: see `Requests`."""
        self._requests.begin(request)

    def matched(self, request: Any, computed: int) -> int | None:
        """Tokens to load beyond the first `computed` (whole blocks); None: ask again."""
        state = self._requests.get(request.request_id)
        if state is None or state.failed or request.skip_reading_prefix_cache or self._prices is None:
            return 0
        first, state.declined = computed // self._size, 0
        state.asked_from = first
        keys = state.keys.first(min((request.num_tokens - 1) // self._size, first + state.most_loaded))
        wanted = keys[first:]
        hits = self.mirror.prefix(wanted)
        wait = (hits and wanted[0] in self._fetching) or (hits < len(wanted) and wanted[hits] in self._storing.pages)
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
        blocks = chain.from_iterable([*written(output, self._size), *(load.blocks for load in self._loads)])
        plan = StepPlan(self._generation, [], self._loads, self._storing.overwritten(blocks), self._wants_levels())
        self._loads = []
        for request_id, computed in fed(output):
            state = self._requests.get(request_id)
            if state is not None:
                tokens = min(computed + output.num_scheduled_tokens[request_id], state.request.num_tokens)
                state.fed = min(tokens // self._size, state.most_stored)
                plan.stores += self._storing.store(state, output.kv_connector_block_state.get_block_ids(request_id)[0])
        self._planned += 1
        self._prefills.begin(output)
        if plan.stores:
            self._last_store_s = time.perf_counter()
        return plan

    def _wants_levels(self) -> bool:
        """Whether it is time for the workers to say how full their tiers are: all in the same step, so that this can be added up."""
        now_s = time.monotonic()
        wanted = now_s - self._levels_told_s >= LEVELS_EVERY_S
        if wanted:
            self._levels_told_s = now_s
        return wanted

    def finished(self, request: Any) -> None:
        """The request ended; its blocks may be given to others from now on."""
        state = self._requests.end(request.request_id)
        if state is not None and state.fed > state.stored:
            self.counts.add("skipped_pages", state.fed - state.stored, "busy")

    # -- what workers say ------------------------------------------------------------------------------------------------------

    def heard(self, report: WorkerReport | None) -> None:
        """The end of a step."""
        prefill = self._prefills.end()
        if prefill is not None and self._prices is not None:
            self._prices.computed(*prefill)
        for rank, said in (report.ranks if report is not None else {}).items():
            self._acknowledged[rank] = max(self._acknowledged[rank], said.generation)
            if said.generation == self._generation:
                self._note(rank, said.masks)
            for number in said.stored:
                self._storing.ended(rank, number)
            self._loaded(said)

    def _note(self, rank: int, masks: dict[PageKey, int]) -> None:
        for key, before, now in self.mirror.update(rank, masks):
            if self._announcer is not None:
                self._announcer.moved(key, before, now)

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

    # -- reset -----------------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Everything kept is wrong from now on; the workers hear of it with the next step, or when they are next started.

        vLLM says the same when weights have been changed in memory, and not that they were: what is kept from now on gets keys that no
        other engine has, whose weights may be those of the model's folder.
        """
        self._generation += 1
        for rank in range(self._settings.workers):
            announce(for_rank(self._settings, rank), self._generation)
        self.mirror.clear()
        if self._announcer is not None:
            self._announcer.cleared()
        self._requests.rename()

    def events(self) -> list[Any]:
        """KV events since the last call."""
        return self._announcer.taken() if self._announcer is not None else []

    @property
    def must_step(self) -> bool:
        """Whether there is something to do for an engine without requests: a worker has to hear of a reset, or has yet to say that it
        copied blocks, which nobody may take away before (an engine that sleeps frees them all). For that nobody waits for ever."""
        if any(generation < self._generation for generation in self._acknowledged):
            return True
        return bool(self._storing.jobs) and time.perf_counter() - self._last_store_s < self._settings.config.mover.patience_s
