"""Law checked: what a benchmark started is gone soon after the benchmark, however that ended, with all that it started and its files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.serving import Process

ROOT = Path(__file__).parents[2]
MARK = "LEASH_MARK"
"""The variable that processes started for a room carry."""
STUBBORN = """
import os, signal, sys, time
if os.fork():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # and ends on no pipe's end
os.write(1, b"up\\n")  # at once: two write here
time.sleep(600)
"""
STARTER = f"""
import sys, time
from pathlib import Path
from benchmarks.serving import Process
room = Path(sys.argv[1])
process = Process("it", [sys.executable, "-c", {STUBBORN!r}], {{{MARK!r}: str(room)}}, room / "log")
assert [process.child.stdout.readline() for _ in range(2)] == [b"up\\n"] * 2
print("up", flush=True)
time.sleep(600)
"""


def marked(room: Path) -> list[int]:
    """The living processes that were started for this room."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={room}\0".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it ended meanwhile
            continue
    return found


def soon(true: Callable[[], bool]) -> bool:
    until = time.monotonic() + 60
    while not true() and time.monotonic() < until:
        time.sleep(0.05)
    return true()


def test_a_killed_benchmark_leaves_neither_processes_nor_files(tmp_path):
    room = tmp_path / "room"
    room.mkdir()
    with subprocess.Popen([sys.executable, "-c", STARTER, str(room)], cwd=ROOT, stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        assert starter.stdout.readline() == b"up\n"
        assert len(marked(room)) == 3, "two that were started, and the one that holds them"
        starter.send_signal(signal.SIGKILL)
    assert soon(lambda: not marked(room))
    assert soon(lambda: not room.exists())


ENDING = """
import os, sys
from benchmarks import leash
starter = int(sys.argv.pop(1))
ending = leash.end_group
def end_group(child):
    ending(child)
    if starter >= 0:
        os.close(starter)
leash.end_group = end_group
sys.exit(leash.main())
"""
"""A leash that loses its starter while its command, which ended by itself, is cleaned up after; with -1 instead of a pipe, it does not."""


@pytest.mark.parametrize("killed", [True, False])
def test_a_benchmark_that_is_killed_while_a_command_ends_leaves_no_files_either(tmp_path, killed):
    room = tmp_path / "room"
    room.mkdir()
    reading, writing = os.pipe()
    command = [sys.executable, "-c", ENDING, str(writing if killed else -1), str(reading), str(room), "true"]
    leash = subprocess.Popen(command, cwd=ROOT, pass_fds=(reading, writing) if killed else (reading,), start_new_session=True)
    if killed:
        os.close(writing)
    assert leash.wait(60) == 0
    assert room.exists() is not killed
    os.close(reading)
    if not killed:
        os.close(writing)


def test_what_is_stopped_leaves_no_processes_and_keeps_its_files(tmp_path):
    process = Process("it", [sys.executable, "-c", STUBBORN], {MARK: str(tmp_path)}, tmp_path / "log")
    assert process.child.stdout is not None
    assert process.child.stdout.readline() == b"up\n"
    process.end()
    assert marked(tmp_path) == []
    assert (tmp_path / "log").exists()


def test_what_was_left_behind_by_one_that_ended_ends_too_and_its_status_is_told(tmp_path):
    leaves = "import os, sys, time\nif os.fork(): sys.exit(3)\ntime.sleep(600)"
    process = Process("it", [sys.executable, "-c", leaves], {MARK: str(tmp_path)}, tmp_path / "log")
    process.stop()
    assert process.child.returncode == 3
    assert marked(tmp_path) == []


def test_a_process_is_asked_to_end_by_the_signal_that_it_knows(tmp_path):
    polite = "import signal, sys, time\nsignal.signal(15, lambda *_: sys.exit(7))\nprint('up', flush=True)\ntime.sleep(600)"
    process = Process("it", [sys.executable, "-c", polite], {}, tmp_path / "log")
    assert process.child.stdout is not None
    assert process.child.stdout.readline() == b"up\n"
    os.kill(process.child.pid, signal.SIGTERM)
    assert process.child.wait(60) == 7
    process.stop()
