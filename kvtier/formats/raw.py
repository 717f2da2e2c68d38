"""raw: the bytes of the page as they are. Lossless, fixed size.

Payload: `[layers, planes, page_tokens, kv_heads, head_dim]` in the page's dtype, little-endian. Every bit pattern comes back: NaN
payloads, infinities, both zeros, subnormals. Bits per value: 16 (bf16, fp16) or 32 (fp32); error none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvtier.formats.sections import SectionedFormat
from kvtier.layout import DTYPE_BYTES, PageLayout


@dataclass(frozen=True)
class Raw(SectionedFormat):
    """See the file's head."""

    name = "raw"
    lossless = True

    def section_bytes(self, layout: PageLayout) -> tuple[int, ...]:
        return (layout.page_bytes // layout.layers,)

    def element_bytes(self, layout: PageLayout) -> int:
        return DTYPE_BYTES[layout.dtype]

    def encode_layers(self, layers: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (layers,)

    def decode_layers(self, sections: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        out.view(torch.uint8).copy_(sections[0].view(out.view(torch.uint8).shape))
