"""The time of a prompt is taken once, without what was waited for, and reaches the cache's prices."""

from __future__ import annotations

import time

import pytest
import torch

from kvtier.engines.stopwatch import LEAST_TOKENS, Stopwatch
from kvtier.engines.transformers import Session
from tests.engines.rig import GENERATE, PROMPT, llama, open_cache

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """`time.perf_counter` that moves when told."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_the_first_prompt_is_timed_from_first_to_last_layer_without_what_it_waited_for(clock):
    watch = Stopwatch(layers=4)
    watch.reached(0, 32, 64, CPU)
    clock[0] += 2.0
    with watch.waiting():
        clock[0] += 5.0
    watch.reached(2, 32, 64, CPU)
    clock[0] += 1.0
    watch.reached(3, 32, 64, CPU)
    clock[0] += 9.0
    watch.reached(0, 96, 64, CPU)
    found = watch.result()
    assert found is not None
    assert (found.start, found.tokens) == (32, 64)
    assert found.seconds == pytest.approx(3.0 * 4 / 3), "the last layer is made up for"
    assert watch.result() is None


def test_decoding_is_no_prompt(clock):
    watch = Stopwatch(layers=2)
    for position in range(3):
        watch.reached(0, position, LEAST_TOKENS - 1, CPU)
        clock[0] += 1.0
        watch.reached(1, position, LEAST_TOKENS - 1, CPU)
    assert watch.result() is None


def test_a_session_tells_what_computing_takes(tmp_path):
    model = llama()
    with open_cache(model, tmp_path) as cache:
        Session(model, cache).generate(PROMPT, **GENERATE)
        prices = cache.stats()["prices"]
        assert prices["prefills_observed"] == 1
        assert prices["recompute_s_per_1000_tokens"] > 0
        Session(model, cache).generate(PROMPT, **GENERATE)
        assert cache.stats()["prices"]["prefills_observed"] == 1, "six tokens were left to compute: too few to tell"
