"""Runs a command that ends when whoever started it is gone, however that went: also after `kill -9`, also what the command started itself.

`python leash.py PIPE ROOM COMMAND...`: PIPE is the number of the reading end of a pipe whose other end only the starter has. A byte in it
ends the command; its end, which is the starter's, ends it too and removes the folder ROOM, also if it comes while the command ends anyway.
Signals alone do not do that: the kernel sends the one a child may ask for at its parent's end (PR_SET_PDEATHSIG) to that child, not to what
it started. Standard library only, without `site`: it has to be there at once. State: the command's process group, in the session of this
process.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

GRACE_S, LOOK_S = 5.0, 0.05
"""How long a group may take to end when it is asked to (shared memory wants to be given back); how often that is looked at."""


def leashed(pipe: int, room: Path, command: Sequence[str]) -> list[str]:
    """The command that runs `command` so; give it `pipe` (`pass_fds`) and make it the leader of a session."""
    return [sys.executable, "-I", "-S", __file__, str(pipe), str(room), *command]


def main() -> int:
    """See the file's head. The exit status is the command's."""
    pipe, room, *command = sys.argv[1:]
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    child = subprocess.Popen(command, process_group=0)
    ended, starter = os.pidfd_open(child.pid), int(pipe)
    while True:
        ready = select.select([ended, starter, woken], [], [])[0]
        if woken in ready:
            os.read(woken, 64)
            child.terminate()
        if ended in ready or starter in ready:
            break
    end_group(child)
    if is_closed(starter):
        shutil.rmtree(room, ignore_errors=True)
    return child.wait()


def is_closed(pipe: int) -> bool:
    """Whether nobody has the other end of a pipe any more."""
    while select.select([pipe], [], [], 0)[0]:
        if not os.read(pipe, 64):
            return True
    return False


def end_group(child: subprocess.Popen[bytes]) -> None:
    """Ask the child and what it started to end, and end what is there after `GRACE_S`."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
        until = time.monotonic() + GRACE_S
        while time.monotonic() < until:
            child.poll()  # a child that ended counts until somebody asks for its status
            os.killpg(child.pid, 0)
            time.sleep(LOOK_S)
        os.killpg(child.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
