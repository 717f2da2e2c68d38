"""xxh3-128 of many byte ranges of equal length where they are: on a GPU by the kernels of `kvtier.formats.triton`, in CPU memory by xxhash.

What a copy says of its payload can so be checked without bringing the payload to the CPU. Stateless but for tables of constants.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from kvtier.errors import LayoutError
from kvtier.formats.proof import LEAST_BYTES
from kvtier.formats.triton import triton_version, why_missing

WORD_BYTES = 8

_MASK = (1 << 64) - 1
_PRIMES32 = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_PRIMES64 = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
"""XXH3's own secret: what every digest without a secret of the caller's is made with."""
_STRIPE_BYTES, _BLOCK_BYTES = 64, 1024
_BLOCKS_PER_PROGRAM, _BLOCKS_AHEAD = 16, 8


def why_no_checksums(device: torch.device) -> str:
    """One line: why ranges on that device cannot be digested there; empty if they can."""
    if device.type == "cpu":
        return ""
    return why_missing(device) if triton_version() is not None else "Triton is not installed, or too old; pip install 'kvtier[gds]'"


def xxh3_128(ranges: torch.Tensor, out: torch.Tensor) -> None:
    """The xxh3-128 of each row of `ranges` into `out`, queued on the current stream: its lower and its upper 64 bits; see `digest_bytes`.

    `ranges`: uint8 `[n, length]`, rows of contiguous bytes that begin at multiples of 8; `length` at least LEAST_BYTES. `out`: int64
    `[n, 2]`, contiguous, on the same device. LayoutError, and nothing queued, if they do not fit; also where `why_no_checksums` says why.
    """
    _check(ranges, out)
    count = len(ranges)
    if not count:
        return
    if ranges.device.type == "cpu":
        digests = b"".join(xxhash.xxh3_128_digest(row.data) for row in ranges.numpy())
        out.copy_(torch.from_numpy(np.frombuffer(digests, ">u8").reshape(count, 2)[:, ::-1].astype(np.uint64).view(np.int64)))
        return
    launch(ranges, out)


def launch(ranges: torch.Tensor, out: torch.Tensor) -> None:
    """`xxh3_128` by the kernels, for arguments that fit and a device that has them."""
    from kvtier.formats.triton import xxh3  # which imports Triton
    from kvtier.formats.triton.launch import on

    count, length = ranges.shape
    stripes = (length - 1) // _STRIPE_BYTES
    blocks = (length - 1) // _BLOCK_BYTES + 1
    with on(ranges.device):
        table = _table(length, ranges.device)
        sums = torch.empty((count, blocks, 8), dtype=torch.uint64, device=ranges.device)
        groups = -(-blocks // _BLOCKS_PER_PROGRAM)
        xxh3.block_sums[(count * groups,)](ranges, ranges.stride(0), stripes, blocks, table, sums, BLOCKS=_BLOCKS_PER_PROGRAM, num_warps=4)
        turns = -(-(blocks - 1) // _BLOCKS_AHEAD)
        xxh3.digest[(count,)](
            ranges, ranges.stride(0), length, blocks, table, sums, out.view(torch.uint64), TURNS=turns, AHEAD=_BLOCKS_AHEAD, num_warps=1
        )


def digest_bytes(out: NDArray[np.int64]) -> list[bytes]:
    """16 bytes for each row of `[n, 2]`, as `xxhash.xxh3_128_digest` gives them: the upper half first, each half big-endian."""
    return [row.tobytes() for row in out.view(np.uint64)[:, ::-1].astype(">u8")]


@lru_cache(maxsize=64)
def _table(length: int, device: torch.device) -> torch.Tensor:
    """What the kernels take from a table: the secret by words; its words for the last stripe and for both halves of the digest; the lanes'
    start; what the length adds to both halves."""

    def words(start: int, count: int) -> NDArray[np.uint64]:
        return np.frombuffer(_SECRET, "<u8", count, start)

    lanes = (_PRIMES32[2], *_PRIMES64[:4], _PRIMES32[1], _PRIMES64[4], _PRIMES32[0])
    lengths = (length * _PRIMES64[0] & _MASK, ~(length * _PRIMES64[1]) & _MASK)
    end = len(_SECRET) - _STRIPE_BYTES
    table = [*words(0, 24), *words(end - 7, 8), *words(11, 8), *words(end - 11, 8), *lanes, *lengths]
    return torch.from_numpy(np.array(table, np.uint64)).to(device)


def _check(ranges: torch.Tensor, out: torch.Tensor) -> None:
    if ranges.dtype != torch.uint8 or ranges.ndim != 2 or ranges.shape[1] < LEAST_BYTES or ranges.stride(1) != 1:
        found = f"{ranges.dtype} {list(ranges.shape)} of strides {list(ranges.stride())}"
        raise LayoutError(f"ranges to digest are {found}; expected uint8 [n, at least {LEAST_BYTES}] with contiguous rows")
    if (ranges.data_ptr() | ranges.stride(0)) % WORD_BYTES:
        place = f"address {ranges.data_ptr():#x}, {ranges.stride(0)} bytes apart"
        raise LayoutError(f"ranges to digest begin at {place}; expected multiples of {WORD_BYTES}")
    if out.dtype != torch.int64 or out.shape != (len(ranges), 2) or not out.is_contiguous() or out.device != ranges.device:
        expected = f"contiguous int64 [{len(ranges)}, 2] on {ranges.device}"
        raise LayoutError(f"digests go into {out.dtype} {list(out.shape)} on {out.device}; expected {expected}")
    if missing := why_no_checksums(ranges.device):
        raise LayoutError(f"ranges on {ranges.device} cannot be digested there: {missing}")
