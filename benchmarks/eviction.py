"""The tables of docs/eviction.md: what a2cr finds in traffic of many kinds, and what each of its parts is worth.

`traffic.KIND.CAPACITY.POLICY`: share of the input tokens found in made-up traffic (`benchmarks/traffic.py`) in one tier that holds so much
of its distinct pages; of the published policies only the best one at that capacity, named in the row. `parts.TRACE.CAPACITY.without-PART`:
the same for a2cr without one of its parts (`benchmarks/ablations.py`), on the given traces and two made-up ones. The ceiling is the
offline optimum with bypass. Nothing is timed: the same figures everywhere, however often.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvtier.errors import KVTierError
from kvtier.policy import A2CR, LRU, POLICIES, A2CRClassic, EvictionPolicy, make_policy
from kvtier.replay.capacities import Capacity
from kvtier.replay.lab import replay
from kvtier.replay.optimum import Future
from kvtier.replay.trace import Trace, read_trace

from .ablations import PARTS, left_out
from .measure import Row, Run
from .traffic import KINDS, make_traffic

TABLES = ("traffic", "parts")
MADE_UP_FOR_PARTS = ("retrieval", "agents")
REQUESTS, TINY_REQUESTS = 5_000, 150
PUBLISHED = tuple(name for name in POLICIES if name not in (A2CR.name, LRU.name, A2CRClassic.name))


def measure(run: Run, table: str = "traffic", traces: Sequence[Path] = (), capacities: str = "1%,5%,10%,20%") -> list[Row]:
    """The rows of one of TABLES. KVTierError for another one, a file that is no trace, or capacities that are none."""
    if table not in TABLES:
        raise KVTierError(f"unknown table {table!r}; known: {', '.join(TABLES)}")
    if traces and table == "traffic":
        raise KVTierError("the table traffic makes its traces up; for your own: kvtier replay TRACE... --policy all")
    sizes = [Capacity.parse(text) for text in capacities.split(",")]
    requests = TINY_REQUESTS if run.tiny else REQUESTS
    kinds = KINDS if table == "traffic" else MADE_UP_FOR_PARTS
    given = [read_trace(path) for path in traces]
    for trace in given:
        for size in sizes:
            size.pages(trace)
    run.expect((len(kinds) + len(given)) * len(sizes))
    rows: list[Row] = []
    for trace in (*given, *(make_traffic(kind, requests) for kind in kinds)):
        future = Future(trace)
        for size in sizes:
            run.step(f"{trace.name} in {size.text}")
            pages = size.pages(trace)
            optimum = trace.hit_tokens(future.hit_pages(pages)) / trace.tokens
            found = _policies(trace, pages) if table == "traffic" else _parts(trace, pages)
            rows += [Row(f"{table}.{trace.name}.{size.text}.{name}", ratio, "share of tokens", optimum) for name, ratio in found.items()]
    return rows


def _policies(trace: Trace, pages: int) -> dict[str, float]:
    found = {name: _ratio(trace, make_policy(name, page_tokens=trace.block_tokens), pages) for name in (LRU.name, A2CR.name, *PUBLISHED)}
    best = max(PUBLISHED, key=lambda name: found[name])
    return {LRU.name: found[LRU.name], A2CR.name: found[A2CR.name], f"best.{best}": found[best]}


def _parts(trace: Trace, pages: int) -> dict[str, float]:
    found = {}
    for part in PARTS:
        with left_out(part) as policy:
            found[f"without-{part}"] = _ratio(trace, policy, pages)
    return found


def _ratio(trace: Trace, policy: EvictionPolicy, pages: int) -> float:
    return trace.hit_tokens(replay(trace, policy, pages).hit_pages) / trace.tokens
