"""The optimum: the same as Belady's rule applied page by page, and as trying everything."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.replay.optimum import Future
from kvtier.replay.trace import Trace
from tests.replay.rig import prefix_in, prompts_of, public_trace, trace_of, traces


def belady(trace: Trace, capacity: int) -> list[int]:
    """Keep what is wanted soonest; of pages wanted at once, the shallowest; nothing that is never wanted again."""
    prompts = prompts_of(trace)
    depth = dict(zip(trace.pages.tolist(), trace.depths.tolist(), strict=True))
    here: set[int] = set()
    hits = []
    for place, prompt in enumerate(prompts):
        hits.append(prefix_in(prompt, here))
        here |= set(prompt)
        wanted = {page: next((later for later in range(place + 1, len(prompts)) if page in prompts[later]), None) for page in here}
        soonest = sorted((later, depth[page], page) for page, later in wanted.items() if later is not None)
        here = {page for _, _, page in soonest[:capacity]}
    return hits


def best(prompts: list[list[int]], capacity: int) -> int:
    """The most pages found, over all that could be kept after each request."""
    found = {frozenset[int](): 0}
    for prompt in prompts:
        following: dict[frozenset[int], int] = {}
        for here, hits in found.items():
            hits += prefix_in(prompt, set(here))
            possible = here | set(prompt)
            for kept in combinations(sorted(possible), min(capacity, len(possible))):
                following[frozenset(kept)] = max(hits, following.get(frozenset(kept), 0))
        found = following
    return max(found.values())


@given(trace=traces(), capacity=st.integers(1, 20))
def test_it_finds_what_beladys_rule_finds(trace, capacity):
    assert Future(trace).hit_pages(capacity).tolist() == belady(trace, capacity)


@given(trace=traces(longest=3), capacity=st.integers(1, 3))
def test_nothing_that_could_be_kept_finds_more(trace, capacity):
    prompts = prompts_of(trace)[:8]
    short = trace_of(*prompts)
    assert Future(short).hit_pages(capacity).sum() == best(prompts, capacity)


def test_it_declines_what_comes_once():
    trace = trace_of([0, 1], [2, 3], [4, 5], [0, 1])
    assert Future(trace).hit_pages(2).tolist() == [0, 0, 0, 2]
    assert Future(trace).hit_pages(1).tolist() == [0, 0, 0, 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("conversation", {0.01: 0.2512, 0.02: 0.3204, 0.05: 0.3736, 0.5: 0.3736}),
        ("synthetic", {0.01: 0.1889, 0.02: 0.2662, 0.05: 0.4030, 0.1: 0.5156, 0.2: 0.6191, 0.5: 0.6512}),
    ],
)
def test_the_optimum_of_the_public_traces_is_what_others_found(name, found):
    trace = public_trace(name)
    future = Future(trace)
    for share, ratio in found.items():
        assert trace.hit_tokens(future.hit_pages(int(trace.distinct * share))) / trace.tokens == pytest.approx(ratio, abs=1e-4)
