"""Lists of CPU and node numbers as the kernel writes them: "0-3,8" (cpulist format, as in /sys and `taskset -c`)."""

from __future__ import annotations

from collections.abc import Iterable

from kvtier.errors import NumaError

_MOST_IDS = 1 << 16  # far above any machine; a typing error like 0-4000000000 must not fill memory


def parse_ids(text: str) -> tuple[int, ...]:
    """Ascending numbers of a list like "0-3,8"; empty text is an empty list. NumaError if it is not one."""
    found: set[int] = set()
    for part in text.strip().split(","):
        if not text.strip():
            continue
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (not dash or last.isdecimal())):
            raise NumaError(f"{text.strip()!r} is not a list of CPUs or nodes; expected numbers and ranges such as 0-3,8")
        low, high = int(first), int(last or first)
        if high < low or high >= _MOST_IDS:
            raise NumaError(f"{text.strip()!r}: the range {part.strip()} is not ascending or beyond {_MOST_IDS}")
        found.update(range(low, high + 1))
    return tuple(sorted(found))


def format_ids(ids: Iterable[int]) -> str:
    """The shortest such list: {0, 1, 2, 8} -> "0-2,8"."""
    runs: list[list[int]] = []
    for number in sorted(set(ids)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
