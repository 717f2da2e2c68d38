"""A run that is told to end takes its files with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest


def test_a_terminated_run_leaves_no_store_behind(tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "kvtier", "run"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as running:
        until = time.monotonic() + 120
        while not list(tmp_path.glob("kvtier-run-*/*")):
            assert running.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        running.terminate()
        assert running.wait(60) == 128 + signal.SIGTERM
    assert not list(tmp_path.glob("kvtier-run-*"))


def test_a_trace_that_is_being_written_leaves_nothing_behind(tmp_path):
    command = [sys.executable, "-m", "kvtier", "trace", "make", str(tmp_path / "t.jsonl"), "--mix", "chat=1", "--requests", "10000000"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        until = time.monotonic() + 120
        while not list(tmp_path.iterdir()):
            assert running.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        running.terminate()
        assert running.wait(60) == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


DROPPED = """
import time
from kvtier.cli.stopping import stopped_in_order

class Discarded:
    def __del__(self):
        print("here", flush=True)
        time.sleep(60)

def dropped_by_a_handler():
    try:
        print("here", flush=True)
        time.sleep(60)
    except BaseException:
        pass

with stopped_in_order():
    try:
        {dropping}
        time.sleep(60)
    finally:
        time.sleep(0.5)  # what clears up is not asked again
        print("cleared up", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("dropping", ["dropped_by_a_handler()", "Discarded()"])
def test_an_ending_that_others_drop_is_asked_for_again(dropping, number):
    command = [sys.executable, "-c", DROPPED.replace("{dropping}", dropping)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "here\n"
        running.send_signal(number)
        assert running.stdout.read() == "cleared up\n"
        assert running.wait(30) == 128 + number


def test_a_run_that_a_closed_terminal_does_not_end_goes_on():
    """As under nohup."""
    ignored = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    command = [sys.executable, "-c", ignored + DROPPED.replace("{dropping}", "print('here', flush=True)")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "here\n"
        running.send_signal(signal.SIGHUP)
        running.terminate()
        assert running.wait(30) == 128 + signal.SIGTERM


AGAIN = """
import os, signal, time
from kvtier.cli.stopping import stopped_in_order

with stopped_in_order():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    finally:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)
        print("cleared up", flush=True)
"""


def test_an_ending_that_is_asked_for_again_meanwhile_keeps_nothing_from_being_cleared_away():
    done = subprocess.run([sys.executable, "-c", AGAIN], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("cleared up\n", 128 + signal.SIGTERM), done.stderr
