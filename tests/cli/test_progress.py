"""Law checked: long commands say how far they are where nobody sees a bar, too."""

from __future__ import annotations

import threading
import time

from kvtier.cli import progress as module
from kvtier.cli.output import human_console
from kvtier.cli.progress import shown_progress


def test_without_a_terminal_a_line_comes_now_and_then_and_only_while_there_is_work(capsys, monkeypatch):
    monkeypatch.setattr(module, "EVERY_S", 0.01)
    told = ""
    with shown_progress(human_console()) as progress:
        task = progress.add_task("", total=None)
        progress.update(task, description="session 2, turn 1", completed=3, total=15)
        while ", 3 of 15: session 2, turn 1\n" not in told:
            time.sleep(0.01)
            told += capsys.readouterr().err
    assert "progress" not in [thread.name for thread in threading.enumerate()]
    assert capsys.readouterr().out == ""
    assert told.startswith("kvtier: 0 s")
