"""kvtier inside vLLM beside what else there is for it, with one real model, on the same prompts, in one run. Needs vLLM (docs/vllm.md).

Long-document questions: documents of 3,000 tokens are each asked about in turn, one request at a time, and the engine's own cache holds
about two of them, so that each comes back from elsewhere or is computed again. Each system is started for this in processes of its own;
durable ones are started a second time, with their files dropped from the page cache. The first request after a start is left out.
Tokens are random: the time does not depend on them. Each request that comes back must find something, or the run fails.

- `engines.SYSTEM.cold`, `.ram`, `.disk`: seconds to the first token of documents never seen, seen before, and seen before a restart;
  medians. The ceiling is a plain engine (`floor`) whose own cache holds everything; less is better.
- `engines.SYSTEM.ram.to_peer`, `.disk.to_peer` (kvtier only): that over the fastest other system's in this run; at most 1 is the aim.
- `engines.SYSTEM.ram.hit_tokens`, `.disk.hit_tokens`: the fewest tokens of a prompt that came from a cache.
- `engines.SYSTEM.requests`: requests per second over all visits before the restart.
- `engines.SYSTEM.cpu`: CPU seconds of all processes for these visits.
- `engines.SYSTEM.disk_bytes`: what the files occupy; the ceiling is the smallest other system's.
- `engines.SYSTEM.no_reuse`: time of prompts that nobody sends again, in turns with a plain engine, over that engine's, less 1; the median
  of the turns. `.no_reuse.cpu`: the same of CPU seconds.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from kvtier.errors import KVTierError, MissingExtra

from .measure import Row, Run
from .serving import GIB, SYSTEMS, Answer, EngineSetUp, Serving, bytes_on_disk, drop_from_page_cache, serving, stored_in

BLOCK_TOKENS, BLOCK_BYTES = 128, 2_949_120
"""Of vLLM on CPUs with SmolLM2-135M in bf16."""
QUESTION_TOKENS, NEW_TOKENS = 40, 8
UNIQUE_TOKENS, UNIQUE_PER_TURN = 1000, 4
TOKEN_IDS = (1000, 49000)
CASES = ("documents", "no-reuse")


@dataclass(frozen=True)
class Prompts:
    """Documents and questions about them; the same for every system."""

    documents: int
    document_tokens: int

    @property
    def blocks(self) -> int:
        """Blocks of vLLM that one request takes."""
        return -(-(self.document_tokens + QUESTION_TOKENS + NEW_TOKENS) // BLOCK_TOKENS)

    def about(self, document: int, question: int) -> list[int]:
        """A document, then a question about it."""
        return random_tokens(document, self.document_tokens) + random_tokens(1000 + question, QUESTION_TOKENS)

    def engine(self, model: Path, own_documents: int) -> dict[str, Any]:
        """Arguments of an engine whose own cache holds `own_documents`."""
        return {
            "model": str(model),
            "dtype": "bfloat16",
            "block_size": BLOCK_TOKENS,
            "max_model_len": self.blocks * BLOCK_TOKENS,
            "max_num_seqs": 4,
            "enforce_eager": True,
            "distributed_executor_backend": "uni",
            "num_gpu_blocks_override": own_documents * self.blocks + 2,
        }


@dataclass
class Seen:
    """What one system showed."""

    cold: list[Answer] = field(default_factory=list)
    ram: list[Answer] = field(default_factory=list)
    disk: list[Answer] = field(default_factory=list)
    cpu_s: float = 0.0
    disk_bytes: int = 0
    no_reuse: list[tuple[float, float]] = field(default_factory=list)
    """Per turn: wall and CPU seconds over the plain engine's."""


@dataclass(frozen=True)
class Plan:
    """What is measured with what."""

    prompts: Prompts
    rounds: int
    model: Path
    room: Path
    threads: int

    def start(self, name: str) -> Any:
        """Context manager of the system."""
        documents = self.prompts.documents + 1 if name == "floor" else 2
        memory = -(-3 * (self.prompts.documents + 1) * self.prompts.blocks * BLOCK_BYTES // (2 * GIB))
        cache = -(-(documents + 1) * self.prompts.blocks * BLOCK_BYTES // GIB)
        return serving(name, EngineSetUp(self.prompts.engine(self.model, documents), cache, self.threads), memory, self.room)


def random_tokens(seed: int, count: int) -> list[int]:
    """Token ids, the same for the same seed."""
    ids: list[int] = np.random.default_rng(seed).integers(*TOKEN_IDS, count).tolist()
    return ids


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
    systems: Sequence[str] = tuple(SYSTEMS),
    cases: Sequence[str] = CASES,
    documents: int = 6,
    document_tokens: int = 3000,
    rounds: int = 3,
    path: Path | None = None,
) -> list[Row]:
    """The rows. `run.repeats` turns without reuse; files go into `path`.

    KVTierError for options that make no sense and systems that fail, MissingExtra without vLLM, LMCache or a model.
    """
    find_engines(systems)
    if unknown := set(cases) - set(CASES):
        raise KVTierError(f"--cases {', '.join(sorted(unknown))}: expected some of {', '.join(CASES)}")
    if run.tiny:
        documents, document_tokens, rounds = min(documents, 4), min(document_tokens, 400), min(rounds, 2)
    if documents < 4 or rounds < 2 or not BLOCK_TOKENS <= document_tokens <= 8000:
        raise KVTierError(
            f"--documents {documents} --rounds {rounds} --document-tokens {document_tokens}: expected at least 4 documents, so that the "
            f"engine's own cache does not hold them, at least 2 rounds, and {BLOCK_TOKENS} to 8000 tokens"
        )
    from kvtier.engines.models import packaged_model

    model = packaged_model()
    seen = {name: Seen() for name in systems}
    run.expect(len(systems) * len(cases))
    with tempfile.TemporaryDirectory(prefix="kvtier-engines-", dir=path) as room:
        # Two threads that wait for each other at every operation take seconds per token where others use the processors too.
        threads = 1 if run.tiny else len(os.sched_getaffinity(0))
        plan = Plan(Prompts(documents, document_tokens), rounds, model, Path(room), threads)
        if "documents" in cases:
            for name in systems:
                run.step(f"long documents: {name}")
                ask_about_documents(name, plan, seen[name])
                run.progress.console.print(f"{name}: {outcome(seen[name])}")
        if "no-reuse" in cases:
            compare_without_reuse(run, plan, seen)
    return rows(seen)


def ask_about_documents(name: str, plan: Plan, seen: Seen) -> None:
    """All documents in turn, several rounds; then once more after a restart."""
    prompts, system, store = plan.prompts, SYSTEMS[name], stored_in(plan.room, name)
    with plan.start(name) as served:
        greet(served)
        for question in range(plan.rounds):
            began = served.cpu_s()
            answers = [served.engine.ask(prompts.about(document, question), NEW_TOKENS) for document in range(prompts.documents)]
            bytes_on_disk(store)  # whatever is still on its way arrives, so that the next round finds it
            seen.cpu_s += served.cpu_s() - began
            (seen.ram if question else seen.cold).extend(answers)
        if name == "plain":
            seen.cold, seen.ram = seen.cold + seen.ram, []
        check(name, seen.ram)
    if system.durable:
        seen.disk_bytes = bytes_on_disk(store)  # with what an engine that ends writes
        drop_from_page_cache(store)
        with plan.start(name) as served:
            greet(served)
            seen.disk = [served.engine.ask(prompts.about(document, plan.rounds), NEW_TOKENS) for document in range(prompts.documents)]
        check(name, seen.disk)


def greet(served: Serving) -> None:
    """The first request after a start, and one that finds something."""
    for _ in range(2):
        served.engine.ask(random_tokens(9999, 3 * BLOCK_TOKENS + 10), NEW_TOKENS)


def check(name: str, answers: Sequence[Answer]) -> None:
    """KVTierError unless each of them found something: one that did not measures vLLM's own prefill."""
    if any(answer.cached_tokens < BLOCK_TOKENS for answer in answers):
        raise KVTierError(f"{name}: a document that came back was not found ({[answer.cached_tokens for answer in answers]} tokens were)")


def compare_without_reuse(run: Run, plan: Plan, seen: dict[str, Seen]) -> None:
    """New prompts, in turns with a plain engine that lives beside the system."""
    fresh = itertools.count(100_000)
    plan = replace(plan, room=Path(tempfile.mkdtemp(prefix="no-reuse-", dir=plan.room)))
    tokens = min(UNIQUE_TOKENS, plan.prompts.document_tokens)

    def turn(served: Serving) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), served.cpu_s()
        for _ in range(UNIQUE_PER_TURN):
            served.engine.ask(random_tokens(next(fresh), tokens), NEW_TOKENS)
        wall = time.perf_counter() - wall
        time.sleep(0.5)  # what is on its way after the last one belongs to this turn's CPU seconds, not to the other's
        return wall, served.cpu_s() - cpu

    with plan.start("plain") as plain:
        greet(plain)
        for name, found in seen.items():
            run.step(f"no reuse: {name}")
            if SYSTEMS[name].connector is None:
                continue
            with plan.start(name) as served:
                greet(served)
                for number in range(run.repeats):
                    both = {each is served: turn(each) for each in ((plain, served) if number % 2 else (served, plain))}
                    found.no_reuse.append((both[True][0] / both[False][0], both[True][1] / both[False][1]))


def outcome(found: Seen) -> str:
    """What a system showed, for those who wait for the rest."""
    cases = {"cold": found.cold, "from memory": found.ram, "from disk": found.disk}
    return ", ".join(f"{case} {first_s(answers):.3f} s" for case, answers in cases.items() if answers)


def first_s(answers: Sequence[Answer]) -> float:
    """Median seconds to the first token."""
    return statistics.median(answer.first_s for answer in answers)


def rows(seen: dict[str, Seen]) -> list[Row]:
    """Rows of what was seen."""
    peers = [found for name, found in seen.items() if SYSTEMS[name].connector is not None and not name.startswith("kvtier")]
    floor = first_s(seen["floor"].ram) if "floor" in seen and seen["floor"].ram else None
    smallest = min((peer.disk_bytes for peer in peers if peer.disk), default=None)
    made = []
    for name, found in seen.items():
        ours, title = name.startswith("kvtier"), f"engines.{name}"
        for case in ("cold", "ram", "disk"):
            answers: list[Answer] = getattr(found, case)
            if not answers:
                continue
            made.append(Row(f"{title}.{case}", first_s(answers), "s", floor))
            if case != "cold":
                made.append(Row(f"{title}.{case}.hit_tokens", min(answer.cached_tokens for answer in answers), "tokens"))
            fastest = min((first_s(getattr(peer, case)) for peer in peers if getattr(peer, case)), default=None)
            if ours and case != "cold" and fastest is not None:
                made.append(Row(f"{title}.{case}.to_peer", first_s(answers) / fastest, "ratio"))
        visits = found.cold + found.ram
        if visits:
            made.append(Row(f"{title}.requests", len(visits) / sum(answer.total_s for answer in visits), "requests/s"))
            made.append(Row(f"{title}.cpu", found.cpu_s, "s"))
        if found.disk:
            made.append(Row(f"{title}.disk_bytes", found.disk_bytes, "bytes", smallest))
        if found.no_reuse:
            wall, cpu = (statistics.median(column) - 1 for column in zip(*found.no_reuse, strict=True))
            made += [Row(f"{title}.no_reuse", wall, "share"), Row(f"{title}.no_reuse.cpu", cpu, "share")]
    return made
