"""How one block is coded: the contract of a block codec, and the shape of what it codes. No state.

A block is one plane of one layer of a page. `places.py` says where blocks lie in a payload, `blocks.py` makes formats of them; there is one
file per codec or family of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from kvtier.layout import PageLayout


@dataclass(frozen=True)
class BlockShape:
    """One plane of one layer of one page: `[tokens, heads, head_dim]` numbers of `dtype`. `keys`: plane 0 of a page with two planes."""

    tokens: int
    heads: int
    head_dim: int
    dtype: str
    keys: bool

    @property
    def vectors(self) -> int:
        """Vectors of head_dim numbers."""
        return self.tokens * self.heads

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the numbers."""
        return PageLayout(1, 1, 1, 1, 1, self.dtype).torch_dtype


class BlockCodec(ABC):
    """One way to code a block in a fixed number of bytes. Frozen, without mutable state."""

    name: str
    lossless: bool = False
    native_id: int | None = None
    """The codec's number in `kvtier.formats.native`; None if there are no kernels for it."""

    @abstractmethod
    def block_bytes(self, shape: BlockShape) -> int:
        """Bytes of one coded block. LayoutError if the codec cannot code blocks of that shape."""

    @abstractmethod
    def encode(self, blocks: torch.Tensor, shape: BlockShape) -> torch.Tensor:
        """Coded blocks, uint8 `[m, block_bytes]` on the same device, of `blocks` `[m, tokens, heads, head_dim]`, any strides."""

    def encode_first(self, blocks: torch.Tensor, shape: BlockShape) -> torch.Tensor:
        """As `encode`, for blocks that begin a sequence. Codecs that treat these differently say so in the block: `decode` finds out."""
        return self.encode(blocks, shape)

    @abstractmethod
    def decode(self, coded: torch.Tensor, shape: BlockShape) -> torch.Tensor:
        """Numbers `[m, tokens, heads, head_dim]` in the shape's dtype, of uint8 `coded` `[m, block_bytes]`."""

    def sections(self, shape: BlockShape) -> tuple[int, ...]:
        """Bytes of each stretch of a coded block that holds bytes of one kind, such as scales or codes; zeros for what is missing."""
        return (self.block_bytes(shape),)

    def element_bytes(self, shape: BlockShape) -> int:
        """Bytes of each number if a coded block is a plain row of them, else 1."""
        return 1
