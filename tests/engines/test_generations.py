"""Law checked: what was kept under other weights is not found again, whichever of an engine's threads kept it, and when."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from kvtier.engines.generations import Generations


@pytest.fixture
def engine():
    """Its weights' version, the generations, and threads as an engine has: `flush` ends those there are."""
    made = SimpleNamespace(version="default")
    made.generations = Generations(lambda: made.version, "default")
    made.threads = [ThreadPoolExecutor(1) for _ in range(2)]

    def flush():
        for thread in made.threads:
            thread.shutdown()
        made.threads = [ThreadPoolExecutor(1) for _ in range(2)]

    made.flush = flush
    made.prefix = lambda index=0: made.threads[index].submit(made.generations.prefix).result(60)
    yield made
    flush()


def test_without_a_change_keys_stay_as_they_are_however_often_the_engine_flushes(engine):
    for _ in range(3):
        assert engine.prefix(0) == engine.prefix(1) == b""
        engine.flush()


def test_another_version_is_another_generation_and_so_is_the_flush_that_follows(engine):
    seen = [engine.prefix(0)]
    engine.version = "1"
    seen.append(engine.prefix(1))  # perhaps with what the weights before computed
    assert engine.prefix(0) == engine.prefix(1) == seen[-1]
    engine.flush()
    seen.append(engine.prefix(0))
    assert engine.prefix(0) == engine.prefix(1) == seen[-1]
    engine.flush()
    assert engine.prefix(1) == seen[-1], "the weights are the same"
    engine.version = "default"
    seen.append(engine.prefix(0))
    assert len(set(seen)) == 4, "nobody knows whether they are those from before"


def test_generations_of_two_processes_differ(engine):
    other = Generations(lambda: "1", "default")
    engine.version = "1"
    assert len({engine.prefix(), other.prefix(), b""}) == 3


def test_what_is_to_be_forgotten_is_not_found(engine):
    before = engine.prefix()
    engine.generations.begin()
    assert engine.prefix(0) == engine.prefix(1) != before
