"""The kernel's NUMA calls, made directly: no libnuma. Each raises OSError as the kernel answers; ENOSYS where there is no such call.

Masks hold any node id, beyond 64 too. Stateless; calls release the interpreter's lock. See set_mempolicy(2), mbind(2), move_pages(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

_NUMBERS = {
    "x86_64": {"mbind": 237, "set_mempolicy": 238, "get_mempolicy": 239, "migrate_pages": 256, "move_pages": 279, "getcpu": 309},
    "aarch64": {"mbind": 235, "get_mempolicy": 236, "set_mempolicy": 237, "migrate_pages": 238, "move_pages": 239, "getcpu": 168},
}
_MASK_BITS = 1024  # the most nodes any kernel is built for; get_mempolicy refuses masks shorter than what it was built for
_WORD_BITS = 8 * ctypes.sizeof(ctypes.c_ulong)
_MODE_FLAGS = 0xE000  # MPOL_F_STATIC_NODES, MPOL_F_RELATIVE_NODES, MPOL_F_NUMA_BALANCING share the mode's word
_F_NODE, _F_ADDR = 1, 2
_MF_STRICT, _MF_MOVE = 1, 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_numbers = _NUMBERS.get(platform.machine(), {}) if sys.platform == "linux" else {}


class Mode(IntEnum):
    """Memory policies. PREFERRED falls back to other nodes when full, BIND does not; weighted interleave came with Linux 6.9."""

    DEFAULT = 0
    PREFERRED = 1
    BIND = 2
    INTERLEAVE = 3
    LOCAL = 4
    PREFERRED_MANY = 5
    WEIGHTED_INTERLEAVE = 6


@dataclass(frozen=True)
class MemoryPolicy:
    """Where new pages come from. `flags` are the kernel's, kept so that a policy can be put back as it was."""

    mode: Mode = Mode.DEFAULT
    nodes: tuple[int, ...] = ()
    flags: int = 0


def set_mempolicy(policy: MemoryPolicy) -> None:
    """The calling thread's policy for pages it touches first from now on; threads it starts inherit it, those that run do not."""
    _call("set_mempolicy", policy.mode | policy.flags, *_mask(policy.nodes))


def get_mempolicy() -> MemoryPolicy:
    """The calling thread's policy."""
    return _policy(None, 0)


def policy_at(address: int) -> MemoryPolicy:
    """The policy of the mapping at an address of this process (the thread's where it has none of its own)."""
    return _policy(ctypes.c_void_p(address), _F_ADDR)


def node_at(address: int) -> int:
    """The node of the page at an address of this process; touches it if nobody has."""
    node = ctypes.c_int()
    _call("get_mempolicy", ctypes.byref(node), None, 0, ctypes.c_void_p(address), _F_NODE | _F_ADDR)
    return node.value


def mbind(address: int, length: int, policy: MemoryPolicy, move: bool = False) -> None:
    """The policy of the whole pages in [address, address + length). `move` those that exist already too; EIO if some cannot be moved."""
    flags = _MF_STRICT | _MF_MOVE if move else 0
    _call("mbind", ctypes.c_void_p(address), length, policy.mode | policy.flags, *_mask(policy.nodes), flags)


def move_pages(addresses: Sequence[int], nodes: Sequence[int] | None = None, pid: int = 0) -> list[int]:
    """Per page the node it is on now, or minus an errno (ENOENT: never touched). With `nodes`, each is moved there first. `pid` 0: own."""
    count = len(addresses)
    pages = (ctypes.c_void_p * count)(*addresses)
    targets = None if nodes is None else ctypes.byref((ctypes.c_int * count)(*nodes))
    status = (ctypes.c_int * count)()
    _call("move_pages", pid, count, ctypes.byref(pages), targets, ctypes.byref(status), 0 if nodes is None else _MF_MOVE)
    return list(status)


def migrate_pages(sources: Iterable[int], targets: Iterable[int], pid: int = 0) -> int:
    """Move what a process has on `sources` to `targets`; how many pages could not be moved."""
    sources_mask, bits = _mask(tuple(sources))
    targets_mask, _ = _mask(tuple(targets))
    return _call("migrate_pages", pid, bits, sources_mask, targets_mask)


def getcpu() -> tuple[int, int]:
    """CPU and node the calling thread runs on now."""
    cpu, node = ctypes.c_uint(), ctypes.c_uint()
    _call("getcpu", ctypes.byref(cpu), ctypes.byref(node), None)
    return cpu.value, node.value


def _policy(address: ctypes.c_void_p | None, flags: int) -> MemoryPolicy:
    mode = ctypes.c_int()
    words = (ctypes.c_ulong * (_MASK_BITS // _WORD_BITS))()
    _call("get_mempolicy", ctypes.byref(mode), ctypes.byref(words), _MASK_BITS + 1, address, flags)
    set_words = [(index, word) for index, word in enumerate(words) if word]
    nodes = tuple(index * _WORD_BITS + bit for index, word in set_words for bit in range(_WORD_BITS) if word >> bit & 1)
    return MemoryPolicy(Mode(mode.value & ~_MODE_FLAGS), nodes, mode.value & _MODE_FLAGS)


def _mask(nodes: Sequence[int]) -> tuple[object, int]:
    """A node mask and its length as the kernel counts it: it reads one bit less than it is told."""
    if not nodes:
        return None, 0
    if not 0 <= min(nodes) <= max(nodes) < _MASK_BITS:
        raise OSError(errno.EINVAL, f"node ids run from 0 to {_MASK_BITS - 1}")
    words = (ctypes.c_ulong * (_MASK_BITS // _WORD_BITS))()
    for node in nodes:
        words[node // _WORD_BITS] |= 1 << node % _WORD_BITS
    return ctypes.byref(words), _MASK_BITS + 1


def _call(name: str, *arguments: object) -> int:
    if name not in _numbers:
        raise OSError(errno.ENOSYS, f"{name} is not known for {platform.system()} on {platform.machine()}")
    # Whole machine words: variadic arguments left as C ints may carry garbage in their upper half.
    words = (ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments)
    answer: int = _libc.syscall(ctypes.c_long(_numbers[name]), *words)
    if answer < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return answer
