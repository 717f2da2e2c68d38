"""A program that is told to end while its workers start does end: nobody is left who waits for the others."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvtier.mover import workers


@pytest.mark.parametrize("begun", [0, 1, 2, 3])
def test_no_worker_waits_for_others_that_will_not_come(monkeypatch, begun):
    submit, pools = ThreadPoolExecutor.submit, []

    def interrupted(self, work, *arguments):
        pools.append(self)
        if len(pools) > begun:
            raise KeyboardInterrupt
        return submit(self, work, *arguments)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted)
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        workers._started(4)
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
        assert not thread.is_alive()
