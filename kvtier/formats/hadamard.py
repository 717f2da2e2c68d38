"""The rotation in front of q8 and q4: a block Hadamard transform along head_dim.

Keys have a few channels that are many times larger than the rest; a scale per vector then wastes its levels on them. Multiplying by an
orthogonal matrix of +-1 spreads every channel over all of them, so the rotated vector looks Gaussian and has no outliers (QuIP#,
Tseng et al. 2024; QuaRot, Ashkboos et al. 2024; llama.cpp rotates its quantised KV cache the same way). The block is the largest power of
two that divides head_dim (64 -> 64, 80 -> 16, 96 -> 32); an odd head_dim is left alone. Sylvester's matrix is symmetric and its own
inverse up to a factor of `block`. No random signs: they do not change the statistics of real keys.

Going back, the formats transform *whole numbers* (codes) with the +-1 matrix and scale afterwards. Sums of at most 2**24 are exact in
fp32 in any order, so the result does not depend on batch size, thread count, BLAS or device.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch


def block_size(head_dim: int) -> int:
    """The largest power of two that divides `head_dim`."""
    return head_dim & -head_dim


@lru_cache(maxsize=32)
def signs(block: int, device: torch.device) -> torch.Tensor:
    """Sylvester's matrix of +-1, fp32 `[block, block]`; `signs @ signs == block * identity`. Shared: never write to it."""
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix.to(device)


def butterflies(vectors: torch.Tensor) -> torch.Tensor:
    """fp32 `vectors` `[..., head_dim]` transformed with the +-1 matrix: `rotate` before its factor.

    Sums and differences of neighbours, then of numbers 2, 4, ... apart: the same bits on every machine and device. Each step leaves the
    differences behind the sums, so that the next one's numbers are neighbours again.
    """
    block = block_size(vectors.shape[-1])
    numbers = vectors.reshape(-1, block)
    for _ in range(block.bit_length() - 1):
        left, right = numbers[:, 0::2], numbers[:, 1::2]
        numbers = torch.cat([left + right, left - right], 1)
    return numbers.view(vectors.shape)


def rotate(vectors: torch.Tensor) -> torch.Tensor:
    """Rotated copy of fp32 `vectors` `[..., head_dim]`; norms are kept."""
    return butterflies(vectors) * unrotate_factor(vectors.shape[-1])


def unrotate_whole(codes: torch.Tensor) -> torch.Tensor:
    """Inverse rotation of whole numbers times `sqrt(block)`: exact whole numbers again, fp32 of the shape of `codes` `[..., head_dim]`.

    Multiply by `unrotate_factor(head_dim)` (and the scale) to get the rotated-back vector.
    """
    block = block_size(codes.shape[-1])
    return (codes.reshape(-1, block) @ signs(block, codes.device)).view(codes.shape)


def unrotate_factor(head_dim: int) -> float:
    """What `unrotate_whole` leaves to be multiplied."""
    return 1 / math.sqrt(block_size(head_dim))
