"""Geometry of a page: how many bytes, in which order, and a fingerprint that two equal layouts share.

A page holds the keys and values of `page_tokens` consecutive tokens for all layers, contiguous ("page-first"):
`[layers, planes, page_tokens, kv_heads, head_dim]`. Plain data; imports no tensor library unless `torch_dtype` is asked for.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from kvtier.errors import LayoutError

if TYPE_CHECKING:
    import torch

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
_TORCH_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class PageLayout:
    """Shape and dtype of one page.

    `layers`: transformer layers. `planes`: 2 (K, V), or 1 for a single latent plane (MLA). `page_tokens`: tokens per page.
    `kv_heads`, `head_dim`: as in the model. `dtype`: "bf16", "fp16" or "fp32", the dtype the engine produces.
    Raises LayoutError for sizes below one, other plane counts and other dtypes.
    """

    layers: int
    planes: int
    page_tokens: int
    kv_heads: int
    head_dim: int
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        for field in ("layers", "page_tokens", "kv_heads", "head_dim"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise LayoutError(f"page layout: {field} is {value!r}; expected a whole number of at least 1")
        if self.planes not in (1, 2):
            raise LayoutError(f"page layout: planes is {self.planes!r}; expected 2 (keys and values) or 1 (one latent plane)")
        if self.dtype not in DTYPE_BYTES:
            raise LayoutError(f"page layout: dtype is {self.dtype!r}; expected one of {', '.join(DTYPE_BYTES)}")

    @cached_property
    def shape(self) -> tuple[int, int, int, int, int]:
        """`[layers, planes, page_tokens, kv_heads, head_dim]`."""
        return (self.layers, self.planes, self.page_tokens, self.kv_heads, self.head_dim)

    @cached_property
    def values(self) -> int:
        """Numbers in one page."""
        return self.layers * self.planes * self.page_tokens * self.kv_heads * self.head_dim

    @cached_property
    def page_bytes(self) -> int:
        """Bytes of one page as the engine produces it."""
        return self.values * DTYPE_BYTES[self.dtype]

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of one token's KV over all layers, as the engine produces it."""
        return self.page_bytes // self.page_tokens

    @cached_property
    def fingerprint(self) -> bytes:
        """16 bytes that are equal exactly for equal layouts, on every machine and in every process."""
        text = f"kvtier page layout 1: {self.shape} {self.dtype}"
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    @cached_property
    def strides(self) -> tuple[int, int, int, int, int]:
        """Numbers from one index to the next along each axis of a contiguous page."""
        head, token = self.head_dim, self.head_dim * self.kv_heads
        plane = token * self.page_tokens
        return (plane * self.planes, plane, token, head, 1)

    @cached_property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype of the page's numbers."""
        import torch

        dtype: torch.dtype = getattr(torch, _TORCH_NAMES[self.dtype])
        return dtype

    def __str__(self) -> str:
        return (
            f"[{self.layers} layers, {self.planes} planes, {self.page_tokens} tokens, {self.kv_heads} heads, {self.head_dim}] {self.dtype}"
        )
