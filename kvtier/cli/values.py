"""Values of options as they are typed, and the error that names the option where one is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from kvtier.errors import KVTierError

Number = TypeVar("Number", int, float)


def parse_size(option: str, text: str) -> int:
    """Bytes, like 1GiB; KVTierError if that is no size."""
    from kvtier.config.units import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise KVTierError(f"{option} {text}: {error}") from None


def parse_some(option: str, text: str) -> int:
    """Bytes, more than none."""
    size = parse_size(option, text)
    if not size:
        raise KVTierError(f"{option} {text}: expected more than 0")
    return size


def parse_numbers(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    """The values of an option that takes several with commas between; KVTierError if one is no such number."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise KVTierError(f"{option} {text}: expected numbers with commas between, like 1,4") from None


def checked_path(path: Path | None) -> Path | None:
    """A `--path`, if one was given; KVTierError unless it is a directory."""
    if path is not None and not path.is_dir():
        raise KVTierError(f"--path {path} is not a directory; name an existing one")
    return path
