"""Compile the kernels of XXH3 for a Hopper GPU, which need not be there, and print what is in their PTX as JSON. A program for
test_checksums."""

from __future__ import annotations

import json
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvtier.formats.triton import xxh3

POINTERS = {"ranges": "*u8", "table": "*u64", "sums": "*u64", "out": "*u64"}
# `row_bytes` is a multiple of 4,096, and what torch allocates is aligned; the ranges themselves begin 256 bytes behind.
ALIGNED = (*POINTERS, "row_bytes")


def compiled(kernel, constants: dict[str, int], warps: int) -> dict[str, object]:
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else POINTERS.get(name, "i32")
        if name in ALIGNED:
            attributes[(place,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    done = triton.compile(ASTSource(kernel, signature, values, attributes), target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    instructions = set(re.findall(r"^\s+(?:@!?%p\d+ )?([a-z][\w.:]+)", done.asm["ptx"], re.MULTILINE))
    return {"instructions": sorted(instructions), "local_bytes": len(re.findall(r"\.local ", done.asm["ptx"]))}


if __name__ == "__main__":
    found = {
        "block_sums": compiled(xxh3.block_sums, {"BLOCKS": 16}, 4),
        "digest": compiled(xxh3.digest, {"TURNS": 128, "AHEAD": 8}, 1),
    }
    json.dump(found, sys.stdout)
