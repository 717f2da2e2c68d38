"""The mean of a page's keys: what q6, q4 and q3 take away from keys before they code them.

Attention sinks (the first tokens of a sequence) do not share their page's mean and would be ruined by it, and they take much attention:
each key chooses whichever of the two vectors is shorter, with and without the mean, and one bit beside its scale says which. Residuals are
taken against the mean as it will be decoded, so its own error is not added to theirs and four bits are enough for it.

In the coded block, little-endian:
    mean scales  fp16   [heads]                >= 0
    mean codes   uint8  [heads, head_dim / 2]  a q4 vector, see levels.py
    mean = (LEVELS4[codes] @ H) * (scale * block**-0.5 / PER_RMS4)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvtier.formats.bits import pack, unpack
from kvtier.formats.codec import BlockShape
from kvtier.formats.hadamard import rotate, unrotate_factor, unrotate_whole
from kvtier.formats.levels import LEVELS4
from kvtier.formats.numbers import divided, fp16_scale, numbers_of, sum_by_halves


def mean_bytes(shape: BlockShape) -> int:
    """Bytes of the mean in a coded block."""
    return shape.heads * (2 + shape.head_dim // 2)


@dataclass(frozen=True)
class PageMean:
    """Means of a batch of blocks as they are stored: fp16 scales `[m, heads]`, uint8 codes `[m, heads, head_dim]`."""

    scales: torch.Tensor
    codes: torch.Tensor

    @classmethod
    def of(cls, keys: torch.Tensor) -> PageMean:
        """The mean over tokens of finite fp32 `keys` `[m, tokens, heads, head_dim]`."""
        codes, scales = LEVELS4.encode(rotate(divided(sum_by_halves(keys, 1), keys.shape[1]).squeeze(1)))
        return cls(fp16_scale(scales.squeeze(-1)), codes)

    @classmethod
    def decode(cls, coded: torch.Tensor, shape: BlockShape) -> PageMean:
        """From the mean's bytes, uint8 `[m, mean_bytes]`."""
        scales, packed = coded.split_with_sizes([shape.heads * 2, shape.heads * shape.head_dim // 2], 1)
        codes = unpack(packed.reshape(-1, shape.heads, shape.head_dim // 2), 4)
        return cls(numbers_of(scales, torch.float16).abs(), codes)

    def encode(self) -> list[torch.Tensor]:
        """The mean's bytes, as parts `[m, ...]` of uint8 to be put one after the other."""
        return [self.scales.view(torch.uint8), pack(self.codes, 4).flatten(1)]

    def choose(self, rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated vectors `[m, tokens, heads, head_dim]`, each without the mean if that is shorter, and whether it is (bool `[..., 1]`)."""
        factor = self.scales.float() * _as_fp32(1 / LEVELS4.per_rms)
        without = rotated - (LEVELS4.decode(self.codes) * factor[..., None])[:, None]
        shorter = sum_by_halves(without.square(), -1) < sum_by_halves(rotated.square(), -1)
        return torch.where(shorter, without, rotated), shorter

    def values(self) -> torch.Tensor:
        """fp32 means `[m, 1, heads, head_dim]`, rotated back."""
        factor = self.scales.float() * _as_fp32(unrotate_factor(self.codes.shape[-1]) / LEVELS4.per_rms)
        return (unrotate_whole(LEVELS4.decode(self.codes)) * factor[..., None])[:, None]


def _as_fp32(number: float) -> float:
    return float(torch.tensor(number, dtype=torch.float32))
