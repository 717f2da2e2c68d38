"""Sets of quantization levels for Gaussian vectors (Lloyd and Max), in whole numbers, and how a vector is coded with them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from kvtier.formats.numbers import divided, inverse, root, sum_by_halves


@dataclass(frozen=True)
class Levels:
    """Symmetric whole-number levels for Gaussian vectors, by code; `per_rms` is the level that stands for one rms."""

    bits: int
    levels: tuple[int, ...]
    per_rms: float

    @cached_property
    def code_of_cell(self) -> torch.Tensor:
        """uint8 `[256]`: the code whose level is nearest to the cell c..c + 1, for c = -128..127. Boundaries are whole numbers."""
        levels, codes = torch.tensor(self.levels).sort()
        return codes[torch.bucketize(torch.arange(-128, 128), (levels[1:] + levels[:-1]) // 2, right=True)].to(torch.uint8)

    @cached_property
    def values(self) -> torch.Tensor:
        """The levels as fp32."""
        return torch.tensor(self.levels, dtype=torch.float32)

    def encode(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes, uint8 `[..., head_dim]`, and fp32 scales `[..., 1]` (0 where there is nothing to code) of fp32 vectors."""
        energy = sum_by_halves(vectors.square(), -1)
        rms = root(divided(energy, vectors.shape[-1]))
        cells = (vectors * (inverse(rms) * self.per_rms)).floor_().clamp_(-128, 127)
        codes = self.code_of_cell.to(vectors.device)[cells.int() + 128]
        along = sum_by_halves(self.decode(codes) * vectors, -1)
        return codes, energy * inverse(along) * self.per_rms

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """fp32 levels of the shape of `codes`."""
        return self.values.to(codes.device)[codes.int()]


LEVELS4 = Levels(4, (-122, -92, -72, -56, -42, -30, -18, -6, 6, 18, 30, 42, 56, 72, 92, 122), 44.64)
LEVELS3 = Levels(3, (14, 42, 76, 120, -14, -42, -76, -120), 56.0)
"""The third bit is the sign: it is noise, but without it the two low bits have 1.82 bits of entropy."""

LEVELS2 = Levels(2, (-120, -36, 36, 120), 79.5)
