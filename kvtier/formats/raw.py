"""raw: the bytes of the page as they are. Lossless, fixed size.

Block: `[tokens, heads, head_dim]` in the page's dtype, little-endian. Every bit pattern comes back: NaN payloads, infinities, both zeros,
subnormals. Bits per value: 16 (bf16, fp16) or 32 (fp32); error none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvtier.formats.codec import BlockCodec, BlockShape
from kvtier.layout import DTYPE_BYTES


@dataclass(frozen=True)
class Raw(BlockCodec):
    """See the file's head."""

    name = "raw"
    lossless = True
    native_id = 0

    def block_bytes(self, shape: BlockShape) -> int:
        return shape.vectors * shape.head_dim * DTYPE_BYTES[shape.dtype]

    def element_bytes(self, shape: BlockShape) -> int:
        return DTYPE_BYTES[shape.dtype]

    def encode(self, blocks: torch.Tensor, shape: BlockShape) -> torch.Tensor:
        return blocks.contiguous().view(torch.uint8).view(-1, self.block_bytes(shape))

    def decode(self, coded: torch.Tensor, shape: BlockShape) -> torch.Tensor:
        return coded.view(shape.torch_dtype).view(-1, shape.tokens, shape.heads, shape.head_dim)
