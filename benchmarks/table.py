"""What the bookkeeping costs: page table and policies alone at 10^4 to 10^6 pages, and a whole stream of requests (`stream.py`). No bytes
are moved.

`table.OPERATION.PAGES`, `lru.OPERATION.PAGES` and so on for other policies: millions of pages per second, in calls of one request's
pages; beside it what a plain dict does for the same keys, one by one (for an eviction: an OrderedDict that lets its oldest go).

A trace is Mooncake JSONL, read by `kvtier.replay`; without one, its made-up chats. Capacity is a share of the stream's distinct pages.
Where vLLM is installed, its own bookkeeping can be asked for, over the same stream (`vllm_manager.py`).
"""

from __future__ import annotations

import importlib
import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from kvtier.errors import KVTierError
from kvtier.keys import PageKey
from kvtier.pages import DEVICE, PageTable
from kvtier.policy import ROOT, EvictionPolicy, make_policy, nothing_protected

from .measure import Row, Run, side_by_side
from .stream import BUSY_POLICIES, LAYOUT, ROOT_KEY, chats, page_key, read_stream, stream_rows

CHAIN_PAGES = 25
"""Pages of one call in the rows of single operations: about a mean request of the conversation trace."""
MEASURED = ("lru", "a2cr", "lfu", "a2cr-classic")
"""Policies with an order of their own; of all that queue (`kvtier.policy.queued`) `lfu` has one queue, `a2cr-classic` many."""
CALLS = 400
Work = tuple[str, Callable[[], object], Callable[[], object]]
"""What is measured: its name, ours, and the plain thing beside it."""


def measure(run: Run, trace: Path | None = None, share: float = 0.05, vllm: bool = False) -> list[Row]:
    """The rows. `share`: capacity as a share of the distinct pages. `vllm`: those of its bookkeeping, too.

    KVTierError for a file that is not a trace, a share out of range, and where there is no vLLM, or too old a one.
    """
    if not 0 < share <= 1:
        raise KVTierError(f"--share {share}: expected above 0 and at most 1")
    others = importlib.import_module("kvtier.bench.vllm_manager") if vllm else None
    stream = chats(150 if run.tiny else 12_000) if trace is None else read_stream(trace)
    sizes = (100, 1000) if run.tiny else (10**4, 10**5, 10**6)
    run.expect(len(sizes) * (1 + len(MEASURED)) + len(MEASURED) + 1 + BUSY_POLICIES + (len(others.POLICIES) if others else 0))
    rows = []
    for size in sizes:
        run.step(f"a table of {size} pages")
        rows += _table(run, size)
        for name in MEASURED:
            run.step(f"{name} over {size} pages")
            rows += _policy(run, name, size)
    capacity = max(1, int(stream.distinct * share))
    rows += stream_rows(run, stream, capacity, MEASURED)
    return rows + others.vllm_rows(run, stream, capacity) if others else rows


def _chains(size: int) -> list[list[PageKey]]:
    keys = [page_key(number) for number in range(size)]
    return [keys[start : start + CHAIN_PAGES] for start in range(0, size, CHAIN_PAGES)]


def _rows(name: str, size: int, pages: int, works: Sequence[Work], run: Run) -> Iterator[Row]:
    for operation, ours, plain in works:
        took, floor = side_by_side([ours, plain], run.repeats)
        yield Row(f"{name}.{operation}.1e{len(str(size)) - 1}", pages / took / 1e6, "M ops/s", pages / floor / 1e6)


def _each(chains: Iterable[Sequence[PageKey]], call: Callable[[PageKey], object]) -> None:
    for chain in chains:
        for key in chain:
            call(key)


def _table(run: Run, size: int) -> list[Row]:
    table, chains = PageTable(1, LAYOUT.page_tokens), _chains(size)
    plain: dict[PageKey, int] = {}

    def write(chain: Sequence[PageKey]) -> None:
        rows = table.add_chain(chain, ROOT_KEY, 0)
        table.begin(rows, DEVICE, rows.tolist())
        table.commit(rows, DEVICE)

    for chain in chains:
        write(chain)
        plain.update((key, len(plain)) for key in chain)
    asked = random.Random(size).choices(chains, k=min(CALLS, len(chains)))
    distinct = list({chain[0]: chain for chain in asked}.values())
    held = [table.find(chain) for chain in asked]

    def rewrite() -> None:
        for chain in distinct:
            table.drop(table.find(chain)[::-1], DEVICE)
            write(chain)

    def lease() -> None:
        for rows in held:
            table.lease(rows)
            table.release(rows)

    def refill() -> None:
        for chain in distinct:
            for key in chain:
                plain[key] = plain.pop(key)

    pages = sum(map(len, asked))
    lookup = ("lookup", lambda: [table.find(chain) for chain in asked], lambda: _each(asked, plain.get))
    hold = ("lease", lease, lambda: _each(asked, plain.__getitem__))
    again = ("rewrite", rewrite, refill)
    return [*_rows("table", size, pages, [lookup, hold], run), *_rows("table", size, sum(map(len, distinct)), [again], run)]


def _policy(run: Run, name: str, size: int) -> list[Row]:
    policy: EvictionPolicy = make_policy(name)
    plain: OrderedDict[int, None] = OrderedDict.fromkeys(range(size))
    chains = [np.arange(start, min(start + CHAIN_PAGES, size)) for start in range(0, size, CHAIN_PAGES)]
    links = [(chain, np.concatenate(([ROOT], chain[:-1])), np.arange(len(chain))) for chain in chains]
    now = 0.0
    for link in links:
        now += 0.1
        policy.insert(*link, now)
    asked = random.Random(size).choices(chains, k=min(CALLS, len(chains)))
    numbers = [chain.tolist() for chain in asked]

    def touch() -> None:
        nonlocal now
        for chain in asked:
            now += 0.1
            policy.touch(chain, now)

    def plain_touch() -> None:
        for chain in numbers:
            for page in chain:
                plain.move_to_end(page)

    def evict() -> None:
        nonlocal now
        for _ in range(min(CALLS, len(chains))):
            now += 0.1
            victims = policy.evict(CHAIN_PAGES, nothing_protected, now, 0.95)
            if victims is None:
                raise KVTierError(f"{name} found no {CHAIN_PAGES} pages to evict among {len(policy)}")
            place = victims % CHAIN_PAGES
            policy.insert(victims, np.where(place > 0, victims - 1, ROOT), place, now)

    def plain_evict() -> None:
        for _ in range(min(CALLS, len(chains))):
            for _ in range(CHAIN_PAGES):
                plain[plain.popitem(last=False)[0]] = None

    pages = sum(map(len, numbers))
    works = [("touch", touch, plain_touch), ("evict", evict, plain_evict)]
    return list(_rows(name, size, pages, works, run))
