"""Many copies as one Triton kernel that reads and writes by address: device memory and registered host memory alike. Stateless.

Copy engines take a few microseconds for each copy, however small; a kernel takes them all at once, but it takes processors from the engine
and crosses the link in pieces of 128 bytes. So it runs as few programs, each of which goes from piece to piece (as SGLang's and vLLM's
transfer kernels do), and which way is faster is measured (`kvtier.mover.crossover`). Imports Triton.
"""

from __future__ import annotations

import contextlib

import numpy as np
import torch
import triton
import triton.language as tl

from kvtier.cuda.surface import Addresses
from kvtier.errors import DeviceError

PROGRAMS = 16
"""Of a GPU's 132 processors the ninth part: with 16 KiB each under way 256 KiB, what a link of 60 GB/s carries in 4 us."""
PIECE_WORDS: tl.constexpr = tl.constexpr(4096)
UNIT_BYTES = 16
"""What addresses and sizes are multiples of, so that a thread carries 16 bytes at once."""


@triton.jit(do_not_specialize=["copies", "units"])
def copy_kernel(targets, sources, copies, units, PIECE: tl.constexpr):
    """`copies` stretches of `units` times 16 bytes, from addresses `sources` to `targets` (int64); any number of programs."""
    words = units * 4
    pieces = tl.cdiv(words, PIECE)
    job = tl.program_id(0)
    while job < copies * pieces:
        copy = job // pieces
        target = tl.multiple_of(tl.load(targets + copy).to(tl.pointer_type(tl.int32)), 16)
        source = tl.multiple_of(tl.load(sources + copy).to(tl.pointer_type(tl.int32)), 16)
        places = job % pieces * PIECE + tl.arange(0, PIECE)
        inside = places < words
        tl.store(target + places, tl.load(source + places, inside), inside)
        job += tl.num_programs(0)


def copy_all(targets: Addresses, sources: Addresses, size_bytes: int, device: torch.device) -> None:
    """Queue copies of `size_bytes` each on the current stream of `device`. DeviceError if something is no multiple of 16."""
    if not len(targets):
        return
    if (int(np.bitwise_or.reduce(targets | sources)) | size_bytes) % UNIT_BYTES:
        raise DeviceError(f"a kernel copies multiples of {UNIT_BYTES} bytes, between addresses that are; {size_bytes} bytes are asked for")
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        # Taken into the launch, or read before this returns: see `GpuPool._index`.
        to, of = (torch.from_numpy(addresses).to(device, non_blocking=True) for addresses in (targets, sources))
        jobs = len(targets) * -(-size_bytes // (4 * PIECE_WORDS.value))
        copy_kernel[(min(PROGRAMS, jobs),)](to, of, len(targets), size_bytes // UNIT_BYTES, PIECE=PIECE_WORDS, num_warps=8)
