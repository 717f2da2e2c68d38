"""Compile the kernel that copies for a Hopper GPU, which need not be there, and print its instructions as JSON. For test_copy_kernel."""

from __future__ import annotations

import json
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvtier.cuda.copy_kernel import PIECE_WORDS, copy_kernel

SIGNATURE = {"targets": "*i64", "sources": "*i64", "copies": "i32", "units": "i32", "PIECE": "constexpr"}


def main() -> None:
    aligned = {(place,): [["tt.divisibility", 16]] for place in (0, 1)}
    source = ASTSource(copy_kernel, SIGNATURE, {(4,): PIECE_WORDS.value}, aligned)
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    json.dump(sorted(set(re.findall(r"^\s+(?:@!?%p\d+ )?([a-z][\w.:]+)", done.asm["ptx"], re.MULTILINE))), sys.stdout)


if __name__ == "__main__":
    main()
