"""A real fork, bounded in time: what is done in the child ends, or the child is killed and the answer says so."""

from __future__ import annotations

import os
import select
import signal
import warnings
from collections.abc import Callable

HUNG = "hung"


def in_child(work: Callable[[], object], seconds: float = 60) -> str:
    """In a child that is forked now: what `work()` gave, or the error it raised, as text; HUNG if it had not ended after so long."""
    read_end, write_end = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of what is tested here
        child = os.fork()
    if not child:
        try:
            said = str(work())
        except BaseException as error:  # noqa: BLE001 - told to the parent, and nothing of the parent's runs on here
            said = f"{type(error).__name__}: {error}"
        os.write(write_end, said.encode())
        os._exit(0)
    os.close(write_end)
    try:
        ended, _, _ = select.select([read_end], [], [], seconds)
        if not ended:
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return os.read(read_end, 1 << 16).decode() if ended else HUNG
    finally:
        os.close(read_end)
