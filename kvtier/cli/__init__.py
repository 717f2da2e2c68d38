"""The command line. `main` is the entry point: errors of kvtier become one line on stderr, never a traceback."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from io import TextIOWrapper
from typing import Any

from kvtier.errors import KVTierError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `kvtier` with `argv` (default: the process's) and return the exit code: 2 for errors, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a name the terminal cannot show is no reason for a traceback
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            done = _command()(args=None if argv is None else list(argv), prog_name="kvtier", standalone_mode=False)
            return done if isinstance(done, int) else 0
        except SystemExit as done:
            return done.code if isinstance(done.code, int) else int(done.code is not None)
        finally:
            sys.stdout.flush()
    except KVTierError as error:
        print(f"kvtier: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except _usage_error() as error:
        if message := " ".join(error.format_message().split()):  # none where the help was printed, because nothing was asked
            asked = "kvtier" if error.ctx is None else error.ctx.command_path
            print(f"kvtier: error: {message[0].lower()}{message[1:].rstrip('.')}; see `{asked} --help`", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has left.
        _let_stdout_go()
        return 1
    except OSError as error:
        if error.filename is not None or error.errno not in _FULL:
            raise
        print(f"kvtier: error: cannot write the output: {error.strerror}; send it where there is room", file=sys.stderr)
        _let_stdout_go()
        return 2


@lru_cache(maxsize=1)
def _command() -> Callable[..., Any]:
    """All commands, made once: Typer's own call looks at every parameter of every command anew, and tests call `main` hundreds of times."""
    from typer.main import get_command

    from kvtier.cli.app import app

    return get_command(app)


def _usage_error() -> Any:
    """What Typer raises where a command line cannot be read, whichever click it brings."""
    from typer import BadParameter

    return BadParameter.__base__


def _let_stdout_go() -> None:
    # Python flushes stdout once more at exit; give it somewhere to go.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
