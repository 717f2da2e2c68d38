"""Text files with one record a line, packed or not: read line by line with errors that name the line, and written whole or not at all.

Of any format: what a line means is for `trace.py` and `convert.py` to say. No state.
"""

from __future__ import annotations

import gzip
import json
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO, cast

from kvtier.errors import TraceError


def read_lines(path: Path, expected: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of a JSONL file, each with the number of its line; empty lines are passed over.

    TraceError for anything else, which says that a line like `expected` was.
    """
    for number, line in read_text_lines(path):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict):
            raise TraceError(f"{path}: line {number} is not a JSON object ({shown(line)}); expected one like {expected}")
        yield number, fields


def read_text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file, plain or gzip, with their numbers from 1. TraceError if it cannot be read."""
    try:
        with open_text(path) as file:
            yield from enumerate(file, 1)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise TraceError(f"cannot read {path}: {reason}; give it a text file, plain or as .gz") from None


def open_text(path: Path, mode: str = "r") -> TextIO:
    """The file as text, through gzip if its name ends in `.gz`. OSError if it cannot be opened."""
    encoding = "utf-8-sig" if mode == "r" else "utf-8"  # tables of Windows programs begin with a mark
    if path.suffix == ".gz":
        # Without the time of writing, so that equal traces are equal files.
        return TextIOWrapper(gzip.GzipFile(path, f"{mode}b", mtime=0), encoding=encoding, newline="")
    return cast(TextIO, path.open(mode, encoding=encoding, newline=""))


@contextmanager
def written_whole(path: Path) -> Iterator[TextIO]:
    """A text file to write, packed if its name ends in `.gz`, that takes the place of `path` when all is in it, and never half of it.

    Whatever ends the writing leaves what was there as it was: it may be the trace that is being converted. Devices and pipes are written
    to as they are. OSError if it cannot be written.
    """
    if path.exists() and not path.is_file():
        with open_text(path, "w") as file:
            yield file
        return
    target = path.resolve()
    # In a folder of its own under its own name, which gzip writes into the file: equal traces are equal files.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".kvtier-") as folder:
        whole = Path(folder) / target.name
        with open_text(whole, "w") as file:
            yield file
        if target.exists():
            whole.chmod(target.stat().st_mode & 0o777)
        whole.replace(target)


def whole(fields: dict[str, Any], key: str, least: int, where: str, default: int | None = None) -> int:
    """A whole number of at least `least`. TraceError that says `where` if it is missing (without a `default`) or something else."""
    value = fields.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**53:
        raise TraceError(f"{where}: {key} is {shown(json.dumps(value))}; expected a whole number, at least {least}")
    return value


def number_at_least_0(fields: dict[str, Any], key: str, where: str) -> float:
    """A time of 0 or more. TraceError that says `where` if it is missing or something else."""
    value = fields.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**53:
        raise TraceError(f"{where}: {key} is {shown(json.dumps(value))}; expected a time of 0 or more")
    return float(value)


def shown(text: str) -> str:
    """`text` as an error can show it: its first 60 characters."""
    text = text.strip()
    return text if len(text) <= 60 else f"{text[:57]}..."
