"""Compile all kernels for a Hopper GPU, which need not be there, and print the instructions of each as JSON. A program for test_triton."""

from __future__ import annotations

import json
import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvtier.formats import get_format
from kvtier.formats.blocks import BlockFormat
from kvtier.formats.triton import launch, pages
from kvtier.formats.triton.gaussian import decode_factors
from kvtier.layout import PageLayout

LAYOUT = PageLayout(2, 2, 16, 8, 128, "bf16")
POINTERS = {"out": "*u8", "payloads": "*u8", "begins": "*u8", "step_values": "*fp32", "mantissas": "*i32"}
TABLES = ("bases", "sources", "targets", "offsets", "table", "out_rows", "payload_rows")
NOT_ALIGNED = ("entries", "begin")


def instructions(kernel, group, constants) -> list[str]:
    options = {name: group.shared[name] for name in ("num_warps", "enable_fp_fusion")}
    constants = {name: value for name, value in (group.shared | constants).items() if name not in options}
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = POINTERS.get(name, "*i64" if name in TABLES else "i32")
        if name not in NOT_ALIGNED:
            attributes[(place,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, attributes)
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return sorted(set(re.findall(r"^\s+(?:@!?%p\d+ )?([a-z][\w.:]+)", done.asm["ptx"], re.MULTILINE)))


def main() -> None:
    found = {}
    for name in ("raw", "fp8", "q8", "q4", "sparse24!"):
        page_format = get_format(name)
        assert isinstance(page_format, BlockFormat)
        plan = launch.launches(page_format, LAYOUT, torch.device("cpu"))
        assert plan is not None
        for group in plan.groups:
            what = f"{name}{' keys' if group.shared['KEYS'] else ''}"
            factor4, factor3 = decode_factors(LAYOUT.head_dim)
            sizes = {"BLOCK_TOKENS": 16, "ALIGN": 16}
            there = {"LIMIT": group.limit, "FIRST": False, "SOURCE_ALIGN": 16}
            back = {"FACTOR4": factor4, "FACTOR3": factor3, "CAN_BEGIN": group.can_begin, "TARGET_ALIGN": 16}
            found[f"encode {what}"] = instructions(pages.encode_kernel, group, sizes | there)
            found[f"decode {what}"] = instructions(pages.decode_kernel, group, sizes | back)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
