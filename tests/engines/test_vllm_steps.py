"""Laws checked, without vLLM: what is read out of its scheduler's plan of a step, and which steps are timed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kvtier.engines.vllm.steps import PrefillClock, fed, written

PAGE = 4


def new(name, computed, *blocks):
    return SimpleNamespace(req_id=name, num_computed_tokens=computed, block_ids=(list(blocks),))


def output(*fresh, running=(), resumed=(), copied=None, tokens=None):
    """A step of `fresh` requests and of `running` ones: (name, computed, new blocks or None)."""
    names, computed, blocks = ([row[place] for row in running] for place in range(3))
    return SimpleNamespace(
        scheduled_new_reqs=list(fresh),
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=names,
            num_computed_tokens=computed,
            new_block_ids=[None if each is None else (each,) for each in blocks],
            resumed_req_ids=set(resumed),
        ),
        num_scheduled_tokens=tokens or {},
        kv_cache_block_copies=copied,
    )


def test_new_and_running_requests_are_fed():
    assert fed(output(new("a", 8, 1, 2, 3), running=[("b", 5, None), ("c", 12, [7])])) == [("a", 8), ("b", 5), ("c", 12)]


def test_blocks_behind_what_is_computed_are_written_and_those_of_running_requests_that_are_new():
    copied = [SimpleNamespace(dst_block_id=9)]
    step = output(new("a", 8, 1, 2, 3), running=[("b", 5, None), ("c", 12, [7, 8])], copied=copied)
    assert sorted(block for blocks in written(step, PAGE) for block in blocks) == [3, 7, 8, 9]


def test_a_request_that_comes_back_gets_all_its_blocks_anew_and_keeps_those_that_are_computed():
    step = output(running=[("c", 8, [4, 5, 6])], resumed=["c"])
    assert [block for blocks in written(step, PAGE) for block in blocks] == [6]


@pytest.fixture
def clock(monkeypatch):
    times = iter([1.0, 2.0, 4.0, 7.0])
    monkeypatch.setattr("kvtier.engines.vllm.steps.time.perf_counter", lambda: next(times))


@pytest.mark.usefixtures("clock")
def test_a_step_of_one_prompt_is_timed_from_when_the_step_before_it_ended():
    prefills = PrefillClock(PAGE)
    prefills.begin(output(new("a", 8), tokens={"a": 16}))
    prefills.begin(output(running=[("a", 24, None)], tokens={"a": PAGE}))
    assert prefills.end() == (8, 16, 3.0)
    assert prefills.end() == (24, PAGE, 3.0), "though it was planned before the first had ended"
    assert prefills.end() is None, "nothing is under way"


@pytest.mark.parametrize(
    "step",
    [
        output(new("a", 0), new("b", 0), tokens={"a": 16, "b": 16}),
        output(running=[("a", 24, None)], tokens={"a": PAGE - 1}),
        output(),
    ],
    ids=["two requests", "less than a page", "none"],
)
def test_other_steps_are_not(step):
    prefills = PrefillClock(PAGE)
    prefills.begin(step)
    assert prefills.end() is None
