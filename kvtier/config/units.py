"""Byte sizes as people write them."""

from __future__ import annotations

import re
from fractions import Fraction

KiB, MiB, GiB, TiB = 2**10, 2**20, 2**30, 2**40
BYTE_UNITS = {"TiB": TiB, "GiB": GiB, "MiB": MiB, "KiB": KiB, "TB": 10**12, "GB": 10**9, "MB": 10**6, "kB": 10**3, "B": 1}


def parse_bytes(value: object) -> int:
    """Bytes from a whole number or text such as "8GiB", "64 MiB", "500MB", "1.5GiB". ValueError says what is wrong."""
    expected = 'expected a whole number of bytes or text like "8GiB", "64 MiB", "500MB"'
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([+-]?[0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", value)
        if match is None or len(value) > 40:
            raise ValueError(expected)
        units = {unit.lower(): size for unit, size in BYTE_UNITS.items()}
        unit = match[2].lower() or "b"
        if unit not in units:
            raise ValueError(f"unknown unit {match[2]!r}, expected one of {', '.join(reversed(BYTE_UNITS))}")
        exact = Fraction(match[1]) * units[unit]
    elif isinstance(value, int) and not isinstance(value, bool):
        exact = Fraction(value)
    else:
        raise ValueError(expected)
    if exact < 0:
        raise ValueError("a size cannot be negative")
    if exact.denominator != 1:
        raise ValueError("this is not a whole number of bytes")
    if exact >= 2**63:
        raise ValueError("larger than any machine can address")
    return int(exact)


def format_bytes(value: int) -> str:
    """The shortest text that `parse_bytes` reads back exactly: 4294967296 -> "4GiB"."""
    exact = [f"{value // size}{unit}" for unit, size in BYTE_UNITS.items() if size > 1 and value and value % size == 0]
    return min([*exact, str(value)], key=len)
