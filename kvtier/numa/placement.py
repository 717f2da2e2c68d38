"""Where memory really is, and moving it: the kernel asked page by page (move_pages), or mapping by mapping (/proc/PID/numa_maps)."""

from __future__ import annotations

import errno
import mmap
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kvtier.errors import NumaError
from kvtier.numa import syscalls
from kvtier.numa.topology import ROOT

PAGE_BYTES = mmap.PAGESIZE
_LINE = re.compile(r"([0-9a-f]+) ((?:prefer \(many\)|weighted interleave|[a-z]+)\S*)(.*)")
_PAGEMAP = Path("/proc/self/pagemap")
_BATCH = 1 << 14  # pages per system call: some milliseconds each


@dataclass(frozen=True)
class Placement:
    """Pages looked at, by the node they are on; `untouched` have no memory yet, `unknown` the kernel would not tell."""

    on: Mapping[int, int]
    untouched: int = 0
    unknown: int = 0

    @property
    def pages(self) -> int:
        """Pages that are somewhere."""
        return sum(self.on.values())

    def share_on(self, nodes: Iterable[int]) -> float:
        """Share of the pages that are somewhere which is on one of these nodes; 0 if none is anywhere."""
        return sum(self.on.get(node, 0) for node in set(nodes)) / self.pages if self.pages else 0.0


def placement(address: int, length: int, samples: int | None = 4096, page_bytes: int = PAGE_BYTES) -> Placement:
    """Where the pages of [address, address + length) of this process are: `samples` of them, evenly spread; all for None.

    `page_bytes`: distance of the addresses looked at; the size of huge pages for memory of huge pages. OSError if the kernel refuses.
    """
    pages = _pages(address, length, page_bytes)
    if samples is not None and len(pages) > samples:
        pages = [pages[position * len(pages) // samples] for position in range(samples)]
    status = [answer for start in range(0, len(pages), _BATCH) for answer in syscalls.move_pages(pages[start : start + _BATCH])]
    found = Counter(status)
    hidden = _hidden([page for page, answer in zip(pages, status, strict=True) if answer == -errno.ENOENT])
    found[-errno.ENOENT] -= len(hidden)
    found.update(map(syscalls.node_at, hidden))
    return Placement(
        on={node: count for node, count in sorted(found.items()) if node >= 0},
        untouched=found[-errno.ENOENT] + found[-errno.EFAULT],  # EFAULT: the shared page of zeros, or nothing mapped
        unknown=sum(count for answer, count in found.items() if answer < 0 and -answer not in (errno.ENOENT, errno.EFAULT)),
    )


def move_memory(address: int, length: int, node: int, page_bytes: int = PAGE_BYTES) -> Placement:
    """Move the pages of a range of this process to a node; where they are afterwards. Locked pages move, pages pinned by devices do not.

    NumaError if there is no such node or it is not allowed; OSError for the kernel's other refusals.
    """
    pages = _pages(address, length, page_bytes)
    for start in range(0, len(pages), _BATCH):
        batch = pages[start : start + _BATCH]
        try:
            syscalls.move_pages(batch, [node] * len(batch))
        except OSError as error:
            if error.errno in (errno.ENODEV, errno.EACCES, errno.EINVAL):
                raise NumaError(f"cannot move memory to node {node}: there is no such node with memory in this process's cpuset") from None
            raise
    return placement(address, length, None, page_bytes)


@dataclass(frozen=True)
class MappedRange:
    """One line of numa_maps: start address, policy as the kernel writes it ("bind:0", "interleave:0-1"), pages by node, page size."""

    address: int
    policy: str
    on: Mapping[int, int]
    page_bytes: int
    anonymous: bool
    about: str


def read_numa_maps(pid: int | str = "self", root: Path = ROOT) -> list[MappedRange]:
    """The mappings of a process. OSError if it is gone or another user's; NumaError where the kernel keeps no such file."""
    path = root / "proc" / str(pid) / "numa_maps"
    if not path.exists() and path.parent.exists():
        raise NumaError("this kernel keeps no numa_maps (CONFIG_NUMA is off); placement cannot be read")
    mappings = []
    for line in path.read_text().splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            raise NumaError(f"{path} has a line that is not understood: {line[:80]}")
        start, policy, facts = match[1], match[2], match[3].split()
        on = {int(share[1]): int(share[2]) for fact in facts if (share := re.fullmatch(r"N([0-9]+)=([0-9]+)", fact))}
        size = next((int(fact.removeprefix("kernelpagesize_kB=")) for fact in facts if fact.startswith("kernelpagesize_kB=")), 4)
        about = next((fact for fact in facts if fact.startswith(("file=", "heap", "stack"))), "")
        mappings.append(MappedRange(int(start, 16), policy, on, size << 10, any(fact.startswith("anon=") for fact in facts), about))
    return mappings


def bytes_by_node(mappings: Iterable[MappedRange], anonymous_only: bool = True) -> dict[int, int]:
    """Bytes per node over mappings; by default of the process's own pages, without files it shares."""
    total: Counter[int] = Counter()
    for mapping in mappings:
        if mapping.anonymous or not anonymous_only:
            for node, pages in mapping.on.items():
                total[node] += pages * mapping.page_bytes
    return dict(sorted(total.items()))


def _hidden(missing: list[int]) -> list[int]:
    """Pages that are there although the kernel said they are not.

    Automatic NUMA balancing takes away access to pages of unbound memory, to see who uses them, and move_pages of Linux 6.1 to 6.5 then
    denies that they exist. Asking for the node of one by its address gives the access back, as any use would.
    """
    if not missing or not _PAGEMAP.exists():
        return []
    with _PAGEMAP.open("rb", buffering=0) as table:
        return [page for page in missing if _present(os.pread(table.fileno(), 8, page // PAGE_BYTES * 8))]


def _present(entry: bytes) -> bool:
    return len(entry) == 8 and bool(entry[7] & 0x80)


def _pages(address: int, length: int, page_bytes: int) -> list[int]:
    first = address // page_bytes * page_bytes
    return list(range(first, address + length, page_bytes))
