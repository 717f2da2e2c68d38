"""How far long commands are: a bar on a terminal; elsewhere (CI, nohup, `docker logs`) a line on stderr now and then."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn

EVERY_S = 30.0
"""Where there is no terminal, a line comes so often."""


@contextmanager
def shown_progress(console: Console, *columns: ProgressColumn, transient: bool = True) -> Iterator[Progress]:
    """Rich's progress, whose tasks are shown in either way; `columns` and `transient` are those of the bar."""
    from rich.progress import Progress

    if console.is_terminal:
        with Progress(*columns, console=console, transient=transient) as progress:
            yield progress
        return
    progress, ended, start = Progress(console=console, disable=True), threading.Event(), time.monotonic()

    def tell() -> None:
        while not ended.wait(EVERY_S):
            for task in [task for task in progress.tasks if not task.finished]:
                share = "" if task.total is None else f", {task.completed:g} of {task.total:g}"
                print(f"kvtier: {time.monotonic() - start:.0f} s{share}: {task.description}", file=sys.stderr, flush=True)

    teller = threading.Thread(target=tell, name="progress", daemon=True)
    teller.start()
    try:
        yield progress
    finally:
        ended.set()
        teller.join()
