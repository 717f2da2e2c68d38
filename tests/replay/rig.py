"""Traces to test with: small ones of any shape from Hypothesis, and the public ones where they are."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path

import pytest
from hypothesis import strategies as st

from kvtier.policy import ROOT
from kvtier.replay.trace import Request, Trace, build_trace, read_trace

BLOCK = 4
"""Tokens of a block in made-up traces."""
PUBLIC = Path(os.environ.get("KVTIER_TRACES", Path(__file__).parents[3] / "shared" / "traces"))


def public_trace(name: str) -> Trace:
    """One of Mooncake's traces; skips where it is not."""
    path = PUBLIC / f"mooncake_{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here; set KVTIER_TRACES to the folder of the Mooncake traces")
    return read_trace(path)


def trace_of(*prompts: list[int], step_ms: int = 1000, tail: int = BLOCK) -> Trace:
    """A request a second for each of these lists of block ids; its last block has `tail` tokens."""
    requests = [Request(place * step_ms, (len(ids) - 1) * BLOCK + tail, 1, ids) for place, ids in enumerate(prompts)]
    return build_trace("t", requests, BLOCK)


@st.composite
def traces(draw: st.DrawFn, moments: bool = True, longest: int = 6) -> Trace:
    """Prompts that go on from the beginning of earlier ones; some come at the same moment, unless there are no `moments`."""
    fresh = count()
    prompts: list[list[int]] = []
    requests = []
    at_ms = 0
    for _ in range(draw(st.integers(1, 25))):
        head = draw(st.sampled_from([[], *prompts]))
        kept = head[: draw(st.integers(0, len(head)))]
        more = draw(st.integers(0 if kept else 1, longest))
        prompt = [*kept, *(next(fresh) for _ in range(more))][:longest]
        prompts.append(prompt)
        at_ms += draw(st.sampled_from([0, 500, 7000])) if moments else 1000
        requests.append(Request(at_ms, (len(prompt) - 1) * BLOCK + draw(st.integers(1, BLOCK)), 0, prompt))
    return build_trace("t", requests, BLOCK)


def prompts_of(trace: Trace) -> list[list[int]]:
    """The pages of each request."""
    return [trace.pages[start:stop].tolist() for start, stop in zip(trace.starts[:-1], trace.starts[1:], strict=True)]


def prefix_in(prompt: list[int], here: set[int]) -> int:
    """Pages of the longest prefix that is here."""
    return next((place for place, page in enumerate(prompt) if page not in here), len(prompt))


def parents_of(trace: Trace) -> dict[int, int]:
    """The page before each, ROOT for none."""
    return {page: parent for prompt in prompts_of(trace) for parent, page in zip([ROOT, *prompt], prompt, strict=False)}
