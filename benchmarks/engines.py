"""kvtier inside vLLM beside what else there is for it, with one real model, on the same prompts, in one run. Needs vLLM (docs/vllm.md).

The engines compute in bf16, in fp32 on x86 CPUs without AVX-512, whose KV takes twice the bytes: compare figures of one kind only.

Workloads (`workloads.py`): questions about long documents, chats that take turns, agents that share a system prompt. The engine's own cache
holds about one document, so that what comes back comes from elsewhere or is computed again. Each system is started in processes of its own,
bound to the same cores; all live side by side (2 to 3 GB each) and are asked each request in turn, so that none has a quieter time than the
others; the next one is asked when the one before is at rest, stores done. Durable ones are started a second time, with memory for about one
document and their files dropped from the page cache before each round. The first requests after a start are left out. Each request
that comes back must find at least half of what was sent before, or the run fails, if it is kvtier that did not find it; what others did not
find is counted (`.missed`) and left out of their seconds, and of what is compared with them.

- `engines.SYSTEM.WORKLOAD.cold`, `.own`, `.ram`, `.restart`, `.disk`: seconds to the first token, medians: never seen; held by the engine's
  own cache; back from memory; after a restart; from disk, later on. The ceiling is `own` of the documents in a plain engine. `.p95`: the
  95th percentile. With a plain engine, what the others find is computed again in these.
- `engines.SYSTEM.WORKLOAD.CASE.to_peer` (kvtier only): that over the same request's in the fastest other system of this run, the median of
  these; at most 1 is the aim.
- `engines.SYSTEM.WORKLOAD.CASE.hit_tokens`: the fewest tokens of a prompt that came from a cache. `.missed`, where there are any: how many
  requests found less than they must.
- `engines.SYSTEM.WORKLOAD.tokens`: tokens per second, of prompts and answers, over all requests before the restart. `.cpu`: CPU seconds of
  all processes for these.
- `engines.SYSTEM.disk_bytes`: what the files occupy after all workloads; the ceiling is the smallest other system's.
- `engines.SYSTEM.no_reuse`: time of some prompts that nobody sends again, one right after the other so that what goes on behind one answer
  slows the next, over that of such prompts in the same turn which say that the system is to pass them over (neither stored nor looked up:
  vLLM's tiers and kvtier do what they are told), less 1. Within one engine, because where memory happens to lie makes two of them differ
  by more than this. LMCache's server cannot be told, and takes turns with a plain engine: its row says little. Nobody else is up. At
  least `--repeats` turns, in equal parts after four starts; what counts of the first, the second ... prompt of a turn is its median over
  all turns. `.no_reuse.error`: one standard error of that, from drawing from the turns again, as if starts made no difference.
  `.no_reuse.cpu`: the same of CPU seconds, until the system is at rest. The run fails if kvtier does not find one it was to keep, or finds
  one that it was to pass over.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvtier.errors import KVTierError, MissingExtra

from .contestants import ENGINE_DTYPE, GIB, LAYOUT, SYSTEMS, USUAL
from .engines_report import Seen, Spent, Turn, outcome, rows
from .engines_report import plot as plot
from .measure import Row, Run
from .serving import Answer, EngineSetUp, Serving, bytes_on_disk, drop_from_page_cache, serving, stored_in
from .workloads import WORKLOADS, Request, Sizes, Workload, random_tokens

BLOCK_TOKENS = LAYOUT.page_tokens
NEW_TOKENS, TINY_NEW_TOKENS = 8, 2
UNIQUE_TOKENS, UNIQUE_IN_A_ROW = 1000, 4
NO_REUSE, NO_REUSE_STARTS = "no-reuse", 4
ALL = (*WORKLOADS, NO_REUSE)
GREETING_TOKENS = 3 * BLOCK_TOKENS + 10


@dataclass
class Plan:
    """What is asked, for `new_tokens` each time, of which model, where, on which cores; `turns` without reuse after each of `starts`
    starts."""

    workloads: dict[str, Workload]
    document_tokens: int
    starts: int
    turns: int
    new_tokens: int
    model: Path
    room: Path
    cores: Sequence[int]
    fresh: Iterator[int] = field(default_factory=lambda: itertools.count(100_000))
    """Seeds of prompts that nobody sends again."""

    @property
    def unique_tokens(self) -> int:
        """Tokens of each of those."""
        return min(UNIQUE_TOKENS, self.document_tokens)

    @property
    def blocks(self) -> int:
        """Blocks of vLLM that the largest request takes."""
        longest = max([each.longest for each in self.workloads.values()], default=0)
        return -(-(max(longest, self.unique_tokens, GREETING_TOKENS) + self.new_tokens) // BLOCK_TOKENS)

    @property
    def pages(self) -> int:
        """Room for all pages that are ever stored."""
        asked = sum(each.new_tokens for each in self.workloads.values())
        tokens = asked + self.starts * self.turns * UNIQUE_IN_A_ROW * self.unique_tokens + (self.starts + 1) * GREETING_TOKENS
        return tokens // BLOCK_TOKENS + 2 * self.blocks

    def start(self, name: str, scarce: bool = False) -> Any:
        """Context manager of the system; `scarce`: with memory for about one of the largest requests."""
        arguments = {
            "model": str(self.model),
            "dtype": ENGINE_DTYPE,
            "block_size": BLOCK_TOKENS,
            "max_model_len": self.blocks * BLOCK_TOKENS,
            "max_num_seqs": 4,
            "enforce_eager": True,
            "num_gpu_blocks_override": self.blocks + 2,
        }
        cache_gib = -(-(self.blocks + 2) * LAYOUT.page_bytes // GIB)
        memory = self.blocks * 3 // 2 if scarce else self.pages
        return serving(name, EngineSetUp(arguments, cache_gib, self.cores), memory, 2 * self.pages, self.room)


def note() -> str:
    """What to know beside the figures."""
    return (
        f"s: to the first token; engines in {ENGINE_DTYPE}; ceiling: documents in a plain engine's own cache; repeats are those of no-reuse"
    )


def find_engines(systems: Sequence[str]) -> None:
    """KVTierError for an unknown system, MissingExtra if what one of them needs is not installed."""
    for name in systems:
        if name not in SYSTEMS:
            raise KVTierError(f"--systems {name}: expected some of {', '.join(SYSTEMS)}")
    needed = {"vllm": "vLLM"} | ({"lmcache": "LMCache"} if any(SYSTEMS[name].chunk_tokens for name in systems) else {})
    for module, title in needed.items():
        if importlib.util.find_spec(module) is None:
            raise MissingExtra(
                f"kvtier bench engines: {title} is not installed beside this Python; `make test-engines` makes an environment that has it, "
                "then run `.venv-vllm/bin/kvtier bench engines`"
            )


def measure(
    run: Run,
    systems: Sequence[str] = USUAL,
    workloads: Sequence[str] = ALL,
    contexts: int = 4,
    document_tokens: int = 3000,
    rounds: int = 2,
    path: Path | None = None,
) -> list[Row]:
    """The rows. At least `run.repeats` turns without reuse; files go into `path`.

    KVTierError for options that make no sense and systems that fail, MissingExtra without vLLM, LMCache or a model.
    """
    find_engines(systems)
    compared = [name for name in systems if SYSTEMS[name].connector is not None]
    if NO_REUSE in workloads and "plain" not in systems and (beside := [name for name in compared if not SYSTEMS[name].limited]):
        raise KVTierError(f"--workload {NO_REUSE} compares {', '.join(beside)} with a plain engine; name plain among --systems too")
    if unknown := set(workloads) - set(ALL):
        raise KVTierError(f"--workload {', '.join(sorted(unknown))}: expected some of {', '.join(ALL)}")
    starts, turns = NO_REUSE_STARTS, -(-run.repeats // NO_REUSE_STARTS)
    if run.tiny:
        contexts, document_tokens, rounds, starts, turns = min(contexts, 4), min(document_tokens, 400), 1, 2, 1
    if NO_REUSE not in workloads:
        starts = 0
    if contexts < 4 or rounds < 1 or not 3 * BLOCK_TOKENS <= document_tokens <= 8000:
        raise KVTierError(
            f"--contexts {contexts} --rounds {rounds} --document-tokens {document_tokens}: expected at least 4 contexts, so that the "
            f"engine's own cache does not hold them, at least 1 round, and {3 * BLOCK_TOKENS} to 8000 tokens"
        )
    from kvtier.engines.models import packaged_model

    sizes = Sizes(contexts, document_tokens, rounds)
    chosen = {name: make(sizes) for name, make in WORKLOADS.items() if name in workloads}
    seen = {name: Seen() for name in systems}
    durable = sum(SYSTEMS[name].durable for name in systems)
    rounds_in_all = sum(len(each.rounds) + len(each.after_restart) for each in chosen.values())
    without_reuse = sum(2 if SYSTEMS[name].limited else 3 for name in compared)
    run.expect(bool(chosen) * (len(systems) + durable) + rounds_in_all + starts * without_reuse)
    with tempfile.TemporaryDirectory(prefix="kvtier-engines-", dir=path) as room:
        # Two threads that wait for each other at every operation take seconds per token where others use the processors too.
        cores = sorted(os.sched_getaffinity(0))[-1 if run.tiny else 0 :]
        new_tokens = TINY_NEW_TOKENS if run.tiny else NEW_TOKENS
        plan = Plan(chosen, document_tokens, starts, turns, new_tokens, packaged_model(), Path(room), cores)
        ask_all(run, plan, seen)
    return rows(seen)


def ask_all(run: Run, plan: Plan, seen: dict[str, Seen]) -> None:
    """All workloads; the durable systems once more, started anew with little memory; prompts without reuse."""
    durable = [name for name in seen if SYSTEMS[name].durable]
    if plan.workloads:
        ask_workloads(run, plan, seen, durable)
        if durable:
            ask_after_restart(run, plan, seen, durable)
    for start, name in itertools.product(range(plan.starts), seen):
        if name != "plain":
            compare_without_reuse(run, plan, start, name, seen[name])


def ask_workloads(run: Run, plan: Plan, seen: dict[str, Seen], durable: Sequence[str]) -> None:
    """All workloads until the restart, of all systems side by side."""
    with ExitStack() as stack:
        served = started(run, plan, list(seen), stack)
        for title, workload in plan.workloads.items():
            began = {name: each.cpu_s() for name, each in served.items()}
            for number, asked in enumerate(workload.rounds):
                run.step(f"{title}, round {number + 1}")
                for name, played in play(plan, served, asked, title, seen).items():
                    seen[name].timed(title, played)
                for name in durable:
                    bytes_on_disk(stored_in(plan.room, name))  # whatever is still on its way arrives, so that the next round finds it
            for name, each in served.items():
                seen[name].cpu_s[title] = each.cpu_s() - began[name]
            tell(run, seen)
    for name in durable:
        seen[name].disk_bytes = bytes_on_disk(stored_in(plan.room, name))  # with what an engine that ends writes


def ask_after_restart(run: Run, plan: Plan, seen: dict[str, Seen], durable: Sequence[str]) -> None:
    """What the workloads ask of systems that find nothing but their files, not even those in the page cache."""
    with ExitStack() as stack:
        served = started(run, plan, durable, stack, scarce=True)
        for title, workload in plan.workloads.items():
            for asked in workload.after_restart:
                run.step(f"{title}, after a restart")
                for name in served:
                    drop_from_page_cache(stored_in(plan.room, name))
                play(plan, served, asked, title, seen)
        tell(run, seen)


def started(run: Run, plan: Plan, names: Sequence[str], stack: ExitStack, scarce: bool = False) -> dict[str, Serving]:
    """These systems, up and warm; `stack` stops them."""
    served = {}
    for name in names:
        run.step(f"starting {name}")
        served[name] = stack.enter_context(plan.start(name, scarce))
    for each in served.values():
        greet(plan, each)
    return served


def play(
    plan: Plan, served: dict[str, Serving], asked: Sequence[Request], title: str, seen: dict[str, Seen]
) -> dict[str, list[tuple[Request, Answer]]]:
    """One round, each request asked of all systems in turn, of another one first each time. KVTierError as `checked`."""
    played: dict[str, list[tuple[Request, Answer]]] = {name: [] for name in served}
    for number, request in enumerate(asked):
        for name in turned(list(served), number):
            answer = served[name].engine.ask(request.prompt, plan.new_tokens)
            served[name].settle()
            if SYSTEMS[name].connector is not None:
                answer = checked(name, title, request, answer)
            seen[name].answers.setdefault((title, request.case), []).append(answer)
            played[name].append((request, answer))
    return played


def turned(names: Sequence[str], number: int) -> list[str]:
    """The same in the same order, from another one on."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def tell(run: Run, seen: dict[str, Seen]) -> None:
    """What was seen so far, for those who wait for the rest."""
    for name, found in seen.items():
        run.progress.console.print(f"{name}: {outcome(found)}")


def greet(plan: Plan, served: Serving) -> None:
    """The first request after a start, and one that finds something."""
    for _ in range(2):
        served.engine.ask(random_tokens(9999, GREETING_TOKENS), plan.new_tokens)
    served.settle()


def checked(name: str, title: str, request: Request, answer: Answer) -> Answer:
    """The answer, marked if less than half of a prompt that comes back was found: then it measures what vLLM computes again.

    KVTierError instead if it was kvtier that did not find it.
    """
    if request.case == "cold" or answer.cached_tokens >= request.known_tokens // BLOCK_TOKENS * BLOCK_TOKENS // 2:
        return answer
    if name.startswith("kvtier"):
        raise KVTierError(
            f"{name}, {title}, {request.case}: {answer.cached_tokens} tokens of a prompt were found, of {request.known_tokens} that were "
            "sent before; it would measure what vLLM computes again"
        )
    return replace(answer, missed=True)


def compare_without_reuse(run: Run, plan: Plan, start: int, name: str, found: Seen) -> None:
    """New prompts, some right after the other, that a system keeps and that it passes over, in turn, nobody else being up; start 0 is the
    first. One that passes nothing over takes turns with a plain engine.

    KVTierError if kvtier did not keep the ones, or kept the others.
    """
    limited = SYSTEMS[name].limited
    last: dict[bool, list[int]] = {}
    with ExitStack() as stack:
        served = started(run, plan, [name] if limited else turned(["plain", name], start), stack)

        def ask(kept: bool) -> Spent:
            asked = served[name if kept or limited else "plain"]
            prompts = [random_tokens(next(plan.fresh), plan.unique_tokens) for _ in range(UNIQUE_IN_A_ROW)]
            began_cpu_s = asked.cpu_s()
            seconds = [asked.engine.ask(prompt, plan.new_tokens, passed_over=limited and not kept).total_s for prompt in prompts]
            asked.settle()
            last[kept] = prompts[0]
            return Spent(seconds, asked.cpu_s() - began_cpu_s)

        run.step(f"{name} without reuse")
        for number in range(plan.turns):
            took = {kept: ask(kept) for kept in ((True, False), (False, True))[(start + number) % 2]}
            found.no_reuse.append(Turn(took[True], took[False]))
        if name.startswith("kvtier"):
            check_what_was_kept(plan, name, served[name], last)
    tell(run, {name: found})


def check_what_was_kept(plan: Plan, name: str, served: Serving, last: dict[bool, list[int]]) -> None:
    """KVTierError unless the prompt that was to be kept is found, and the one that was to be passed over is not."""
    pushes_others_out = random_tokens(next(plan.fresh), plan.blocks * BLOCK_TOKENS - plan.new_tokens)
    served.engine.ask(pushes_others_out, plan.new_tokens, passed_over=True)
    for kept, prompt in last.items():
        cached = served.engine.ask(prompt, plan.new_tokens).cached_tokens
        if cached < len(prompt) // BLOCK_TOKENS * BLOCK_TOKENS // 2 if kept else cached:
            raise KVTierError(
                f"{name}, {NO_REUSE}: {cached} tokens were found of a prompt of {len(prompt)} that was to be "
                f"{'kept' if kept else 'passed over'}; the figures would not be of what they say"
            )
    served.settle()
