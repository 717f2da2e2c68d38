"""What a forked child gets of things that have threads: an error instead of a wait for what never comes.

Only the thread that forks goes on in the child (fork(2)). Other threads are not there, a lock that one of them held stays shut, and the
memory of regions is not there either (`kvtier.memory.region`). Whatever has threads, or locks that threads hold, says so once
(`tell_children`); nothing is asked while it works. State: what was made and still lives, weakly.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from types import TracebackType
from typing import NoReturn, Protocol

from kvtier.errors import Closed


class LeftBehind:
    """In a child, in the place of a lock or of threads that are its parent's: whoever would wait for them gets Closed."""

    def __init__(self, what: str) -> None:
        self.why = (
            f"{what} was made in process {os.getppid()}, from which this one ({os.getpid()}) was forked, and threads stay behind; "
            "make a new one here, a disk store under another path, or start processes by the method spawn"
        )

    def refuse(self) -> NoReturn:
        """Closed, and why."""
        raise Closed(self.why)

    def __enter__(self) -> bool:
        self.refuse()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Nothing was entered."""


class _Forkable(Protocol):
    def after_fork_in_child(self) -> None:
        """In a child: take leave of threads and locks, without waiting for any. What is open stays the parent's."""


_living: weakref.WeakSet[_Forkable] = weakref.WeakSet()


def tell_children(thing: _Forkable) -> None:
    """Call `thing.after_fork_in_child()` in every child that is forked while it lives."""
    _living.add(thing)


def keep_for_ever(thing: object) -> None:
    """Never let it end in this process: its end would wait for threads that are not there."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _forked() -> None:
    for thing in list(_living):
        thing.after_fork_in_child()
    _living.clear()


os.register_at_fork(after_in_child=_forked)
