"""The block store on bad days: killed, corrupted, full, larger than its room, closed meanwhile. Every block is whole or a miss."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kvtier.blocks import Presence
from tests.blocks.rig import RECORD, SIZE, block, damage, get, keys, open_store, put

ROOT = Path(__file__).parents[2]


def test_after_kill_9_in_the_middle_of_writing_every_block_is_whole_or_a_miss(tmp_path):
    script = f"""
from tests.blocks.rig import *
store = open_store(Path({str(tmp_path)!r}), 400)
put(store, 0)
print("ready", flush=True)
for number in range(1, 10**6):
    store.submit_put(keys(number), [block(number)])
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    threading.Event().wait(0.3)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    with open_store(tmp_path, 400) as store:
        found = [number for number in range(3000) if store.exists(keys(number)) == [True]]
        assert found
        assert all(get(store, *found))
        assert put(store, 10**7) == [True]
        store.check_integrity()


def test_a_corrupted_record_is_a_miss_and_can_be_put_again(tmp_path):
    with open_store(tmp_path) as store:
        put(store, 1, 2)
        damage(tmp_path, 1)
        assert get(store, 1, 2) == [False, True]
        assert store.exists(keys(1, 2)) == [False, True]
        assert store.stats()["refused: checksum"] == 1
        assert put(store, 1) == [True]
        assert get(store, 1) == [True]
        store.check_integrity()


def test_a_corrupted_record_that_is_still_being_read_is_not_taken_for_stored(tmp_path):
    with open_store(tmp_path) as store:
        put(store, 1)
        damage(tmp_path, 1)
        rows = store._contents.find(keys(1))
        store._contents.table.hold(rows, 0)
        assert get(store, 1) == [False]
        assert put(store, 1) == [False]
        assert store.exists(keys(1)) == [False]
        store._contents.unhold(rows)
        assert put(store, 1) == [True]
        assert get(store, 1) == [True]
        store.check_integrity()


def test_a_full_store_lets_blocks_go_and_never_exceeds_its_room(tmp_path):
    with open_store(tmp_path, 8) as store:
        for number in range(40):
            assert put(store, number) == [True]
            assert store.stats()["disk"]["bytes_used"] <= 8 * RECORD
        here = store.exists(keys(*range(40)))
        assert sum(here) == 8
        assert here[39]
        assert store.stats()["evicted"] == 32
        store.check_integrity()


def test_a_batch_larger_than_the_store_keeps_its_beginning(tmp_path):
    with open_store(tmp_path, 4) as store:
        assert put(store, *range(10)) == [True] * 4 + [False] * 6
        assert store.stats()["no room"] == 6
        store.check_integrity()


def test_a_full_queue_turns_writes_away_and_reads_still_come(tmp_path):
    with open_store(tmp_path, 64, mover__queue_bytes=2 * SIZE) as store:
        put(store, 1)
        gate = threading.Event()
        for _ in range(2):
            store._mover.workers.submit(None, gate.wait)
        waiting = [store.submit_put(keys(number), [block(number)]) for number in range(10, 20)]
        read = store.submit_get(keys(1), [np.zeros(SIZE, np.uint8)])
        assert Presence.COMING in store.lookup(keys(*range(10, 20)))
        gate.set()
        assert read.result(60) == [True]
        stored = [future.result(60)[0] for future in waiting]
        assert 0 < sum(stored) < 10
        assert store.exists(keys(*range(10, 20))) == stored
        assert store.stats()["turned away"] == stored.count(False)
        store.check_integrity()


def test_deleting_what_is_being_written_or_read_waits_for_the_end(tmp_path):
    with open_store(tmp_path) as store:
        put(store, 1)
        gate = threading.Event()
        for _ in range(2):
            store._mover.workers.submit(None, gate.wait)
        memory = np.zeros(SIZE, np.uint8)
        reading, writing = store.submit_get(keys(1), [memory]), store.submit_put(keys(2), [block(2)])
        assert store.delete(keys(1, 2)) == 2
        assert store.lookup(keys(1, 2)) == [Presence.ABSENT] * 2
        gate.set()
        assert reading.result(60) == [True]
        np.testing.assert_array_equal(memory, block(1))
        writing.result(60)
        store.drain(60)
        assert store.exists(keys(1, 2)) == [False, False]
        assert store.stats()["blocks"] == 0
        store.check_integrity()


def test_a_store_is_drained_once_everybody_was_answered(tmp_path, monkeypatch):
    with open_store(tmp_path) as store:
        gate, ending, go_on = threading.Event(), threading.Event(), threading.Event()
        for _ in range(2):
            store._mover.workers.submit(None, gate.wait)
        future = store.submit_put(keys(1), [block(1)])
        answer = future.set_result

        def slowly(done: list[bool]) -> None:
            ending.set()
            go_on.wait(60)
            answer(done)

        monkeypatch.setattr(future, "set_result", slowly)
        gate.set()
        assert ending.wait(60)
        with pytest.raises(TimeoutError):
            store.drain(0.1)
        go_on.set()
        store.drain(60)
        assert future.done()


def test_closing_ends_what_runs_and_answers_everybody(tmp_path):
    store = open_store(tmp_path, 200)
    futures = [store.submit_put(keys(number), [block(number)]) for number in range(100)]
    store.close()
    stored = [future.result(60)[0] for future in futures]
    with open_store(tmp_path, 200) as store:
        assert store.exists(keys(*range(100))) == stored
        assert all(get(store, *(number for number, here in enumerate(stored) if here)))


def test_many_threads_at_once_get_what_was_put(tmp_path):
    with open_store(tmp_path, 40, mover__workers=3) as store:

        def work(seed: int) -> int:
            choose = np.random.default_rng(seed)
            came = 0
            for _ in range(60):
                numbers = [int(number) for number in choose.choice(60, 5, replace=False)]
                match choose.integers(4):
                    case 0:
                        store.delete(keys(numbers[0]))
                    case 1:
                        put(store, *numbers)
                    case _:
                        came += sum(get(store, *numbers))
            return came

        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(work, range(4))) > 0
        store.drain()
        store.check_integrity()
