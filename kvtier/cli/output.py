"""What commands print: people read stdout, programs read `--json FILE|-`. With `--json -` stdout belongs to the program."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvtier.errors import KVTierError

if TYPE_CHECKING:
    from rich.console import Console

JsonOption = Annotated[str | None, typer.Option("--json", metavar="FILE|-", help="Also write the result as JSON; - is stdout.")]


def human_console(json_target: str | None = None) -> Console:
    """Where text for people goes: stdout, or stderr when stdout carries JSON."""
    from rich.console import Console

    # Names of files and traces may look like markup; they are shown as they are.
    return Console(stderr=json_target == "-", highlight=False, markup=False)


def check_json_target(target: str | None) -> None:
    """KVTierError now, rather than after a long run, if `write_json` could not write to `target`. Leaves an existing file as it is."""
    if target is None or target == "-":
        return
    try:
        existed = Path(target).exists()
        Path(target).open("ab").close()
        if not existed:
            Path(target).unlink()
    except OSError as error:
        raise _cannot_write(target, error) from None


def write_json(data: object, target: str | None) -> None:
    """Write `data` as JSON to the file `target`, to stdout for "-", nowhere for None. KVTierError if it cannot be written."""
    if target is None:
        return
    text = json.dumps(data, indent=2) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    try:
        Path(target).write_text(text, encoding="utf-8")
    except OSError as error:
        raise _cannot_write(target, error) from None


def _cannot_write(target: str, error: OSError) -> KVTierError:
    return KVTierError(f"cannot write {target}: {error.strerror}; give --json a file in an existing, writable directory")
