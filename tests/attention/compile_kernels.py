"""Compile the digest kernels for a Hopper GPU, which need not be there, and print bytes of shared memory and spills. For test_kernels."""

from __future__ import annotations

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvtier.attention import kernels
from kvtier.attention.digest import DigestLayout
from kvtier.formats.hadamard import block_size, unrotate_factor
from kvtier.layout import PageLayout

POINTERS = {"out": "*u8", "digests": "*u8", "asked": "*fp32", "scale_table": "*fp32", "bases": "*i64", "table": "*i64"}


def compiled(kernel, constants, pointers, options) -> dict[str, int]:
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else pointers.get(name, "i32")
        if name in pointers:
            attributes[(place,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    done = triton.compile(ASTSource(kernel, signature, values, attributes), target=GPUTarget("cuda", 90, 32), options=options)
    return {"shared_bytes": done.metadata.shared, "local": done.asm["ptx"].count(".local")}


def main() -> None:
    found = {}
    for layout in (PageLayout(2, 2, 16, 8, 128, "bf16"), PageLayout(2, 2, 64, 8, 128, "bf16"), PageLayout(2, 2, 64, 1, 256, "bf16")):
        shape = DigestLayout.of(layout)
        sizes = {"PIECES": shape.pieces, "HEAD_DIM": layout.head_dim, "VECTOR_BYTES": shape.vector_bytes}
        sizes |= {"T": kernels._padded(shape.piece_tokens), "D": kernels._padded(layout.head_dim)}
        encode: dict[str, float] = {
            "DTYPE": 0,
            "TOKENS": layout.page_tokens,
            "BLOCK_TOKENS": layout.page_tokens,
            "HEADS": layout.kv_heads,
            "PLANES": 2,
        }
        encode |= {"BLOCK": block_size(layout.head_dim), "NORM": unrotate_factor(layout.head_dim), "ALIGN": 16}
        options = {"num_warps": 4, "enable_fp_fusion": False}
        found[f"digest {layout}"] = compiled(kernels.digest_kernel, sizes | encode, POINTERS, options)
        score = {"PIECE_TOKENS": shape.piece_tokens, "Q": kernels.QUERIES, "P": kernels.PAGES}
        found[f"logits {layout}"] = compiled(kernels.logits_kernel, sizes | score, POINTERS | {"out": "*fp32"}, {"num_warps": 4})
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
