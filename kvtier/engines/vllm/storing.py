"""Which blocks of vLLM's cache the workers store: jobs for them, and what these jobs still read.

A job reads blocks after the step that filled them. A block that vLLM gives to somebody else before its job copied it is fenced: the job is
named in that step's plan (`overwritten`). At most `MOST_STORING` pages are being stored at a time; the others wait in their requests.
State: vLLM's scheduler thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvtier.engines.vllm.events import Announcer
from kvtier.engines.vllm.messages import StoreJob
from kvtier.engines.vllm.mirror import Mirror
from kvtier.engines.vllm.requests import RequestState
from kvtier.keys import PageKey

MOST_STORING = 256
"""Pages whose blocks the workers may be asked to copy before they have copied others."""
MOST_PER_JOB = 16
"""Pages in one store job: a step that overwrites one of its blocks waits until all of them are copied."""


class Storing:
    """The store jobs under way."""

    def __init__(self, mirror: Mirror, workers: int, announcer: Announcer | None) -> None:
        self._mirror = mirror
        self._workers = workers
        self._announcer = announcer
        self.pages: set[PageKey] = set()
        """Pages that are being stored: whoever wants them can load them in a moment."""
        self.jobs: dict[int, tuple[StoreJob, set[int]]] = {}
        """The jobs, and the ranks that have not ended them."""
        self._next_job = 0
        self._fences: dict[int, set[int]] = {}
        """Block to the jobs that read it."""

    def overwritten(self, blocks: Iterable[int]) -> list[int]:
        """Jobs that read any of these blocks."""
        jobs: set[int] = set()
        return sorted(jobs.union(*(self._fences.get(block, ()) for block in blocks)))

    def store(self, state: RequestState, blocks: Sequence[int]) -> list[StoreJob]:
        """Jobs for the request's full pages that are nowhere yet, one per run of them, as far as the bound allows; `blocks`: its own."""
        jobs: list[StoreJob] = []
        if state.fed <= state.stored:
            return jobs
        keys = state.keys.first(state.fed)
        run: list[int] = []
        for page in range(state.stored, state.fed):
            if self._mirror.holds(keys[page]) or keys[page] in self.pages:
                self._begin(state, keys, run, blocks, jobs)
                run = []
            elif len(self.pages) + len(run) >= MOST_STORING:
                break
            else:
                run.append(page)
            state.stored = page + 1
            if len(run) == MOST_PER_JOB:
                self._begin(state, keys, run, blocks, jobs)
                run = []
        self._begin(state, keys, run, blocks, jobs)
        return jobs

    def _begin(self, state: RequestState, keys: Sequence[PageKey], run: Sequence[int], blocks: Sequence[int], jobs: list[StoreJob]) -> None:
        if not run:
            return
        chosen = [keys[page] for page in run]
        job = StoreJob(self._next_job, chosen, state.keys.before(run[0]), run[0], [blocks[page] for page in run])
        self._next_job += 1
        self.jobs[job.number] = (job, set(range(self._workers)))
        self.pages.update(chosen)
        if self._announcer is not None:
            self._announcer.describe(state.request, keys, run)
        for block in job.blocks:
            self._fences.setdefault(block, set()).add(job.number)
        jobs.append(job)

    def ended(self, rank: int, number: int) -> None:
        """The worker of that rank read all it had to, whether it kept it or not."""
        job, waiting = self.jobs[number]
        waiting.discard(rank)
        if waiting:
            return
        del self.jobs[number]
        self.pages.difference_update(job.keys)
        if self._announcer is not None:
            self._announcer.forget(job.keys)
        for block in job.blocks:
            self._fences[block].discard(number)
            if not self._fences[block]:
                del self._fences[block]
