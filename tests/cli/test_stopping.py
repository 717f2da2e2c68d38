"""A run that is told to end takes its files with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time


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
