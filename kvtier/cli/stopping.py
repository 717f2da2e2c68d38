"""Long commands that are told to end: what they started is stopped, and their files go, as after Ctrl-C."""

from __future__ import annotations

import signal
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
_AGAIN_S = 0.05
"""How long after an ending was dropped it is asked for again: by then whoever dropped it has gone on."""


class _Ending(SystemExit):
    """SystemExit that can be watched: weak references to that one itself are not possible."""


@contextmanager
def stopped_in_order() -> Iterator[None]:
    """While in here, SIGTERM ends this program as an exception does, with status 143; so does SIGHUP (129); unless they are ignored. One
    that comes again while files are cleared away keeps nothing from being. For the main thread.

    Others' code may drop that exception: Cython's modules do while they are imported, and Python itself where it comes while an object is
    taken apart. An exception on its way is alive, also while files are cleared away for it, so one that is gone was dropped, and the
    signal is sent again.
    """
    main, inside, under_way = threading.get_ident(), True, False

    def send(number: int) -> None:
        if inside:
            signal.pthread_kill(main, number)

    def dropped(number: int) -> None:
        nonlocal under_way
        under_way = False
        if inside:
            again = threading.Timer(_AGAIN_S, send, (number,))
            again.daemon = True
            again.start()

    def ending(number: int) -> _Ending:
        asked = _Ending(128 + number)
        weakref.finalize(asked, dropped, number).atexit = False
        return asked

    def end(number: int, _: object) -> None:
        nonlocal under_way
        if under_way:
            return
        under_way = True
        raise ending(number)  # in no variable of this frame, which it refers to: it would keep itself alive

    before = {number: signal.getsignal(number) for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        inside = False
        for number, handler in before.items():
            signal.signal(number, handler)
