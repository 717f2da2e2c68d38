"""The worker's side of the connector: its own tiered cache, and the bytes between that and vLLM's blocks.

Threads of its own carry stores and loads, so that a step waits for neither. A store job copies its blocks into the staging area, from
where the cache writes them down; a load copies pages into the blocks of a request that waits, for as long as that may wait.
Loads of pages that are all in host memory have a thread to themselves: they do not queue behind those that wait for a disk, and hand what
has gone there meanwhile over to the thread for those. A step that overwrites blocks of a store job makes it copy now what there is room for
at once, and give up the rest: it waits for a copy, but for no disk. Blocks of one job are touched by one thread.
State: vLLM's worker thread, but for what says otherwise.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from vllm.logger import init_logger

from kvtier.cache import TieredKVCache
from kvtier.cuda.find import find_accelerator
from kvtier.cuda.surface import Accelerator, Event
from kvtier.engines.vllm.layouts import BlockPages, matching, readings
from kvtier.engines.vllm.messages import Hello, LoadDone, LoadJob, RankReport, StepPlan, StoreJob
from kvtier.engines.vllm.metrics import Counts
from kvtier.engines.vllm.resets import carried_out, pending
from kvtier.engines.vllm.settings import Settings, for_rank
from kvtier.errors import LayoutError
from kvtier.leases.keyed import KeyedPages

log = init_logger(__name__)

_STORE_FAILED = "kvtier: a store failed; its pages are not kept"


class Keeping:
    """A store job on its way. Whoever `claim`s it first, the store thread or a step that overwrites its blocks, carries it out."""

    def __init__(self, job: StoreJob, ready: Event | None) -> None:
        self.job = job
        self.ready = ready
        """Reached once the blocks hold what they should; None on CPUs."""
        self.copied = threading.Event()
        """Set once nobody reads the blocks any more."""
        self.enough: Future[None] = Future()
        """Done once nobody may wait for room any more."""
        self._lock = threading.Lock()
        self._claimed = False

    def hurry(self) -> None:
        """Keep what there is room for, and come to an end."""
        with self._lock:
            if not self.enough.done():
                self.enough.set_result(None)

    def claim(self) -> bool:
        """Whether the caller is the first."""
        with self._lock:
            first, self._claimed = not self._claimed, True
        return first


class WorkerSide:
    """See the file's head. Opens the tiers of `rank`: raises what `TieredKVCache` raises."""

    def __init__(self, settings: Settings, rank: int) -> None:
        self.rank = rank
        self.counts = Counts()
        self.cache = TieredKVCache(for_rank(settings, rank), settings.layout)
        if left := pending(self.cache.config):
            log.info("kvtier: the last engine on this store was reset just before it ended; what it kept is dropped")
            self.cache.clear()
            carried_out(self.cache.config, left[-1])
        self._pages: KeyedPages = self.cache.by_key()
        self._blocks: BlockPages | None = None
        self._gpu: Accelerator | None = None
        self._generation = 0
        self._storer = ThreadPoolExecutor(1, "kvtier-store")
        self._near_loader = ThreadPoolExecutor(1, "kvtier-load")
        self._far_loader = ThreadPoolExecutor(1, "kvtier-load-far")
        self._keeping: dict[int, tuple[Keeping, Future[None]]] = {}
        self._loads: list[tuple[LoadJob, Future[LoadDone]]] = []
        self._unloaded: set[int] = set()
        self._counting = threading.Lock()
        """Over `counts`, which the threads add to."""
        self._levels_wanted = False
        self._told = {"evicted": dict[str, int](), "refused": dict[str, int]()}

    def register(self, tensors: dict[str, torch.Tensor], layers: dict[str, Any]) -> None:
        """vLLM's blocks, by layer, and its attention layers. LayoutError if kvtier cannot tell what they hold."""
        layout = self.cache.layout
        shapes = {(tuple(tensor.shape), tensor.dtype) for tensor in tensors.values()}
        if len(shapes) != 1 or len(tensors) != layout.layers:
            raise LayoutError(f"vLLM's {len(tensors)} KV tensors differ: {shapes}; kvtier expected {layout.layers} alike")
        name, tensor = next(iter(tensors.items()))
        expected = (layout.kv_heads, layout.page_tokens, 2 * layout.head_dim)
        if tuple(tensor.shape[1:]) != expected or tensor.dtype != layout.torch_dtype:
            raise LayoutError(
                f"vLLM's KV blocks are {tensor.dtype} {list(tensor.shape[1:])}; expected {layout.torch_dtype} {list(expected)}"
            )
        reading = probe(tensor, layers[name], layout.head_dim)
        self._blocks = BlockPages([readings(tensor, layout.head_dim)[reading] for tensor in tensors.values()])
        self._gpu = find_accelerator(str(tensor.device))
        log.info("kvtier: %d blocks of %s, inside them %s", tensor.shape[0], layout, reading)

    # -- steps -----------------------------------------------------------------------------------------------------------------

    def before_step(self, plan: StepPlan) -> None:
        """What must be over before blocks are overwritten."""
        if plan.generation > self._generation:
            self._clear(plan.generation)
        for number in plan.overwritten:
            if number in self._keeping:
                keeping, _ = self._keeping[number]
                keeping.hurry()
                try:
                    self._keep(keeping)
                except Exception as error:  # an exception here would end the engine
                    log.error(_STORE_FAILED, exc_info=error)
                keeping.copied.wait()

    def start_loads(self, plan: StepPlan) -> None:
        """Begin to load; never waits. The first that is heard of every plan."""
        self._levels_wanted |= plan.levels
        for load in plan.loads:
            done: Future[LoadDone] = Future()
            self._loads.append((load, done))
            near = not self._pages.any_far(load.keys)
            (self._near_loader if near else self._far_loader).submit(self._load, load, time.monotonic(), done, near)

    def start_stores(self, plan: StepPlan) -> None:
        """Begin to store what the step, which is over or queued on the device, computed."""
        ready = None
        if plan.stores and self._gpu is not None:
            ready = self._gpu.engine_stream().record()
        for job in plan.stores:
            keeping = Keeping(job, ready)
            self._keeping[job.number] = (keeping, self._storer.submit(self._keep, keeping))

    def _keep(self, keeping: Keeping) -> None:
        """Carry out a store job, unless somebody else does. On the store thread, or in a step that hurries it."""
        if not keeping.claim():
            return
        job, began, kept = keeping.job, time.perf_counter(), 0
        assert self._blocks is not None
        blocks = self._blocks

        def fill(positions: Sequence[int], slots: Sequence[int]) -> None:
            for position, slot in zip(positions, slots, strict=True):
                blocks.read(job.blocks[position], self._pages.slot(slot))

        try:
            if keeping.ready is not None:
                keeping.ready.wait()
            kept = self._pages.store(job.keys, job.before, job.depth, fill, keeping.enough)
        finally:
            keeping.copied.set()
            with self._counting:
                self.counts.add("stored_pages", kept)
                self.counts.add("store_seconds", time.perf_counter() - began)
                self.counts.add("skipped_pages", len(job.keys) - kept, "overwritten" if keeping.enough.done() else "no room")

    def _load(self, load: LoadJob, told_s: float, done: Future[LoadDone], near: bool, came: int = 0) -> None:
        """Carry out a load job of which `came` pages have come; on the `near` thread, as far as it needs no disk. On a load thread, which
        alone knows how long it took: steps ask seldom while they compute."""
        assert self._blocks is not None
        blocks, first = self._blocks, came

        def hand_out(positions: Sequence[int], pages: Sequence[torch.Tensor], layers: slice) -> None:
            for position, page in zip(positions, pages, strict=True):
                blocks.write(load.blocks[first + position], page, layers)
            if self._gpu is not None:
                self._gpu.engine_stream().record().wait()

        try:
            until_s = told_s + load.within_s
            came += self._pages.restore(load.keys[came:], hand_out, until_s, only_near=near)
            ended_s, whole = time.monotonic(), came == len(load.keys)
            if near and not whole and ended_s < until_s and self._pages.any_far(load.keys[came:]):
                self._far_loader.submit(self._load, load, told_s, done, False, came)
            else:
                done.set_result(LoadDone(load.request_id, came, ended_s - told_s, not whole and ended_s >= until_s))
        except BaseException as error:
            done.set_exception(error)
            raise

    # -- what the scheduler hears ----------------------------------------------------------------------------------------------

    def report(self) -> tuple[RankReport, set[str]]:
        """What happened since the last step, and the requests whose loads ended. Once per step."""
        report = RankReport(self._generation)
        running = []
        for load, future in self._loads:
            if not future.done():
                running.append((load, future))
                continue
            done = self._outcome(load, future)
            self._unloaded.update(load.blocks[done.pages :])
            report.loads.append(done)
            with self._counting:
                self.counts.add("loaded_pages", done.pages)
                self.counts.add("failed_pages", len(load.blocks) - done.pages)
                self.counts.add("load_seconds", done.seconds)
        self._loads = running
        for number, (_, job) in list(self._keeping.items()):
            if job.done():
                del self._keeping[number]
                report.stored.append(number)
                if (error := job.exception()) is not None:
                    log.error(_STORE_FAILED, exc_info=error)
        report.masks = self._pages.changes()
        finished = {done.request_id for done in report.loads}
        return report, finished

    def _outcome(self, load: LoadJob, future: Future[LoadDone]) -> LoadDone:
        if (error := future.exception()) is None:
            return future.result()
        log.error("kvtier: the load of request %s failed; vLLM computes its tokens again", load.request_id, exc_info=error)
        return LoadDone(load.request_id, 0, 0.0)

    def unloaded_blocks(self) -> set[int]:
        """The blocks that were to be loaded and do not hold what they should, since the last call."""
        blocks, self._unloaded = self._unloaded, set()
        return blocks

    def taken_counts(self) -> Counts | None:
        """What was counted since the last call, and how full the tiers are, if that was asked."""
        totals_now = self._pages.counts()
        levels = self._pages.levels() if self._levels_wanted else None
        self._levels_wanted = False
        with self._counting:
            if levels is not None:
                self.counts.read(self.rank, levels)
            for name, totals in totals_now.items():
                for label, total in totals.items():
                    self.counts.add(f"{name}_pages", total - self._told[name].get(label, 0), label)
                self._told[name] = totals
            return self.counts.taken()

    def hello(self) -> Hello:
        """What the scheduler has to know at start."""
        tiers, page_bytes = self.cache.tier_sizes()
        return Hello(self.rank, tiers, page_bytes, RankReport(0, self._pages.changes()))

    # -- the whole -------------------------------------------------------------------------------------------------------------

    def _clear(self, generation: int) -> None:
        """Forget everything in every tier. What is under way ends first."""
        self._quiesce()
        self.cache.clear()
        carried_out(self.cache.config, generation)
        self._generation = generation

    def _quiesce(self) -> None:
        for keeping, _ in self._keeping.values():
            keeping.hurry()
            if keeping.claim():
                keeping.copied.set()
        for thread in (self._storer, self._near_loader, self._far_loader):
            thread.submit(lambda: None).result()

    def close(self) -> None:
        """Stop. What is on its way into the tiers gets there, and what the disk does not have yet is written there."""
        for loader in (self._near_loader, self._far_loader):
            loader.shutdown(cancel_futures=True)
        self._storer.shutdown()
        self.cache.close()


def probe(tensor: torch.Tensor, layer: Any, head_dim: int) -> str:
    """Which reading of vLLM's blocks is right: write one with the engine's own kernel and see where the numbers are.

    `tensor`: one layer's blocks, not in use yet; `layer`: its attention layer. The block is left as it was. LayoutError if no reading is.
    """
    write = getattr(layer.impl, "do_kv_cache_update", None)
    if write is None:
        raise LayoutError(f"kvtier does not know how vLLM's {type(layer.impl).__name__} writes its KV blocks")
    candidates = readings(tensor, head_dim)
    block, tokens, heads = tensor.shape[0] - 1, tensor.shape[2], tensor.shape[1]
    before = tensor[block].clone()
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn((tokens, heads, head_dim), generator=generator).to(tensor) for _ in range(2))
    slots = torch.arange(block * tokens, (block + 1) * tokens, device=tensor.device)
    try:
        write(layer, keys, values, tensor, slots)
        return matching(candidates, block, keys, values)
    finally:
        tensor[block] = before
